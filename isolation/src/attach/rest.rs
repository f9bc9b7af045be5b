//! The isolator comes to rest with its machine: state can be taken only while no isolated call is open.
//!
//! A call that ran to its end between its gate and the guest's next instruction is never seen open: its vCPU was not
//! at rest. One that went on in the guest is, with its journal in this process; it ends by itself when the guest
//! goes on, and so do kernel functions that the guest runs for calls that have ended.

use std::sync::TryLockError;

use vmm::{Participant, PausedVcpus, Unsettled};

use super::Isolator;

impl Participant for Isolator {
    fn name(&self) -> String {
        "isolation".to_owned()
    }

    fn settle(&self, _vcpus: &mut PausedVcpus<'_>) -> Result<(), Unsettled> {
        let soon = |reason: String| Err(Unsettled { reason, soon: true });
        // Whoever holds the lock may be waiting for the machine.
        let modules = match self.modules.try_lock() {
            Ok(modules) => modules,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return soon("what is isolated is being changed".to_owned());
            }
        };
        for (name, armed) in modules.iter() {
            let (open, calling) = (armed.spilled.len(), armed.guest_calls.len());
            if open > 0 {
                return soon(format!("{open} calls of `{name}` are open in the guest"));
            }
            if calling > 0 {
                return soon(format!(
                    "the guest runs kernel functions for {calling} ended calls of `{name}`"
                ));
            }
        }
        match self.suspending.try_lock() {
            Ok(suspending) if suspending.is_none() => Ok(()),
            _ => soon("functions of a driver are being called in the guest".to_owned()),
        }
    }

    /// Nothing was stopped: calls begin at gates, and no vCPU reaches one while the machine is at rest.
    fn go_on(&self) {}
}
