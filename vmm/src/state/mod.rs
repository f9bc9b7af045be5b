//! State of a machine as one value: taken between two instructions, put back into the same machine
//! (a reset puts back what was there after power-on) or into another one that is made alike.
//!
//! What is in it: vCPUs with their CPUID, registers, local APICs, MSRs, pending events; TSC and
//! KVM's clock; interrupt controllers, timer, routes of messages; power and hot-plug registers, the
//! address register of PCI's configuration mechanism. What is not: guest memory, and what is
//! plugged in ([`devices`]; they also drive their interrupt lines anew).
//!
//! ```text
//!  put back:  TSCs ─► each vCPU: CPUID, special registers, XSAVE, local APIC, MSRs (deadline last), events
//!                  ─► interrupt controllers, timer ─► routes ─► fixed devices ─► KVM's clock
//! ```
//!
//! TSCs come first because a deadline is armed against the TSC; interrupt controllers come behind
//! the local APICs because setting them delivers what is pending; the clock is last so that it has
//! not gone on meanwhile.
//!
//! As bytes, a state has magic, version, length and checksum ([`encoding`]). What is no state of
//! this version, or was changed, is refused; what KVM refuses is an error, too.

pub(crate) mod chips;
pub(crate) mod devices;
mod encoding;
pub(crate) mod time;
pub(crate) mod vcpu;

use std::sync::MutexGuard;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::cpu::compatible;
use crate::cpu::leaves::Leaves;
use crate::error::{Error, STATE_VERSION, StateError};
use crate::irq::Route;
use crate::machine::Machine;
use crate::power::PowerState;
use crate::snapshot::CpuModel;
use crate::{MAX_VCPUS, hotplug::HotplugState};

use self::chips::ChipState;
use self::encoding::Encoding;
use self::time::TimeState;
use self::vcpu::{MAX_MSRS, VcpuState};

/// Eight vCPUs have some 10 KiB each.
const ENCODING: Encoding = Encoding {
    magic: *b"COFFMACH",
    version: STATE_VERSION,
    max_bytes: 1 << 20,
    what: "the state of a machine",
};

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
    /// The machine begins again: time goes on, CPUID is as it was, devices were reset and routed by
    /// themselves.
    Reset,
    /// The machine goes on where another one was: everything.
    GoOn,
    /// The machine goes on where it was itself: its vCPUs have run with this CPUID and this
    /// frequency.
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
        // A guest whose TSC goes back with it does not see that it was stopped.
        let stood_still = match how {
            Restore::Reset => true,
            Restore::GoOn => {
                self.time.restore_frequency(vcpus)?;
                self.time.restore_tscs(vcpus)?;
                false
            }
            Restore::Back => self.time.rewind_tscs(vcpus)?,
        };
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            if how == Restore::GoOn {
                state.restore_cpuid(vcpu)?;
            }
            state.restore(vcpu, how)?;
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
        }
        for vcpu in vcpus.iter().filter(|_| !stood_still) {
            // The guest was stopped; refused where it does not use KVM's clock.
            let _ = vcpu.kvmclock_ctrl();
        }
        Ok(())
    }

    /// The processor that the guest was shown, for people.
    pub fn cpu_model(&self) -> CpuModel {
        let leaves = self.leaves();
        CpuModel {
            vendor: compatible::vendor(&leaves),
            brand: compatible::brand(&leaves),
        }
    }

    /// That a guest with this state can go on where `power_on` was taken.
    pub(crate) fn fits_processor_of(&self, power_on: &Self) -> Result<(), StateError> {
        match compatible::missing(&self.leaves(), &power_on.leaves()) {
            Some(missing) => Err(StateError::Processor(missing)),
            None => Ok(()),
        }
    }

    /// CPUID of the first vCPU; the others differ in their place only.
    fn leaves(&self) -> Leaves {
        let first = self.vcpus.first();
        first.map_or_else(Leaves::default, |vcpu| Leaves::from(vcpu.cpuid.as_slice()))
    }

    /// That `machine` is as large.
    pub(crate) fn fits(&self, machine: &Machine) -> Result<(), StateError> {
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
        ENCODING.write(self)
    }

    /// The state that [`MachineState::to_bytes`] gave.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let state: Self = ENCODING.read(bytes)?;
        state.check()?;
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
