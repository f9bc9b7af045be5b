//! How failed calls of a module come to their end: the kernel functions that take them back, and
//! the decision what their callers see.

use std::time::Instant;

use devices::dma::GuestMemory;
use devices::hold::OutsideChanges;
use kvm_bindings::kvm_regs;
use vm_memory::Bytes;

use crate::compensation::guest_calls::{Failure, GuestCalls, write_stack};
use crate::dispatch::after_fault::{AfterFault, FailedCall};
use crate::dispatch::armed::{Armed, AtGate, RETURN_GATE_OFFSET, may_be_taken_back};
use crate::dispatch::failures::Again;
use crate::domain::journal::{Published, Stays};
use crate::domain::list_links::{self, ChangedLinks};
use crate::domain::transaction::DeviceStore;
use crate::domain::violation::ViolationKind;
use crate::guest::addr::Gva;
use crate::guest::paging::VirtMemory;
use crate::policy::abort_value::AbortValue;
use crate::status::report::Told;

impl Armed {
    /// Goes on with kernel functions that the guest calls, one of which has returned.
    pub(crate) fn run_guest_calls(&mut self, mut calling: GuestCalls, at: &AtGate<'_>) -> kvm_regs {
        let memory = self.domain.memories().1;
        let virt = VirtMemory {
            space: self.space(&at.sregs),
            memory: &memory,
        };
        if let Some(next) = calling.unheard(self.open.call_loop, virt) {
            self.open.loop_stays = true;
            return next;
        }
        if let Some(next) = calling.next(
            calling.gate + RETURN_GATE_OFFSET,
            self.guest.effects.as_ref(),
            self.open.call_loop,
            &self.open.stopwatches,
            virt,
        ) {
            self.open.spilled.remove(&calling.returns_with());
            self.open
                .guest_calls
                .insert(calling.returns_with(), calling);
            return next;
        }
        self.perform_later(&calling.take_later());
        if let Some(mut failure) = calling.failure.take() {
            let entry = failure.entry;
            if calling.has_called() {
                let now = Instant::now();
                let took = now.duration_since(failure.ended).as_nanos();
                failure.failed.phases.compensate_ns = u64::try_from(took).unwrap_or(u64::MAX);
                failure.ended = now;
            }
            if calling.abandoned() > 0 {
                self.stays(&mut failure, Stays::StackGone);
            } else if let Err(links) = put_lists_back(&failure.lists, virt) {
                self.stays(&mut failure, Stays::List { links });
            }
            let undone = !failure.failed.violation.stays();
            self.failed(calling.gate, failure);
            if self.failures.again.is_some() {
                write_stack(virt, entry.rsp, calling.finally.rip);
            } else if undone {
                return self.complete(calling.gate, &entry, calling.finally, at);
            }
        }
        calling.finally
    }

    /// Performs stores to the device that waited for what the guest has done by now.
    pub(crate) fn perform_later(&self, stores: &[DeviceStore]) {
        let device = self.device.holdable.as_ref();
        // The device of a driver that was stopped meanwhile is silent.
        let Some(device) = device.filter(|_| !stores.is_empty() && !self.stopped) else {
            return;
        };
        let held = device.hold(&mut |held| {
            for store in stores {
                let bytes = store.bytes.min(size_of_val(&store.value));
                held.write(store.at, &store.value.to_le_bytes()[..bytes]);
            }
        });
        if let Err(lost) = held {
            tracing::error!("stores to the device that waited are lost: {lost}");
        }
    }

    /// Gives up calls that are being taken back by a kernel function that does not return.
    pub(crate) fn give_up_hanging(&mut self) {
        if self.open.guest_calls.is_empty() {
            return self.let_device_go();
        }
        let memory = self.domain.memories().1;
        let failed = self
            .open
            .guest_calls
            .iter()
            .filter(|(_, calling)| calling.failure.is_some());
        let hanging = failed.filter_map(|(rsp, calling)| Some((*rsp, calling.hangs(&memory)?)));
        let hanging: Vec<(u64, u64)> = hanging.collect();
        for (rsp, function) in hanging {
            let Some(calling) = self.open.guest_calls.get_mut(&rsp) else {
                continue;
            };
            let gate = calling.gate;
            let Some(mut failure) = calling.failure.take() else {
                continue;
            };
            self.stays(&mut failure, Stays::Hangs { function });
            self.failed(gate, failure);
            // There is no caller to decide about.
            self.failures.again = None;
            self.failures.nobody_runs_again();
        }
        self.let_device_go();
    }

