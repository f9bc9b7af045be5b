//! P's control registers, as far as calls could change them, and its segments.

use kvm_bindings::{kvm_segment, kvm_sregs};

use crate::domain::monitor::{KERNEL_CS, KERNEL_DS};

/// What no call has to change: of control registers, segments and descriptor tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    cr0: u64,
    cr4: u64,
    efer: u64,
    gs_base: u64,
    idt_base: u64,
}

impl Kept {
    pub(super) fn of(sregs: &kvm_sregs) -> Self {
        Self {
            cr0: sregs.cr0,
            cr4: sregs.cr4,
            efer: sregs.efer,
            gs_base: sregs.gs.base,
            idt_base: sregs.idt.base,
        }
    }
}

/// Registers that tell what became of P at an unusual exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultRegisters {
    /// Address of the last page fault.
    pub cr2: u64,
    /// Root of the page tables.
    pub cr3: u64,
    /// What is as [`PrivateVm::adopt`] has set it.
    pub kept: Kept,
}

/// The kernel's code, flat, for 64-bit mode.
pub(super) fn code_segment() -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector: KERNEL_CS,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    }
}

/// The kernel's data, flat.
pub(super) fn data_segment() -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector: KERNEL_DS,
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    }
}
