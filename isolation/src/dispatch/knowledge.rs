//! What is known of the guest for one module.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::attach::kernel_functions;
use crate::dispatch::failed::Failed;
use crate::domain::Domain;
use crate::domain::journal::{Published, Stays};
use crate::domain::transaction::AbortPhases;
use crate::domain::violation::Violation;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::fault_tables::FaultTables;
use crate::guest::modules::ModuleLayout;
use crate::guest::stack::InterruptStack;
use crate::guest::symbols::{KERNEL_IMAGE, MODULES_END, SymbolTable};
use crate::status::report::Told;

/// Addresses below belong to user space.
pub(super) const USER_END: u64 = 0x0000_8000_0000_0000;

/// What is known of the guest for one module, fixed while it is isolated.
pub struct Knowledge {
    pub(crate) symbols: Arc<SymbolTable>,
    module: String,
    text: Vec<GvaRange>,
    data: Vec<GvaRange>,
    pub(super) faults: FaultTables,
    pub(super) interrupt_stack: InterruptStack,
    /// Kernel functions that call those of timers.
    timers: Vec<GvaRange>,
}

impl Knowledge {
    /// Collects what calls will be asked about.
    pub fn new(layout: &ModuleLayout, symbols: Arc<SymbolTable>, faults: FaultTables) -> Self {
        Self {
            module: layout.name.clone(),
            text: layout.text().map(|section| section.range).collect(),
            data: layout.data().map(|section| section.range).collect(),
            interrupt_stack: InterruptStack::new(&symbols),
            timers: kernel_functions::runs_timers(&symbols),
            symbols,
            faults,
        }
    }

    /// The module's text, and all else that it has in memory.
    pub fn ranges(&self) -> (&[GvaRange], &[GvaRange]) {
        (&self.text, &self.data)
    }

    /// Whether what returns to `caller` was called by the kernel for a timer.
    pub(super) fn runs_timers(&self, caller: Gva) -> bool {
        self.timers.iter().any(|function| function.contains(caller))
    }

    /// Whether a function begins at `va` that is the module's own, or anybody else's.
    pub(super) fn is_function(&self, va: u64, own: bool) -> bool {
        let mut there = self.symbols.at(Gva(va));
        there.any(|symbol| symbol.is_code() && (symbol.module == Some(self.module.as_str())) == own)
    }

    /// Address of a function of the module.
    pub fn driver_function(&self, name: &str) -> Option<u64> {
        let mut found = self
            .symbols
            .named(name)
            .filter(|symbol| symbol.is_code() && symbol.module == Some(self.module.as_str()));
        found.next().map(|symbol| symbol.at.0)
    }

    /// Whether the `bytes` bytes at `va` are the module's text.
    pub fn in_text(&self, va: u64, bytes: u64) -> bool {
        GvaRange::new(Gva(va), bytes)
            .is_some_and(|range| self.text.iter().any(|t| t.covers(&range)))
    }

    /// Bytes from `start`, a function of the module, to the next symbol or the end of its section.
    pub fn extent(&self, start: u64) -> u64 {
        let within = self.text.iter().find(|range| range.contains(Gva(start)));
        let extent = within.and_then(|range| self.symbols.extent(Gva(start), *range));
        extent.map_or(0, |range| range.len_bytes())
    }

    /// All names of each of the functions that begin at `targets`, each function once.
    pub fn names_of(&self, targets: impl Iterator<Item = Gva>) -> Vec<Vec<String>> {
        let targets: BTreeSet<u64> = targets.map(|target| target.0).collect();
        let names = |va: u64| -> Vec<String> {
            let code = self.symbols.at(Gva(va)).filter(|symbol| symbol.is_code());
            code.map(|symbol| symbol.name.to_owned()).collect()
        };
        targets.into_iter().map(names).collect()
    }

    /// Name of the function that begins at `va`.
    pub fn function_name(&self, va: u64) -> String {
        let symbol = self.symbols.at(Gva(va)).find(|symbol| symbol.is_code());
        symbol.map_or_else(|| format!("{va:#x}"), |symbol| symbol.name.to_owned())
    }

    /// Why a part of a failed call stays in the guest, for people.
    pub fn why_it_stays(&self, stays: &Stays) -> String {
        let named = |function: &u64| self.function_name(*function);
        match stays {
            Stays::NoModel => "nothing is known of the kernel's functions".to_owned(),
            Stays::TooMuchMemory => "it changed more memory than can be put back".to_owned(),
            Stays::TooManyCalls => "it called more kernel functions than can be undone".to_owned(),
            Stays::Irrevocable { function } => {
                format!("nothing takes {} back", named(function))
            }
            Stays::Unknown { function } => format!(
                "{} is not in the model of kernel functions",
                named(function)
            ),
            Stays::KernelFunctionOpen => {
                "a kernel function that had called the driver back was under way".to_owned()
            }
            Stays::Device { reason } => format!("the device cannot be put back: {reason}"),
            Stays::Hangs { function } => format!(
                "{}, called to take it back, does not return",
                named(function)
            ),
            Stays::List { links } => {
                format!("it changed a list at {links:#x} that is not as it left it any more")
            }
            Stays::StackGone => {
                "the stack that it was to be taken back on is not there any more".to_owned()
            }
        }
    }

    /// What there is to say of a violation of a call of `entry`.
    pub fn failed(&self, entry: &str, violation: Violation, domain: &Domain) -> Failed {
        let touched = violation.touched();
        let touched = touched.and_then(|address| self.symbols.name_of(address));
        let stays = match &violation.published {
            Some(Published::Stays(stays)) => Some(self.why_it_stays(stays)),
            _ => None,
        };
        Failed {
            stays,
            entry: entry.to_owned(),
            instruction: domain.instruction(violation.rip),
            touched,
            violation,
            at_ns: 0,
            phases: AbortPhases::default(),
            device_lost: None,
            image: None,
            told: Told::Error,
        }
    }

    /// Whether the driver may write at `va`. Memory that is not the kernel image's or a module's
    /// (heap, stacks, per-CPU data) is not told apart.
    pub(super) fn writable(&self, va: u64) -> bool {
        if (KERNEL_IMAGE..MODULES_END).contains(&va) {
            return self
                .data
                .iter()
                .any(|range| range.to_pages().contains(Gva(va)));
        }
        va >= USER_END
    }

    pub(super) fn changeable(&self, va: u64, bytes: u64) -> bool {
        if (KERNEL_IMAGE..MODULES_END).contains(&va) {
            return GvaRange::new(Gva(va), bytes)
                .is_some_and(|range| self.data.iter().any(|data| data.covers(&range)));
        }
        va >= USER_END
    }
}
