//! P's time-stamp counter.

use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::PrivateVmError;

mod ioctls {
    #![allow(missing_docs, reason = "the macro makes undocumented functions")]
    use super::{KVMIO, ioctl_iow_nr, kvm_device_attr};
    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}

/// Calls after which an offset that never changed is taken to be fixed.
const SETTLED_CALLS: u32 = 64;
/// Calls after which one that is fixed is compared again: the guest may have written its counter.
const FIXED_CALLS: u32 = 256;

/// Keeps P's time-stamp counter equal to K's.
///
/// On a host whose own counter is reliable the offset of a vCPU is fixed. On others (nested and
/// emulated hosts) KVM moves it at every load of the vCPU so that the guest's counter stands still
/// while the vCPU does not run: there it has to be taken over before each call, or the guest's
/// clock jumps ahead inside the domain and stands still outside until it has caught up.
#[derive(Debug, Default)]
pub(super) struct Clock {
    offset: Option<u64>,
    unchanged: u32,
    /// Calls since it was compared last.
    unseen: u32,
}

impl Clock {
    /// K's offset may have been set anew.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Sets P's offset to that of `k` where it may have changed; returns the number of system
    /// calls.
    pub(super) fn follow(&mut self, k: &VcpuFd, p: &VcpuFd) -> Result<u32, PrivateVmError> {
        if !self.is_due() {
            return Ok(0);
        }
        let offset = tsc_offset(k)?;
        if !self.changes_to(offset) {
            return Ok(1);
        }
        set_tsc_offset(p, offset)?;
        Ok(2)
    }

    /// Whether it is to be compared at this call.
    fn is_due(&mut self) -> bool {
        if self.unchanged >= SETTLED_CALLS && self.unseen < FIXED_CALLS {
            self.unseen += 1;
            return false;
        }
        self.unseen = 0;
        true
    }

    fn changes_to(&mut self, offset: u64) -> bool {
        if self.offset == Some(offset) {
            self.unchanged = self.unchanged.saturating_add(1);
            return false;
        }
        (self.offset, self.unchanged) = (Some(offset), 0);
        true
    }
}

/// Reads a vCPU's time-stamp counter offset (KVM documentation, devices/vcpu, section 4.1).
fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, PrivateVmError> {
    let mut offset = 0u64;
    let attribute = tsc_offset_attribute(&raw mut offset);
    // SAFETY: `attribute` and the 8 bytes it points to live through the call; the kernel writes
    // just those 8 bytes.
    let result = unsafe {
        let vcpu = std::os::fd::BorrowedFd::borrow_raw(vcpu.as_raw_fd());
        ioctl_with_ref(&vcpu, ioctls::KVM_GET_DEVICE_ATTR(), &attribute)
    };
    attribute_result(result, "KVM_GET_DEVICE_ATTR").map(|()| offset)
}

fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), PrivateVmError> {
    let attribute = tsc_offset_attribute(&raw mut offset);
    // SAFETY: `attribute` and the 8 bytes it points to live through the call; the kernel reads
    // them.
    let result = unsafe {
        let vcpu = std::os::fd::BorrowedFd::borrow_raw(vcpu.as_raw_fd());
        ioctl_with_ref(&vcpu, ioctls::KVM_SET_DEVICE_ATTR(), &attribute)
    };
    attribute_result(result, "KVM_SET_DEVICE_ATTR")
}

fn tsc_offset_attribute(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: offset as u64,
        flags: 0,
    }
}

fn attribute_result(result: i32, call: &'static str) -> Result<(), PrivateVmError> {
    if result < 0 {
        return Err(PrivateVmError::Kvm {
            call,
            source: kvm_ioctls::Error::last(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls until K's offset is P's.
    fn calls_until(clock: &mut Clock, offset: u64) -> u32 {
        let mut calls = 0..2 * FIXED_CALLS;
        let due = calls.find(|_| clock.is_due() && clock.changes_to(offset));
        due.unwrap()
    }

    #[test]
    fn a_counter_that_is_written_late_is_followed() {
        let mut clock = Clock::default();
        assert_eq!(calls_until(&mut clock, 1), 0);
        assert_eq!(calls_until(&mut clock, 2), 0, "it is not known to be fixed");
        let compared = (0..SETTLED_CALLS + FIXED_CALLS).filter(|_| {
            let is_due = clock.is_due();
            assert!(!is_due || !clock.changes_to(2));
            is_due
        });
        assert_eq!(
            compared.count() as u32,
            SETTLED_CALLS,
            "a fixed one costs nothing"
        );
        assert_eq!(calls_until(&mut clock, 3), 0);
        assert!(clock.is_due(), "it is not fixed any more");
    }
}
