//! Notices that the guest removes a module: a gate on the kernel's own function that frees modules,
//! in place for as long as any module is isolated.

use devices::dma::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::guest::addr::Gva;
use crate::guest::btf::Btf;
use crate::guest::gate::{self, GATE_BYTES};
use crate::guest::gate::{GATE, clear_gate};
use crate::guest::paging::VirtMemory;
use crate::guest::symbols::SymbolTable;
use crate::guest::timers::TimerWheels;

/// The kernel's function that frees a module, with a `struct module *` as its argument
/// (kernel/module/main.c).
const FREE_MODULE: &str = "free_module";
/// Longest name of a module, its end left out (`MODULE_NAME_LEN`, include/linux/module.h).
const MAX_NAME: usize = 56;

/// The gate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RemovalWatch {
    /// Where it is.
    pub gate: u64,
    gpa: u64,
    /// Offset of the name in `struct module`.
    name: u64,
    wheels: Option<TimerWheels>,
}

/// Where the gate will go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PlannedWatch {
    function: Gva,
    name: u64,
    wheels: Option<TimerWheels>,
}

impl RemovalWatch {
    /// Where the gate goes. `None` if the guest's kernel has no such function: then a module that
    /// was removed is noticed when it is isolated again.
    pub fn plan(types: &Btf, symbols: &SymbolTable) -> Option<PlannedWatch> {
        let module = types.find_struct("module")?;
        Some(PlannedWatch {
            name: u64::from(types.find_member(module, "name")?.bit_offset / 8),
            function: symbols.kernel_symbol(FREE_MODULE)?.at,
            wheels: TimerWheels::find(types, symbols),
        })
    }

    /// Puts the gate there. `None` if it cannot be gated.
    pub fn set(planned: PlannedWatch, virt: &VirtMemory<'_, GuestMemory>) -> Option<Self> {
        let PlannedWatch {
            function,
            name,
            wheels,
        } = planned;
        let (gate, gpa) = gate::of_kernel_function(function, virt)?;
        let gates = GATE.bytes();
        virt.memory.write_slice(&gates, GuestAddress(gpa)).ok()?;
        Some(Self {
            gate: gate.0,
            gpa,
            name,
            wheels,
        })
    }

    /// Where the kernel keeps its timers, if that is known.
    pub fn wheels(self) -> Option<TimerWheels> {
        self.wheels
    }

    /// Guest physical address of the gate.
    pub fn gpa(self) -> u64 {
        self.gpa
    }

    /// Takes the gate out.
    pub fn clear(self, memory: &GuestMemory) {
        clear_gate(memory, self.gpa);
    }

    /// Where the function goes on behind the gate.
    pub fn body(self) -> u64 {
        self.gate + GATE_BYTES as u64
    }

    /// Name of the `struct module` at `module`.
    pub fn name(self, virt: &VirtMemory<'_, GuestMemory>, module: u64) -> Option<String> {
        let mut bytes = [0; MAX_NAME];
        let at = Gva(module).checked_add(self.name)?;
        virt.read(at, &mut bytes).ok()?;
        let end = bytes.iter().position(|byte| *byte == 0)?;
        String::from_utf8(bytes[..end].to_vec()).ok()
    }
}
