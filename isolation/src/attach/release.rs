//! Giving calls of a module to the guest for good, and taking its gates out.

use std::collections::HashMap;

use devices::dma::GuestMemory;
use kvm_bindings::kvm_regs;

use crate::dispatch::armed::{Armed, OpenCall, RETURN_GATE_OFFSET};
use crate::dispatch::returning::Returning;
use crate::guest::gate::{OUT_BYTES, clear_gate};
use crate::guest::paging::{AddressSpace, VirtMemory};

impl Armed {
    /// Whether calls of the guest's are under way that need this module's gates to come to a good
    /// end.
    pub(crate) fn is_busy(&self) -> bool {
        !self.open.guest_calls.is_empty()
            || self
                .open
                .spilled
                .values()
                .any(|open| open.call.has_deferred())
    }

    /// Takes everything out of the guest: gates, and return gates on stacks. What is returned tells
    /// where vCPUs go on that stand at one of them.
    pub(crate) fn disarm(
        &mut self,
        memory: &GuestMemory,
        space: Option<AddressSpace>,
    ) -> Vec<Returning> {
        for (_, open) in std::mem::take(&mut self.open.spilled) {
            if open.call.has_deferred() {
                tracing::warn!(
                    "a call of the module is given up before it has given everything back"
                );
            }
            let thread = self.hand_over(&open);
            self.open.returning.push(thread);
        }
        let returning = std::mem::take(&mut self.open.returning);
        for thread in &returning {
            if let Some(space) = space {
                thread.turn_interrupted(VirtMemory { space, memory });
            }
        }
        // A thread of theirs may be in the loop.
        let call_loop = self.open.call_loop.take();
        if let Some(call_loop) = call_loop
            && self.open.guest_calls.is_empty()
            && !self.open.loop_stays
        {
            call_loop.remove(memory);
        }
        for (_, mut calling) in std::mem::take(&mut self.open.guest_calls) {
            self.perform_later(&calling.take_later());
            tracing::warn!("a call of the module is given up before all was done for it");
            if let Some(space) = space {
                calling.returns_by_itself(call_loop, VirtMemory { space, memory });
            }
        }
        self.let_device_go();
        if let Some(space) = space {
            self.packets.queues.give_up(VirtMemory { space, memory });
        }
        for gate in self.gates.values() {
            clear_gate(memory, gate.gpa);
        }
        returning
    }

    /// The guest was reset: there are no calls any more, and what was kept from the world for them
    /// is not.
    pub(crate) fn guest_is_gone(&mut self) {
        self.open.spilled.clear();
        self.open.guest_calls.clear();
        self.let_device_go();
    }

    /// Registers to go on with, for a vCPU that has come through a return gate with a call that was
    /// given back to the guest when it was at the gate.
    pub(crate) fn turned(&self, regs: &kvm_regs) -> Option<kvm_regs> {
        let at_gate = kvm_regs {
            rip: regs.rip.wrapping_sub(OUT_BYTES),
            ..*regs
        };
        self.open
            .returning
            .iter()
            .find_map(|thread| thread.turn(&at_gate))
    }

    /// The domain is not used any more: gives all calls that went on in the guest to the guest for
    /// good.
    pub(crate) fn hand_over_all(&mut self) {
        // The others have to come back once more.
        let (back, over): (HashMap<_, _>, HashMap<_, _>) = std::mem::take(&mut self.open.spilled)
            .into_iter()
            .partition(|(_, open)| open.call.has_deferred());
        self.open.spilled = back;
        for open in over.values() {
            let thread = self.hand_over(open);
            self.open.returning.push(thread);
        }
    }

    /// Gives a call to the guest for good.
    pub(crate) fn hand_over(&mut self, open: &OpenCall) -> Returning {
        Returning {
            gate: open.gate + RETURN_GATE_OFFSET,
            rsp: open.call.returns_with(),
            next: self.domain.hand_over(&open.call),
        }
    }
}
