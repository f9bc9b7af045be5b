//! State of a machine as one value: taken between two instructions, put back into the same machine (a reset
//! puts back what was there after power-on) or into another one that is made alike.
//!
//! What is in it: vCPUs with their CPUID, registers, local APICs, MSRs, pending events; TSC and KVM's clock;
//! interrupt controllers, timer, routes of messages; power and hot-plug registers, the address register of
//! PCI's configuration mechanism. What is not: guest memory, and what is plugged in (devices save themselves;
//! they also drive their interrupt lines anew).
//!
//! ```text
//!  put back:  TSCs ─► each vCPU: CPUID, special registers, XSAVE, local APIC, MSRs (deadline last), events
//!                  ─► interrupt controllers, timer ─► routes ─► fixed devices ─► KVM's clock
//! ```
//!
//! TSCs come first because a deadline is armed against the TSC; interrupt controllers come behind the local
//! APICs because setting them delivers what is pending; the clock is last so that it has not gone on meanwhile.
//!
//! As bytes, a state has a head of 20 bytes: magic, version, length and CRC-32 of the rest, which is `postcard`'s
//! encoding. Bytes are not trusted: what is no state of this version, is cut, changed, or not as it would
//! be written, is refused; what KVM refuses is an error, too.

pub(crate) mod chips;
pub(crate) mod time;
pub(crate) mod vcpu;

use std::sync::MutexGuard;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::error::{Error, STATE_VERSION, StateError};
use crate::irq::Route;
use crate::machine::Machine;
use crate::power::PowerState;
use crate::{MAX_VCPUS, hotplug::HotplugState};

use self::chips::ChipState;
use self::time::TimeState;
use self::vcpu::{MAX_MSRS, VcpuState};

/// First bytes of a state.
const MAGIC: [u8; 8] = *b"COFFMACH";
/// Magic, version, length, CRC-32.
const HEAD_BYTES: usize = 20;
/// Longest state that is looked at: eight vCPUs have some 10 KiB each.
const MAX_BYTES: usize = 1 << 20;

/// State of a machine; see the module's text.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) time: TimeState,
    pub(crate) chips: ChipState,
    pub(crate) routes: Vec<Route>,
    pub(crate) power: PowerState,
    pub(crate) hotplug: HotplugState,
    pub(crate) pci_config_address: u32,
}

/// What a state is put back for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Restore {
    /// The machine begins again: time goes on, CPUID is as it was, devices were reset and routed by themselves.
    Reset,
    /// The machine goes on where another one was: everything.
    GoOn,
    /// The machine goes on where it was itself: its vCPUs have run with this CPUID and this frequency.
    Back,
}

impl MachineState {
    /// Takes the state of `machine`, whose vCPUs are out of the guest with their exits completed.
    pub(crate) fn save(machine: &Machine, vcpus: &[MutexGuard<'_, VcpuFd>]) -> Result<Self, Error> {
        let msrs = machine
            .kvm
            .get_msr_index_list()
            .map_err(Error::kvm("list MSRs"))?;
        // The clock first: it runs.
        let time = TimeState::save(&machine.vm, vcpus)?;
        Ok(Self {
            memory_bytes: machine.ram.size_bytes(),
            vcpus: vcpus
                .iter()
                .map(|vcpu| VcpuState::save(&machine.kvm, vcpu, &msrs))
                .collect::<Result<_, _>>()?,
            time,
            chips: ChipState::save(&machine.vm)?,
            routes: machine.routing.save(),
            power: machine.power.save(),
            hotplug: machine.hotplug.save(),
            pci_config_address: machine.pci.config_address(),
        })
    }

    /// Puts the state into `machine`, whose vCPUs are out of the guest.
    pub(crate) fn restore(
        &self,
        machine: &Machine,
        vcpus: &[MutexGuard<'_, VcpuFd>],
        how: Restore,
    ) -> Result<(), Error> {
        self.fits(machine)?;
        if how == Restore::GoOn {
            self.time.restore_frequency(vcpus)?;
        }
        if how != Restore::Reset {
            self.time.restore_tscs(vcpus)?;
        }
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            if how == Restore::GoOn {
                state.restore_cpuid(vcpu)?;
            }
            state.restore(vcpu)?;
        }
        self.chips.restore(&machine.vm)?;
        if how != Restore::Reset {
            machine.routing.restore(&self.routes)?;
        }
        machine.power.restore(self.power);
        machine.hotplug.restore(self.hotplug);
        machine.pci.set_config_address(self.pci_config_address);
        if how != Restore::Reset {
            self.time.restore_clock(&machine.vm)?;
            for vcpu in vcpus {
                // The guest was stopped; refused where it does not use KVM's clock.
                let _ = vcpu.kvmclock_ctrl();
            }
        }
        Ok(())
    }

    fn fits(&self, machine: &Machine) -> Result<(), StateError> {
        let (found, here) = (self.vcpus.len(), machine.vcpus.len());
        if found != here {
            return Err(StateError::Vcpus { found, here });
        }
        let (found, here) = (self.memory_bytes, machine.ram.size_bytes());
        if found != here {
            return Err(StateError::Memory { found, here });
        }
        Ok(())
    }

    /// The state as bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, StateError> {
        let content =
            postcard::to_stdvec(self).map_err(|_| StateError::Content("it cannot be encoded"))?;
        let mut bytes = Vec::with_capacity(HEAD_BYTES + content.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&STATE_VERSION.to_le_bytes());
        // Far below 4 GiB: eight vCPUs at most.
        bytes.extend_from_slice(&(content.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(&content).to_le_bytes());
        bytes.extend_from_slice(&content);
        Ok(bytes)
    }

    /// The state that [`MachineState::to_bytes`] gave.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let (head, content) = bytes
            .split_first_chunk::<HEAD_BYTES>()
            .ok_or(StateError::NoState)?;
        if head[..8] != MAGIC {
            return Err(StateError::NoState);
        }
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if word(8) != STATE_VERSION {
            return Err(StateError::Version(word(8)));
        }
        let told = u64::from(word(12));
        if told != content.len() as u64 || content.len() > MAX_BYTES {
            return Err(StateError::Length {
                told,
                found: content.len() as u64,
            });
        }
        if word(16) != crc32fast::hash(content) {
            return Err(StateError::Checksum);
        }
        let state: Self = postcard::from_bytes(content)
            .map_err(|_| StateError::Content("it cannot be decoded"))?;
        state.check()?;
        // Numbers can be written in several ways, and structures of KVM's cut short.
        if postcard::to_stdvec(&state).ok().as_deref() != Some(content) {
            return Err(StateError::Content("it is written in another way"));
        }
        Ok(state)
    }

    /// What KVM would not check.
    fn check(&self) -> Result<(), StateError> {
        if !(1..=usize::from(MAX_VCPUS)).contains(&self.vcpus.len()) {
            return Err(StateError::Content("no machine has as many vCPUs"));
        }
        if self.time.vcpu_count() != self.vcpus.len() {
            return Err(StateError::Content("not each vCPU has a TSC"));
        }
        for vcpu in &self.vcpus {
            if vcpu.cpuid.len() > KVM_MAX_CPUID_ENTRIES || vcpu.msr_count() > MAX_MSRS {
                return Err(StateError::Content("too many CPUID leaves or MSRs"));
            }
        }
        self.chips
            .are_ours()
            .then_some(())
            .ok_or(StateError::Content("no such interrupt controllers"))
    }
}

#[cfg(test)]
mod tests;
