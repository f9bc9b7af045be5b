//! Guest memory as memory slots of a VM in KVM.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use crate::memory::GuestRam;

/// Gives `vm` the regions of `ram` as its memory slots, or those that it has other `flags`.
pub(crate) fn set_slots(vm: &VmFd, ram: &GuestRam, flags: u32) -> Result<(), kvm_ioctls::Error> {
    for region in ram.regions() {
        let slot = kvm_userspace_memory_region {
            slot: region.slot,
            flags,
            guest_phys_addr: region.guest_address.0,
            memory_size: region.len,
            userspace_addr: region.host_address,
        };
        // SAFETY: the range is a mapping of `ram`, which the machine drops after its vCPUs, so no
        // guest code runs once it is gone; regions do not overlap.
        unsafe { vm.set_user_memory_region(slot) }?;
    }
    Ok(())
}
