//! What is known of a live guest: symbols and types, read in its memory or told by its agent.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_protocol::Client;
use agent_protocol::message::{Module, SymbolFilter};
use anyhow::Context;
use isolation::attach::Isolator;
use isolation::guest::btf::Btf;
use isolation::guest::symbols::image::TableSymbols;
use isolation::guest::symbols::{Line, SymbolTable, SymbolTableBuilder};

/// Types of the guest's kernel.
struct KernelTypes {
    /// Resets of the machine by then.
    resets: u64,
    /// How many bytes of types were found in its memory.
    found: Option<usize>,
    types: Arc<Btf>,
}

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
    /// Types of the guest's kernel.
    kernel_types: Mutex<Option<KernelTypes>>,
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
        let image = isolator.kernel_image(module, &own.sections);
        let image = image.inspect_err(|error| {
            tracing::info!(%error, "symbols and types are asked of the guest's agent");
        });
        let image = image.ok();
        let types = image.as_ref().and_then(|image| image.types.as_deref());
        let types = self
            .kernel_types(agent, resets, types)
            .and_then(|kernel| module_types(agent, module, kernel))
            .map_err(|error| format!("the types of its kernel and of {module} (BTF): {error:#}"));
        let symbols = guest_symbols(agent, image.as_ref().map(|image| &image.symbols))?;
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

    /// Types of the guest's kernel: those that are known since it was booted, what was found in its
    /// memory, or what its agent reads.
    fn kernel_types(
        &self,
        agent: &mut Client,
        resets: u64,
        found: Option<&[u8]>,
    ) -> anyhow::Result<Arc<Btf>> {
        let mut kept = lock(&self.kernel_types);
        let len = found.map(<[u8]>::len);
        let same = |kept: &&KernelTypes| (kept.resets, kept.found) == (resets, len);
        if let Some(kept) = kept.as_ref().filter(same) {
            return Ok(kept.types.clone());
        }
        *kept = None;
        let types = match found.map(|bytes| Btf::parse(bytes, None)) {
            Some(Ok(types)) => types,
            _ => Btf::parse(&agent.read_file("/sys/kernel/btf/vmlinux")?, None)?,
        };
        let types = Arc::new(types);
        *kept = Some(KernelTypes {
            resets,
            found: len,
            types: types.clone(),
        });
        Ok(types)
    }
}

/// All symbols of the guest.
fn guest_symbols(agent: &mut Client, kernel: Option<&TableSymbols>) -> anyhow::Result<SymbolTable> {
    let mut table = SymbolTableBuilder::default();
    let is_known = kernel.is_some();
    for symbol in kernel.into_iter().flat_map(TableSymbols::iter) {
        table.add(&symbol)?;
    }
    let filter = SymbolFilter {
        of_modules: is_known,
        ..SymbolFilter::default()
    };
    for symbol in agent.symbols(filter)? {
        if is_known && symbol.module.is_none() {
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

/// Types of `module`, with those of the kernel.
fn module_types(agent: &mut Client, module: &str, kernel: Arc<Btf>) -> anyhow::Result<Arc<Btf>> {
    let own = agent.read_file(&format!("/sys/kernel/btf/{module}"))?;
    Ok(Arc::new(Btf::parse(&own, Some(kernel))?))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change under these locks is whole when it can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
