//! What becomes of a vCPU at a gate of a module: its call enters, comes back, or is called back,
//! again while it is to be retried.

use kvm_bindings::kvm_regs;

use crate::dispatch::armed::{Armed, AtGate};
use crate::domain::attempt::Attempt;
use crate::guest::gate::OUT_BYTES;

/// Which half of which gate a vCPU stands at.
#[derive(Clone, Copy)]
pub(crate) struct Standing {
    /// Address of the `out`.
    pub at: u64,
    /// It is the second half: a kernel function has returned there.
    pub returning: bool,
}

impl Armed {
    /// Whether a vCPU that stands there with this stack pointer is at a gate of this module.
    pub(crate) fn owns(&self, standing: Standing, rsp: u64) -> bool {
        if !standing.returning {
            return self.gates.contains_key(&standing.at);
        }
        let open = self.open.spilled.get(&rsp).map(|open| open.gate);
        let calling = self.open.guest_calls.get(&rsp).map(|calling| calling.gate);
        open.or(calling)
            .is_some_and(|open| open + OUT_BYTES == standing.at)
    }

    /// A call enters, comes back from the guest, or a kernel function that is called for one has
    /// returned; what the vCPU goes on with.
    pub(crate) fn serve(&mut self, standing: Standing, at: &mut AtGate<'_>) -> kvm_regs {
        self.give_up_hanging();
        // A call that once had this stack and enters anew never came back.
        let open = self.open.spilled.remove(&at.regs.rsp);
        let calling = self.open.guest_calls.remove(&at.regs.rsp);
        let mut next = match (open, calling) {
            (Some(open), _) if standing.returning => self.go_on(open, at),
            (None, Some(calling)) if standing.returning => self.run_guest_calls(calling, at),
            _ => self.call(standing.at, Attempt::FIRST, at),
        };
        while let Some(again) = self.failures.again.take() {
            at.regs = again.entry;
            next = self.call(again.gate, again.attempt, at);
        }
        self.let_device_go();
        self.guard();
        next
    }
}
