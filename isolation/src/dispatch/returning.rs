//! Threads that have just returned to a return gate whose call the guest gets back for good.
//!
//! ```text
//!   kernel function: ret ─► return gate: out ...
//!                          ▲ here the return address is off the stack, where it would have been replaced
//! ```
//!
//! Such a thread is a vCPU that was stopped right there, or one that took an interrupt there: then
//! the gate's address is in the frame that the processor has pushed. Either goes on where the
//! driver would have gone on.

use devices::dma::GuestMemory;
use kvm_bindings::kvm_regs;
use vmm::PausedVcpus;

use crate::compensation::guest_calls::write_stack;
use crate::guest::addr::Gva;
use crate::guest::paging::VirtMemory;

/// Bytes to which the processor aligns the stack before it pushes a frame (Intel SDM volume 3,
/// section 6.14.2).
const FRAME_ALIGNMENT: u64 = 16;
/// SS, RSP, RFLAGS, CS and RIP, RIP lowest.
const FRAME_BYTES: u64 = 40;
const RSP_OFFSET: usize = 24;

/// A thread that may have come back to a return gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Returning {
    /// Address of the return gate.
    pub gate: u64,
    /// Stack pointer with which the thread is there.
    pub rsp: u64,
    /// Where the driver goes on.
    pub next: u64,
}

/// Has vCPUs that stand at a return gate go on where `threads` say.
pub(crate) fn turn_vcpus(threads: &[Returning], vcpus: &mut PausedVcpus<'_>) {
    for vcpu in vcpus.iter_mut() {
        let regs = vcpu.get_regs().ok();
        let next = regs.and_then(|regs| threads.iter().find_map(|thread| thread.turn(&regs)));
        if let Some(next) = next
            && let Err(error) = vcpu.set_regs(&next)
        {
            tracing::error!("a vCPU at a gate cannot be moved on: {error}");
        }
    }
}

impl Returning {
    /// Registers to go on with, for a vCPU that stands at the gate.
    pub fn turn(&self, regs: &kvm_regs) -> Option<kvm_regs> {
        (regs.rip == self.gate && regs.rsp == self.rsp).then_some(kvm_regs {
            rip: self.next,
            ..*regs
        })
    }

    /// Changes where the thread goes on after an interrupt, if it was interrupted at the gate.
    pub fn turn_interrupted(&self, virt: VirtMemory<'_, GuestMemory>) {
        let at = (self.rsp & !(FRAME_ALIGNMENT - 1)).wrapping_sub(FRAME_BYTES);
        let mut frame = [0; FRAME_BYTES as usize];
        // Whoever has no such stack is not there.
        if virt.read(Gva(at), &mut frame).is_err() {
            return;
        }
        let is = |offset: usize, value: u64| frame[offset..offset + 8] == value.to_le_bytes();
        if is(0, self.gate) && is(RSP_OFFSET, self.rsp) {
            write_stack(virt, at, self.next);
        }
    }
}
