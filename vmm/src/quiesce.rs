//! Bringing a machine to rest: guest code out, instructions complete, devices still, nothing open
//! in what works beside it.
//!
//! ```text
//!  running ─► vCPUs to the gate, devices held ─► exits completed? ─► each participant: settle ─► at rest: look, save
//!     ▲                                  │ no, or "soon"            │ refused                     │
//!     └──────────────────────────────────┴─ let them go on ◄────────┴──► error with the reason    └─► go on
//! ```
//!
//! A participant is what has business with the guest that must be finished before state is taken: a
//! device with requests under way, a layer with calls of the guest open.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use devices::pci::bus::PciBus;

use crate::error::Error;
use crate::handle::VmHandle;
use crate::machine::{Machine, Operations, Phase};
use crate::memory::GuestRam;
use crate::participant::{Participant, RestFor, Unsettled};
use crate::paused::PausedVcpus;
use crate::refused::{QuiesceError, Refused};
use crate::state::devices::DeviceStates;
use crate::state::{MachineState, Restore};

/// Between two attempts: the guest goes on meanwhile.
const AGAIN_AFTER: Duration = Duration::from_millis(1);

impl VmHandle {
    /// Has `participant` settle whenever the machine is brought to rest, after those that were
    /// added before.
    pub fn add_participant(&self, participant: Arc<dyn Participant>) {
        self.machine().participants().push(participant);
    }

    /// Forgets `participant`.
    pub fn remove_participant(&self, participant: &Arc<dyn Participant>) {
        self.machine()
            .participants()
            .retain(|known| !Arc::ptr_eq(known, participant));
    }

    /// Calls `look` with the machine at rest. What is open and ends by itself is waited for until
    /// `limit` is over, during which the guest goes on from time to time; a machine that is paused
    /// cannot wait. It goes on afterwards if it was running. As [`VmHandle::with_paused`], not to
    /// be called with a device locked, nor by the event loop.
    pub fn quiesce<R>(
        &self,
        limit: Duration,
        look: impl FnOnce(&mut Quiesced<'_, '_>) -> R,
    ) -> Result<R, QuiesceError> {
        self.quiesce_mixed(RestFor::State, limit, |quiesced| {
            match quiesced.operations.mixed {
                true => Err(Refused::HalfRewound.into()),
                false => Ok(look(quiesced)),
            }
        })?
    }

    /// The same for a machine that may be in a mixed state.
    pub(crate) fn quiesce_mixed<R>(
        &self,
        rest: RestFor,
        limit: Duration,
        look: impl FnOnce(&mut Quiesced<'_, '_>) -> R,
    ) -> Result<R, QuiesceError> {
        let mut look = Some(look);
        let start = Instant::now();
        loop {
            let attempt = self.at_gate(|operations, vcpus| {
                let is_started = operations.phase == Phase::Started;
                if rest == RestFor::State && is_started && self.machine().requests.are_open() {
                    return Err(None);
                }
                let _devices_rest = self.machine().at_work.lock();
                let settled = settle(self.machine(), rest, vcpus).map_err(Some)?;
                let mut quiesced = Quiesced {
                    machine: self.machine(),
                    operations,
                    vcpus,
                };
                let result = look.take().map(|look| look(&mut quiesced));
                drop(settled);
                Ok(result)
            })?;
            match attempt {
                Ok(Some(result)) => return Ok(result),
                // Only a look that was made takes it.
                Ok(None) => return Err(Refused::Stopped.into()),
                // The guest has asked for its end and stands behind that: who took its state now
                // would have one that waits for ever. The main loop does it, also while paused.
                Err(None) if start.elapsed() < limit => {}
                Err(None) => {
                    return Err(QuiesceError::Unsettled {
                        who: "the machine".to_owned(),
                        reason: "it is being reset or turned off".to_owned(),
                    });
                }
                Err(Some((who, Unsettled { reason, soon }))) => {
                    let paused = self.machine().operations().paused;
                    if soon && paused {
                        // It would end if the guest went on.
                        let reason =
                            format!("{reason}, and the machine is paused: resume it first");
                        return Err(QuiesceError::Unsettled { who, reason });
                    }
                    if !soon || start.elapsed() >= limit {
                        return Err(QuiesceError::Unsettled { who, reason });
                    }
                }
            }
            std::thread::sleep(AGAIN_AFTER);
        }
    }
}

