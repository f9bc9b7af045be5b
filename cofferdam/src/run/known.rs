//! What is known of a live guest: symbols and types, read in its memory or told by its agent.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_protocol::Client;
use agent_protocol::message::{Module, SymbolFilter};
use anyhow::Context;
use isolation::attach::Isolator;
use isolation::attach::kernel_image::KernelIdentity;
use isolation::guest::btf::Btf;
use isolation::guest::symbols::{Line, SymbolTable, SymbolTableBuilder};

/// What is known of the guest's kernel.
#[derive(Clone)]
struct Kernel {
    /// Resets of the machine by then.
    resets: u64,
    /// Which one it is, and its symbols, if they were found in its memory.
    found: Option<(KernelIdentity, Arc<SymbolTable>)>,
    /// Otherwise why they are not known.
    types: Result<Arc<Btf>, String>,
}

/// What the kernel itself is called among those that have types.
const KERNEL: &str = "vmlinux";

/// What is known of a guest and one of its modules, for as long as the same modules are loaded at
/// the same places.
pub struct Known {
    module: String,
    /// Resets of the machine by then: a guest that boots anew may have its kernel elsewhere.
    resets: u64,
    loaded: Vec<Module>,
    /// Symbols of the kernel and of all modules.
    pub symbols: Arc<SymbolTable>,
    /// Types of the kernel and of the module, otherwise why they are not known.
    pub types: Result<Arc<Btf>, String>,
}

impl Known {
    /// The sections of `module` and where they were, if it is what this is about.
    pub fn sections_of(&self, module: &str) -> Option<&[(String, u64)]> {
        let mut loaded = self.loaded.iter().filter(|_| self.module == module);
        let own = loaded.find(|loaded| loaded.name == module)?;
        Some(&own.sections)
    }

    /// Gives up the memory of what was looked at.
    pub fn cool(&self) {
        self.symbols.cool();
        if let Ok(types) = &self.types {
            types.cool();
        }
    }
}

/// What is known, and read anew only where it is not any more.
#[derive(Default)]
pub struct Knowledge {
    /// What is known of the module that was asked about last.
    known: Mutex<Option<Arc<Known>>>,
    /// What is known of the guest's kernel.
    kernel: Mutex<Option<Kernel>>,
}

impl Knowledge {
    /// What is known of the module that was asked about last.
    pub fn last(&self) -> Option<Arc<Known>> {
        lock(&self.known).clone()
    }

    /// The same is known as once before.
    pub fn put_back(&self, known: Option<Arc<Known>>) {
        *lock(&self.known) = known;
    }

    /// Modules are other ones now.
    pub fn forget(&self) {
        *lock(&self.known) = None;
    }

    /// What there is to know of the guest and of `module`, where its machine was reset so often.
    ///
    /// # Errors
    /// The agent does not answer, or the guest has no such module.
    pub fn of(
        &self,
        isolator: &Isolator,
        resets: u64,
        agent: &mut Client,
        module: &str,
        loaded: Vec<Module>,
    ) -> anyhow::Result<Arc<Known>> {
        let same = |known: &&Arc<Known>| {
            known.module == module && known.resets == resets && known.loaded == loaded
        };
        if let Some(known) = lock(&self.known).as_ref().filter(same) {
            return Ok(known.clone());
        }
        // What was known does not take up memory while its successor is read.
        *lock(&self.known) = None;
        // Nothing is locked meanwhile: who has the machine at rest asks what is known.
        let own = loaded.iter().find(|loaded| loaded.name == module);
        let own = own.with_context(|| format!("the guest has no module {module} loaded"))?;
        let kernel = self.kernel(isolator, resets, agent, own);
        let types = kernel
            .types
            .clone()
            .and_then(|kernel| {
                told_types(agent, module, Some(kernel)).map_err(|error| format!("{error:#}"))
            })
            .map_err(|error| format!("the types of its kernel and of {module} (BTF): {error}"));
        let symbols = symbols(isolator, agent, own, &kernel, types.as_deref().ok())?;
        let new = Arc::new(Known {
            module: module.to_owned(),
            symbols: Arc::new(symbols),
            types,
            resets,
            loaded,
        });
        *lock(&self.known) = Some(new.clone());
        Ok(new)
    }

