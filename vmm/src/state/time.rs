//! Time as the guest has it: the TSC of each vCPU, and KVM's clock.
//!
//! All TSCs of a state are those of one moment: one is read, and how far the others are from it
//! follows from their offsets to the host's. They are set the same way. Each read or set by itself,
//! they would differ by the time in between, and the guest's time would run backwards from one vCPU
//! to the next.

use std::os::fd::AsRawFd;
use std::sync::MutexGuard;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Msrs, kvm_clock_data, kvm_device_attr,
    kvm_msr_entry,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::vcpu::MSR_IA32_TSC;
use crate::error::Error;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Time of a machine at one moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TimeState {
    /// TSC of each vCPU.
    tscs: Vec<u64>,
    /// Frequency of the TSC in kHz; 0 if KVM does not tell.
    tsc_khz: u32,
    /// KVM's clock in nanoseconds.
    clock_ns: u64,
    /// TSCs are the host's but for their offsets: no other frequency.
    #[serde(skip)]
    follows_host: bool,
}

impl TimeState {
    /// Number of vCPUs that it is of.
    pub(super) fn vcpu_count(&self) -> usize {
        self.tscs.len()
    }

    /// Takes it.
    pub fn save(vm: &VmFd, vcpus: &[MutexGuard<'_, VcpuFd>]) -> Result<Self, Error> {
        let clock = vm.get_clock().map_err(Error::kvm("read the clock"))?;
        let first = vcpus.first().map(|vcpu| &**vcpu);
        let before = host_tsc();
        let now = first.map(read_tsc).transpose()?.unwrap_or_default();
        let after = host_tsc();
        let mut follows_host = false;
        let mut tscs = vec![now; vcpus.len()];
        // Without offsets, KVM keeps them in step itself.
        if let Some(base) = first.and_then(tsc_offset) {
            follows_host = (before..=after).contains(&now.wrapping_sub(base));
            for (tsc, vcpu) in tscs.iter_mut().zip(vcpus) {
                let ahead = tsc_offset(vcpu).map_or(0, |own| own.wrapping_sub(base));
                *tsc = now.wrapping_add(ahead);
            }
        }
        Ok(Self {
            tscs,
            tsc_khz: first.and_then(|vcpu| vcpu.get_tsc_khz().ok()).unwrap_or(0),
            clock_ns: clock.clock,
            follows_host,
        })
    }

    /// Sets the frequency of vCPUs that have never run.
    pub(super) fn restore_frequency(&self, vcpus: &[MutexGuard<'_, VcpuFd>]) -> Result<(), Error> {
        for vcpu in vcpus {
            let here = vcpu.get_tsc_khz().unwrap_or(0);
            if self.tsc_khz != 0 && here != self.tsc_khz {
                vcpu.set_tsc_khz(self.tsc_khz)
                    .map_err(Error::kvm("set the frequency of the TSC"))?;
            }
        }
        Ok(())
    }

    /// Sets the TSCs, whose frequency is that of the state.
    pub(super) fn restore_tscs(&self, vcpus: &[MutexGuard<'_, VcpuFd>]) -> Result<(), Error> {
        let Some(first) = vcpus.first() else {
            return Ok(());
        };
        let offset = tsc_offset(first);
        let host = offset
            .map(|offset| read_tsc(first).map(|tsc| tsc.wrapping_sub(offset)))
            .transpose()?;
        for (vcpu, &tsc) in vcpus.iter().zip(&self.tscs) {
            match host {
                Some(host) => set_tsc_offset(vcpu, tsc.wrapping_sub(host))?,
                // KVM takes writes of the same value in a row for one.
                None => write_tsc(vcpu, tsc)?,
            }
        }
        self.check_first(first)
    }

    /// Sets the TSCs of the machine that the state was taken of, by one call for each vCPU where it
    /// can be. Whether KVM has set them: one that cannot offset them leaves them the host's.
    pub(super) fn rewind_tscs(&self, vcpus: &[MutexGuard<'_, VcpuFd>]) -> Result<bool, Error> {
        let Some(first) = vcpus.first() else {
            return Ok(false);
        };
        let host = if self.follows_host {
            host_tsc()
        } else if let Some(offset) = tsc_offset(first) {
            read_tsc(first)?.wrapping_sub(offset)
        } else {
            // KVM takes writes of the same value in a row for one.
            for (vcpu, &tsc) in vcpus.iter().zip(&self.tscs) {
                write_tsc(vcpu, tsc)?;
            }
            return Ok(false);
        };
        for (vcpu, &tsc) in vcpus.iter().zip(&self.tscs) {
            set_tsc_offset(vcpu, tsc.wrapping_sub(host))?;
        }
        Ok(self.follows_host)
    }

    /// Where KVM cannot offset TSCs, it takes what is set and goes on with the host's.
    fn check_first(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let wanted = self.tscs.first().copied().unwrap_or_default();
        let ahead = read_tsc(vcpu)?.checked_sub(wanted).ok_or(Error::KvmLacks(
            "a TSC that can be set: the guest's time would run backwards",
        ))?;
        if ahead / 1000 > u64::from(self.tsc_khz.max(1)) {
            tracing::warn!(ahead, "KVM did not set the TSC: the guest's jumps ahead");
        }
        Ok(())
    }

    /// Sets KVM's clock.
    pub(super) fn restore_clock(&self, vm: &VmFd) -> Result<(), Error> {
        let clock = kvm_clock_data {
            clock: self.clock_ns,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(Error::kvm("set the clock"))
    }
}

/// The host's TSC.
fn host_tsc() -> u64 {
    // SAFETY: every processor with KVM has the instruction.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn tsc_entry(data: u64) -> Result<Msrs, Error> {
    let entry = kvm_msr_entry {
        index: MSR_IA32_TSC,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).map_err(|_| Error::KvmLacks("a usable list of MSRs"))
}

fn read_tsc(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut msrs = tsc_entry(0)?;
    match vcpu
        .get_msrs(&mut msrs)
        .map_err(Error::kvm("read the TSC"))?
    {
        1 => Ok(msrs.as_slice()[0].data),
        _ => Err(Error::KvmLacks("a readable TSC")),
    }
}

fn write_tsc(vcpu: &VcpuFd, tsc: u64) -> Result<(), Error> {
    match vcpu
        .set_msrs(&tsc_entry(tsc)?)
        .map_err(Error::kvm("set the TSC"))?
    {
        1 => Ok(()),
        _ => Err(Error::KvmLacks("a writable TSC")),
    }
}

/// How far the vCPU's TSC is ahead of the host's (scaled to its frequency); `None` on kernels
/// before 5.16.
fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attribute = tsc_attribute(&raw mut offset as u64);
    // SAFETY: the attribute has eight bytes, which the call writes to `offset`.
    let result = unsafe { ioctl_with_ref(&vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR(), &attribute) };
    (result == 0).then_some(offset)
}

fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), Error> {
    let attribute = tsc_attribute(&raw const offset as u64);
    // SAFETY: the attribute has eight bytes, which the call reads from `offset`.
    match unsafe { ioctl_with_ref(&vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(()),
        _ => Err(Error::kvm("set the offset of a TSC")(
            kvm_ioctls::Error::last(),
        )),
    }
}

fn tsc_attribute(address: u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: address,
        flags: 0,
    }
}