    /// Something of a failed call could not be taken back.
    fn stays(&self, failure: &mut Failure, stays: Stays) {
        failure.failed.stays = Some(self.guest.knowledge.why_it_stays(&stays));
        failure.failed.violation.published = Some(Published::Stays(stays));
    }

    /// Lets the device interrupt again once no call is being taken back any more: until then its
    /// driver's objects are not all as the device and the driver's memory are. And shows its link
    /// once no call can be taken back.
    pub(crate) fn let_device_go(&mut self) {
        let taking_back = self
            .open
            .guest_calls
            .values()
            .any(|calling| calling.failure.is_some());
        let interrupt = self.device.withholding && !taking_back;
        let link = self.device.outside_kept && !may_be_taken_back(&self.open.spilled);
        if !interrupt && !link {
            return;
        }
        self.device.withholding &= !interrupt;
        self.device.outside_kept &= !link;
        if let Some(device) = &self.device.holdable {
            let held = device.hold(&mut |held| {
                if interrupt {
                    held.withhold_interrupts(false);
                }
                if link {
                    held.show_outside(OutsideChanges::Shown);
                }
            });
            if let Err(lost) = held {
                tracing::error!("the device does not go on as before: {lost}");
            }
        }
    }

    /// Asks what becomes of a call that failed, which is told of when its caller runs again.
    pub(crate) fn failed(&mut self, gate: u64, failure: Failure) {
        let Failure {
            mut failed,
            attempt,
            entry,
            ended,
            unheard,
            lists: _,
        } = failure;
        let known = self.gates.get_mut(&gate);
        let (returns_nothing, in_a_row) = known.map_or((false, false), |gate| {
            let in_a_row = std::mem::replace(&mut gate.failed_last, true);
            (gate.aborted.value == AbortValue::Nothing, in_a_row)
        });
        let mut decided = self.failures.policy.after_fault(&FailedCall {
            entry: &failed.entry,
            violation: &failed.violation,
            device_lost: failed.device_lost.is_some(),
            attempts: attempt.number,
            unheard: unheard || returns_nothing,
            out_of_time: failed.violation.kind == ViolationKind::TimeBudget,
            in_a_row,
        });
        // What is in the guest of it would be done twice, and a device that was lost is not as
        // before. Without a domain there is nowhere to run it.
        let domain_failed = failed.violation.kind == ViolationKind::DomainFailed;
        let undone = !failed.violation.stays() && failed.device_lost.is_none() && !domain_failed;
        if !undone && decided == AfterFault::Retry {
            decided = AfterFault::ReturnError;
        }
        if let Some(gate) = self.gates.get_mut(&gate) {
            gate.entry.count_failure(&failed.violation, &failed.phases);
            gate.entry.retries += u64::from(decided == AfterFault::Retry);
        }
        failed.told = match decided {
            AfterFault::Retry => Told::RunAgain,
            _ if domain_failed => Told::GuestRuns,
            _ if returns_nothing => Told::Nothing,
            _ => Told::Error,
        };
        self.failures.again = (decided == AfterFault::Retry).then_some(Again {
            gate,
            attempt: attempt.next(),
            entry,
        });
        match decided {
            AfterFault::Rest => self.rest(gate),
            AfterFault::Stop => self.stop(),
            AfterFault::ReturnError | AfterFault::Retry => {}
        }
        self.failures.add(failed, ended);
    }
}

/// Puts lists back that a failed call had changed and that nothing has put right since. The error
/// is where one is that cannot be.
fn put_lists_back(changes: &[ChangedLinks], virt: VirtMemory<'_, GuestMemory>) -> Result<(), u64> {
    let place = |va: u64| virt.space.walk(virt.memory, Gva(va)).ok();
    let read = |va: u64| match va.is_multiple_of(8) {
        true => virt.memory.read_obj::<u64>(place(va)?.gpa).ok(),
        false => None,
    };
    for (va, value) in list_links::put_back(changes, read)? {
        let stored = place(va).map(|at| virt.memory.write_obj(value, at.gpa));
        if !matches!(stored, Some(Ok(()))) {
            return Err(va);
        }
    }
    Ok(())
}