    /// What is known of the guest's kernel since it was booted, otherwise what is found in its memory
    /// or what its agent reads. `module` is loaded.
    fn kernel(
        &self,
        isolator: &Isolator,
        resets: u64,
        agent: &mut Client,
        module: &Module,
    ) -> Kernel {
        let (name, sections) = (module.name.as_str(), module.sections.as_slice());
        // A kernel can start another one without a reset (kexec).
        let is_the_same = |kept: &Kernel| match &kept.found {
            Some((identity, _)) => isolator
                .runs_kernel(identity, name, sections)
                .unwrap_or(false),
            None => true,
        };
        let kept = lock(&self.kernel).clone();
        let kept = kept.filter(|kept| kept.resets == resets);
        if let Some(kept) = kept.filter(is_the_same) {
            return kept;
        }
        *lock(&self.kernel) = None;
        let image = isolator.kernel_image(name, sections);
        let image = image.inspect_err(|error| {
            tracing::info!(%error, "symbols and types are asked of the guest's agent");
        });
        let image = image.ok();
        let found = image.as_ref().and_then(|image| image.types.as_deref());
        let types = match found.map(|bytes| Btf::parse(bytes, None)) {
            Some(Ok(types)) => Ok(Arc::new(types)),
            _ => told_types(agent, KERNEL, None).map_err(|error| format!("{error:#}")),
        };
        let kernel = Kernel {
            resets,
            found: image.map(|image| (image.identity, image.symbols)),
            types,
        };
        if kernel.types.is_ok() {
            *lock(&self.kernel) = Some(kernel.clone());
        }
        kernel
    }
}

/// All symbols of the guest, in which `module` is loaded.
fn symbols(
    isolator: &Isolator,
    agent: &mut Client,
    module: &Module,
    kernel: &Kernel,
    types: Option<&Btf>,
) -> anyhow::Result<SymbolTable> {
    let base = kernel.found.as_ref().map(|(_, symbols)| symbols);
    if let Some((base, types)) = base.zip(types) {
        match isolator.symbols_of_modules(&module.name, &module.sections, base, types) {
            Ok(symbols) => return Ok(symbols),
            Err(error) => tracing::info!(%error, "symbols of modules are asked of the agent"),
        }
    }
    told_symbols(agent, base)
}

/// All symbols of the guest as its agent tells them, but for those of the kernel where these are
/// known.
fn told_symbols(
    agent: &mut Client,
    kernel: Option<&Arc<SymbolTable>>,
) -> anyhow::Result<SymbolTable> {
    let above = kernel.cloned().map(SymbolTableBuilder::above);
    let mut table = above.unwrap_or_default();
    let filter = SymbolFilter {
        of_modules: kernel.is_some(),
        ..SymbolFilter::default()
    };
    for symbol in agent.symbols(filter)? {
        if kernel.is_some() && symbol.module.is_none() {
            continue;
        }
        table.add(&Line {
            address: symbol.address,
            kind: symbol.kind,
            name: &symbol.name,
            module: symbol.module.as_deref(),
        })?;
    }
    Ok(table.finish())
}

/// Types of `part`, which is the kernel or a module of it, as its agent reads them.
fn told_types(
    agent: &mut Client,
    part: &str,
    kernel: Option<Arc<Btf>>,
) -> anyhow::Result<Arc<Btf>> {
    let own = agent.read_file(&format!("/sys/kernel/btf/{part}"))?;
    Ok(Arc::new(Btf::parse(&own, kernel)?))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change under these locks is whole when it can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
