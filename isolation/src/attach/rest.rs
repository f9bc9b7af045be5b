//! The isolator comes to rest with its machine: state can be taken only while no isolated call is
//! open.
//!
//! A call that ran to its end between its gate and the guest's next instruction is never seen open:
//! its vCPU was not at rest. One that went on in the guest is, with its journal in this process; it
//! ends by itself when the guest goes on, and so do kernel functions that the guest runs for calls
//! that have ended. Only a rewind does not wait for them: the guest that they are open in is gone
//! afterwards, and a call that never ends must not keep it.

use std::sync::{MutexGuard, TryLockError};

use std::collections::HashMap;

use devices::dma::GuestMemory;
use vmm::{Kept, Participant, PausedVcpus, RestFor, Unsettled};

use super::Isolator;
use crate::dispatch::armed::Armed;
use crate::guest::paging::VirtMemory;

impl Participant for Isolator {
    fn name(&self) -> String {
        "isolation".to_owned()
    }

    fn settle(&self, rest: RestFor, vcpus: &mut PausedVcpus<'_>) -> Result<(), Unsettled> {
        let mut modules = self.modules_at_once()?;
        match self.suspending.try_lock() {
            Ok(suspending) if suspending.is_none() => {}
            _ => return soon("functions of a driver are being called in the guest".to_owned()),
        }
        if rest == RestFor::Rewind {
            return Ok(());
        }
        for (name, armed) in modules.iter() {
            let (open, calling) = (armed.open.spilled.len(), armed.open.guest_calls.len());
            if open > 0 {
                return soon(format!("{open} calls of `{name}` are open in the guest"));
            }
            if calling > 0 {
                return soon(format!(
                    "the guest runs kernel functions for {calling} ended calls of `{name}`"
                ));
            }
        }
        let memory = self.vm.ram().memory();
        let mut all = modules.values_mut();
        all.try_for_each(|armed| armed.leave_no_traces(vcpus, memory))
    }

    /// Nothing was stopped: calls begin at gates, and no vCPU reaches one while the machine is at
    /// rest.
    fn go_on(&self) {}

    fn keep(&self) -> Result<Kept, Unsettled> {
        Ok(self.keep_modules())
    }

    fn put_back(&self, kept: &Kept) -> Result<(), String> {
        self.put_modules_back(kept)
    }
}

fn soon<T>(reason: String) -> Result<T, Unsettled> {
    Err(Unsettled { reason, soon: true })
}

impl Isolator {
    /// The isolated modules, unless somebody else has them, who may be waiting for the machine.
    fn modules_at_once(&self) -> Result<MutexGuard<'_, HashMap<String, Armed>>, Unsettled> {
        match self.modules.try_lock() {
            Ok(modules) => Ok(modules),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => soon("what is isolated is being changed".to_owned()),
        }
    }
}

impl Armed {
    /// Ends what open calls have left behind that waits for the next call to be ended: queues that
    /// keep packets out, threads at return gates.
    fn leave_no_traces(
        &mut self,
        vcpus: &mut PausedVcpus<'_>,
        memory: &GuestMemory,
    ) -> Result<(), Unsettled> {
        self.let_device_go();
        self.guard();
        if self.open.returning.is_empty() && self.packets.queues.is_empty() {
            return Ok(());
        }
        let Ok((_, space)) = self.kernel_tables(vcpus, memory) else {
            return soon("no vCPU has the kernel's page tables loaded".to_owned());
        };
        let virt = VirtMemory { space, memory };
        self.packets.queues.give_up(virt);
        let returning = std::mem::take(&mut self.open.returning);
        for thread in &returning {
            thread.turn_interrupted(virt);
        }
        crate::dispatch::returning::turn_vcpus(&returning, vcpus);
        Ok(())
    }
}