/// Participants that have settled; they go on when this is dropped, in reverse order.
struct Settled(Vec<Arc<dyn Participant>>);

impl Drop for Settled {
    fn drop(&mut self) {
        for participant in self.0.iter().rev() {
            participant.go_on();
        }
    }
}

/// Has everybody settle; gives who did not and why.
fn settle(
    machine: &Machine,
    rest: RestFor,
    vcpus: &mut PausedVcpus<'_>,
) -> Result<Settled, (String, Unsettled)> {
    if let Some(index) = machine
        .vcpus
        .iter()
        .position(|vcpu| vcpu.incomplete.load(Ordering::Acquire))
    {
        let unsettled = Unsettled {
            reason: "it is in the middle of a string instruction".to_owned(),
            soon: true,
        };
        return Err((format!("vCPU {index}"), unsettled));
    }
    let participants = machine.participants().clone();
    let mut settled = Settled(Vec::with_capacity(participants.len()));
    for participant in participants {
        match participant.settle(rest, vcpus) {
            Ok(()) => settled.0.push(participant),
            Err(unsettled) => return Err((participant.name(), unsettled)),
        }
    }
    Ok(settled)
}

/// A machine at rest, see [`VmHandle::quiesce`].
pub struct Quiesced<'a, 'v> {
    pub(crate) machine: &'a Arc<Machine>,
    operations: &'a mut Operations,
    pub(crate) vcpus: &'a mut PausedVcpus<'v>,
}

impl<'v> Quiesced<'_, 'v> {
    /// The vCPUs.
    pub fn vcpus(&mut self) -> &mut PausedVcpus<'v> {
        self.vcpus
    }

    /// Has the guest stay where it is when the machine's rest is over, until this is dropped.
    pub fn stay(&mut self) -> Stay {
        self.machine.gate.inhibit();
        Stay(self.machine.clone())
    }

    /// That the machine was started: what it begins with is put there when it is.
    pub(crate) fn is_started(&self) -> Result<(), Refused> {
        match self.operations.phase {
            Phase::Created => Err(Refused::NotStarted),
            Phase::Started | Phase::Stopped => Ok(()),
        }
    }

    /// Says whether the machine is between two states. One that is stays paused and does not go on,
    /// until a reset, if it was running.
    pub(crate) fn set_mixed(&mut self, mixed: bool) {
        self.operations.mixed = mixed;
        if !mixed {
            self.operations.paused_by_mix = false;
        } else if !std::mem::replace(&mut self.operations.paused, true) {
            self.operations.paused_by_mix = true;
            self.machine.gate.inhibit();
        }
    }

    /// State of the machine, its memory and its devices apart.
    pub fn save(&mut self) -> Result<MachineState, Error> {
        MachineState::save(self.machine, self.vcpus.fds())
    }

    /// Puts a state of this machine back, its memory and its devices on PCI apart. After an error
    /// the machine is in neither state.
    pub fn restore(&mut self, state: &MachineState) -> Result<(), Error> {
        state.restore(self.machine, self.vcpus.fds(), Restore::Back)
    }

    /// Guest memory.
    pub fn ram(&self) -> &GuestRam {
        &self.machine.ram
    }

    /// The PCI bus.
    pub fn pci_bus(&self) -> &PciBus {
        &self.machine.pci
    }

    /// States of the devices. Not to be called with a device locked.
    ///
    /// # Errors
    /// One does not give its state away.
    pub fn save_devices(&self) -> Result<DeviceStates, Error> {
        DeviceStates::save(self.machine)
    }

    /// Puts back the states of the devices, when the machine's own state was put back. Not to be
    /// called with a device locked.
    ///
    /// # Errors
    /// Devices came or went since. After any other error the machine has to be reset.
    pub fn restore_devices(&self, states: &DeviceStates) -> Result<(), Error> {
        states.restore(self.machine)
    }
}

/// Keeps the vCPUs out of the guest, see [`Quiesced::stay`].
pub struct Stay(Arc<Machine>);

impl Drop for Stay {
    fn drop(&mut self) {
        self.0.gate.release();
    }
}
