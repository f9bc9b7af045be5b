//! One vCPU of P, with what it was given for calls of one vCPU of the guest.

use kvm_bindings::{CpuId, kvm_segment, kvm_sregs};
use kvm_ioctls::{SyncReg, VcpuFd, VmFd};
use vmm::dirty_ring::DirtyRing;

use super::clock::Clock;
use super::control::{FaultRegisters, Kept, code_segment, data_segment};
use super::{PrivateVmError, kvm};
use crate::domain::monitor::Monitor;

/// CR0.TS: an FPU instruction raises #NM.
const CR0_TS: u64 = 1 << 3;
const CR4_PGE: u64 = 1 << 7;
const CR4_LA57: u64 = 1 << 12;
const CR4_PCIDE: u64 = 1 << 17;

/// The control registers and segment bases of K that P has taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Adopted {
    cr0: u64,
    cr4: u64,
    efer: u64,
    gs_base: u64,
    /// What P has for them.
    kept: Kept,
}

impl Adopted {
    fn is_of(&self, k: &kvm_sregs) -> bool {
        (self.cr0, self.cr4, self.efer, self.gs_base) == (k.cr0, k.cr4, k.efer, k.gs.base)
    }
}

/// A vCPU of P's.
#[derive(Debug)]
pub(super) struct Processor {
    // Fields are dropped in this order: the ring's mapping before the descriptor.
    pub ring: DirtyRing,
    pub vcpu: VcpuFd,
    pub clock: Clock,
    adopted: Option<Adopted>,
}

impl Processor {
    /// vCPU `number` of `vm`, which `tells_system` if exits are to tell the control registers, too.
    pub fn new(
        vm: &VmFd,
        number: u8,
        cpuid: &CpuId,
        tells_system: bool,
    ) -> Result<Self, PrivateVmError> {
        let vcpu = vm.create_vcpu(number.into());
        let mut vcpu = vcpu.map_err(kvm("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
        vcpu.set_sync_valid_reg(SyncReg::Register);
        if tells_system {
            vcpu.set_sync_valid_reg(SyncReg::SystemRegister);
        }
        let ring = DirtyRing::map(vm, &vcpu).map_err(PrivateVmError::DirtyRing)?;
        Ok(Self {
            ring,
            vcpu,
            clock: Clock::default(),
            adopted: None,
        })
    }

    /// Takes over the control registers and segments of a vCPU of the guest if they changed since
    /// the last time, with P's own descriptor tables and roots; says whether they did.
    pub fn adopt(
        &mut self,
        k: &kvm_sregs,
        monitor: &Monitor,
        kernel_root: u64,
    ) -> Result<bool, PrivateVmError> {
        if self.adopted.is_some_and(|adopted| adopted.is_of(k)) {
            return Ok(false);
        }
        if k.cr4 & CR4_LA57 != 0 {
            return Err(PrivateVmError::FiveLevelPaging);
        }
        let mut sregs = self.vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
        sregs.cs = code_segment();
        (sregs.ds, sregs.es, sregs.ss) = (data_segment(), data_segment(), data_segment());
        sregs.fs = k.fs;
        sregs.gs = k.gs;
        sregs.ldt = kvm_segment {
            unusable: 1,
            ..Default::default()
        };
        let (base, limit) = monitor.tss();
        sregs.tr = kvm_segment {
            base,
            limit,
            type_: 11,
            present: 1,
            selector: 0x40,
            ..Default::default()
        };
        (sregs.gdt.base, sregs.gdt.limit) = monitor.gdt();
        (sregs.idt.base, sregs.idt.limit) = monitor.idt();
        sregs.cr0 = k.cr0 | CR0_TS;
        sregs.cr3 = kernel_root;
        sregs.cr4 = k.cr4 & !(CR4_PGE | CR4_PCIDE);
        sregs.efer = k.efer;
        sregs.interrupt_bitmap = [0; 4];
        self.vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
        self.adopted = Some(Adopted {
            cr0: k.cr0,
            cr4: k.cr4,
            efer: k.efer,
            gs_base: k.gs.base,
            kept: Kept::of(&sregs),
        });
        Ok(true)
    }

    /// Whether the control registers are still those that it was given.
    pub fn is_as_adopted(&self, now: &FaultRegisters) -> bool {
        self.adopted.is_some_and(|adopted| adopted.kept == now.kept)
    }

    /// A call may have changed them: they are set anew for the next one.
    pub fn forget_adopted(&mut self) {
        self.adopted = None;
    }
}
