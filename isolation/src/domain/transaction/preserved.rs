//! What a function of the driver has to leave as it was.

use kvm_bindings::kvm_regs;

use crate::domain::violation::ViolationKind;

/// RFLAGS: direction, I/O privilege level, nested task, alignment check.
const SYSTEM_FLAGS: u64 = 1 << 10 | 3 << 12 | 1 << 14 | 1 << 18;

/// Registers that a function leaves as they are (System V ABI, section 3.2.1), the stack pointer
/// and RFLAGS.IF left aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Preserved {
    registers: [u64; 6],
    flags: u64,
}

impl Preserved {
    pub(super) fn of(regs: &kvm_regs) -> Self {
        Self {
            registers: [regs.rbx, regs.rbp, regs.r12, regs.r13, regs.r14, regs.r15],
            flags: regs.rflags & SYSTEM_FLAGS,
        }
    }

    /// What of these is not as it was.
    pub(super) fn changed(&self, regs: &kvm_regs) -> Option<ViolationKind> {
        let now = Self::of(regs);
        if now.flags != self.flags {
            return Some(ViolationKind::SystemFlags {
                changed: now.flags ^ self.flags,
            });
        }
        (now.registers != self.registers).then_some(ViolationKind::CalleeSavedRegister)
    }
}
