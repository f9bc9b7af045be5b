//! KVM itself and a machine's VM in it: what is needed, and what is made before there are vCPUs.

use kvm_bindings::{
    KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::dirty::DirtyTracking;
use crate::error::Error;
use crate::layout;
use crate::memory::GuestRam;
use crate::memory_slots::set_slots;

/// Opens KVM and checks that it can do what machines need.
pub(crate) fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::NoKvm,
        libc::EACCES | libc::EPERM => Error::KvmForbidden,
        _ => Error::KvmUnusable(error),
    })?;
    const API_VERSION: i32 = 12;
    if kvm.get_api_version() != API_VERSION {
        return Err(Error::KvmLacks("API version 12"));
    }
    let needed = [
        (Cap::Irqchip, "an in-kernel interrupt controller"),
        (Cap::Pit2, "a timer"),
        (Cap::UserMemory, "user memory"),
        (Cap::Irqfd, "irqfd"),
        (Cap::IrqRouting, "interrupt routing"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::MpState, "vCPU run states"),
        (Cap::VcpuEvents, "vCPU events"),
        (Cap::Debugregs, "debug registers"),
        (Cap::Xsave, "extended registers"),
    ];
    match needed
        .into_iter()
        .find(|&(cap, _)| !kvm.check_extension(cap))
    {
        Some((_, name)) => Err(Error::KvmLacks(name)),
        None => Ok(kvm),
    }
}

/// A VM without memory and interrupt controllers.
pub(crate) fn create_empty_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    let vm = loop {
        match kvm.create_vm() {
            Ok(vm) => break vm,
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(Error::kvm("create a virtual machine")(error)),
        }
    };
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(Error::kvm("place its identity map"))?;
    vm.set_tss_address(layout::KVM_TSS)
        .map_err(Error::kvm("place its TSS"))?;
    Ok(vm)
}

/// Makes a triple fault that a vCPU of `vm` has met and not left the guest with part of its events,
/// so that it is saved, put back and forgotten with them (KVM API, section 7.31,
/// KVM_CAP_X86_TRIPLE_FAULT_EVENT). KVM holds it as a request of its own otherwise, which a vCPU
/// that was interrupted at that moment takes into the state that it is given next. Says whether
/// this KVM can; that of Linux before 6.0 cannot.
pub fn show_triple_faults(vm: &VmFd) -> bool {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_X86_TRIPLE_FAULT_EVENT,
        ..Default::default()
    };
    cap.args[0] = 1;
    vm.enable_cap(&cap).is_ok()
}

/// A machine's VM: interrupt controllers, timer, dirty rings if KVM has them, and `ram` as its
/// memory.
pub(crate) fn create_vm(kvm: &Kvm, ram: &GuestRam) -> Result<(VmFd, bool), Error> {
    let vm = create_empty_vm(kvm)?;
    vm.create_irq_chip()
        .map_err(Error::kvm("create interrupt controllers"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(Error::kvm("create a timer"))?;
    if !show_triple_faults(&vm) {
        tracing::debug!("this KVM does not show triple faults: one under way outlives a rewind");
    }
    let has_dirty_rings = DirtyTracking::prepare(&vm);
    set_slots(&vm, ram, 0).map_err(Error::kvm("take guest memory"))?;
    Ok((vm, has_dirty_rings))
}
