//! The trap port: how an upper layer gets control of a vCPU at an instruction of its choice.
//!
//! A two-byte `out imm8, al` to one of [`TRAP_PORTS`] is the cheapest way out of a guest that
//! leaves every register alone. The vCPU thread first completes the instruction, so that registers
//! are those after it (RIP behind the `out`), and then calls the handler on that same thread with
//! the vCPU in its hands. Without a handler a write to these ports does nothing, as to any port
//! that nobody answers at.
//!
//! The ports are free on PCs: chipsets put nothing between the second interrupt controller's ports
//! (0xA0) and the coprocessor's (0xF0) but the second DMA controller (0xC0 to 0xDF), and Linux
//! touches none of 0xE0 to 0xEF except 0xED, and that only with `io_delay=0xed`.

use std::ops::RangeInclusive;

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::{SyncReg, VcpuFd};

/// I/O ports reserved for traps.
pub const TRAP_PORTS: RangeInclusive<u16> = 0xe0..=0xe7;

/// A vCPU that wrote to a trap port.
pub struct TrapContext<'a> {
    /// The vCPU, out of the guest, with the `out` instruction completed.
    pub vcpu: &'a mut VcpuFd,
    /// Number of the vCPU.
    pub index: u8,
    /// Which of [`TRAP_PORTS`] was written.
    pub port: u16,
    /// Byte that was written, that is AL.
    pub value: u8,
}

impl TrapContext<'_> {
    /// General registers behind the `out`, and control registers and segments. They come with the
    /// exit and cost no system call.
    pub fn registers(&self) -> (kvm_regs, kvm_sregs) {
        let registers = self.vcpu.sync_regs();
        (registers.regs, registers.sregs)
    }

    /// Sets the general registers that the vCPU goes on with, at no system call either.
    pub fn set_regs(&mut self, regs: &kvm_regs) {
        self.vcpu.sync_regs_mut().regs = *regs;
        self.vcpu.set_sync_dirty_reg(SyncReg::Register);
    }
}

/// What the machine does after a trap was handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrapOutcome {
    /// The vCPU goes on with the registers it has now.
    Resume,
    /// The machine is reset.
    Reset,
    /// The machine is turned off.
    PowerOff,
}

/// Handles traps. Called on vCPU threads, on several at once if several vCPUs trap.
///
/// A handler may hold the other vCPUs ([`crate::VmHandle::hold_others`]) but must not pause the
/// machine or wait for anything that does: its own vCPU counts as running until it returns.
pub trait TrapHandler: Send + Sync {
    /// Handles one trap.
    fn on_trap(&self, context: &mut TrapContext<'_>) -> TrapOutcome;
}
