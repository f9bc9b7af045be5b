//! P: the second KVM VM, over the private view, with one vCPU on which isolated calls run.
//!
//! P has no interrupt controller and takes no interrupts. Its memory slots are set once and never
//! change. Registers travel through `kvm_run` (KVM API, section 8.2 `KVM_CAP_SYNC_REGS`), so a warm
//! call needs no system call but `KVM_RUN`.
//!
//! A finished `out` needs no completing run: KVM skips the instruction at the next `KVM_RUN` only
//! while RIP still points at it, and every way on from a stub sets RIP elsewhere.

use kvm_bindings::{
    CpuId, KVM_CAP_X86_USER_SPACE_MSR, KVM_MEM_LOG_DIRTY_PAGES, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_SYNC_X86_SREGS,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, kvm_enable_cap, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{
    Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, SyncReg, VcpuFd, VmFd,
};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::monitor::{AREA_PAGES, Monitor};
use super::view::{PAGE_SIZE, Pfn, PrivateView};
use clock::Clock;
pub use control::{FaultRegisters, Kept};
use control::{code_segment, data_segment};
pub use exits::Exit;
use vmm::dirty_ring::DirtyRing;

mod clock;
mod control;
mod exits;

/// CR0.TS: an FPU instruction raises #NM.
const CR0_TS: u64 = 1 << 3;
const CR4_PGE: u64 = 1 << 7;
const CR4_LA57: u64 = 1 << 12;
const CR4_PCIDE: u64 = 1 << 17;

/// Exits that a half-done access may take at most until KVM forgets it. A repeated string
/// instruction between memory and a device is one of up to 1,024 parts, of a load and a store each,
/// until KVM enters the guest again.
const MAX_COMPLETION_EXITS: usize = 4096;

/// Why P could not be made or run.
#[derive(Debug, thiserror::Error)]
pub enum PrivateVmError {
    /// A KVM call failed.
    #[error("KVM refused {call} for the private VM: {source}")]
    Kvm {
        /// Name of the call.
        call: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// The dirty ring could not be used.
    #[error("cannot use the private VM's dirty ring: {0}")]
    DirtyRing(#[source] std::io::Error),
    /// A half-done access is not forgotten.
    #[error("an access that a call was stopped in does not end in {MAX_COMPLETION_EXITS} exits")]
    NotSettled,
    /// The guest runs with 5-level paging.
    #[error(
        "the guest uses 5-level paging, which isolation does not support yet: boot it with no5lvl"
    )]
    FiveLevelPaging,
}

fn kvm(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> PrivateVmError {
    move |source| PrivateVmError::Kvm { call, source }
}

/// The private VM.
#[derive(Debug)]
pub struct PrivateVm {
    // Fields are dropped in this order: the ring's mapping before the descriptors.
    ring: DirtyRing,
    vcpu: VcpuFd,
    _vm: VmFd,
    runs: u64,
    clock: Clock,
    /// An exit leaves the control registers and segments in the shared page.
    tells_system: bool,
}

impl PrivateVm {
    /// A VM over the private side of `view` and the `monitor` area, for a guest whose vCPUs have
    /// `cpuid`.
    pub fn new(
        kvm_device: &Kvm,
        view: &PrivateView,
        monitor: &Monitor,
        cpuid: &CpuId,
    ) -> Result<Self, PrivateVmError> {
        let vm = kvm_device.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
        DirtyRing::enable(&vm).map_err(kvm("KVM_CAP_DIRTY_LOG_RING"))?;
        let mut msr_exits = kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            ..Default::default()
        };
        msr_exits.args[0] = u64::from(
            KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_FILTER,
        );
        vm.enable_cap(&msr_exits)
            .map_err(kvm("KVM_CAP_X86_USER_SPACE_MSR"))?;
        vmm::show_triple_faults(&vm);
        trap_timer(&vm)?;
        set_slots(&vm, view, monitor)?;
        let mut vcpu = vm.create_vcpu(0).map_err(kvm("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
        vcpu.set_sync_valid_reg(SyncReg::Register);
        // Where KVM can, each exit tells the control registers, too, which most exceptions ask for.
        let shared = kvm_device.check_extension_int(Cap::SyncRegs);
        let tells_system = shared & KVM_SYNC_X86_SREGS.cast_signed() != 0;
        if tells_system {
            vcpu.set_sync_valid_reg(SyncReg::SystemRegister);
        }
        let ring = DirtyRing::map(&vm, &vcpu).map_err(PrivateVmError::DirtyRing)?;
        Ok(Self {
            ring,
            vcpu,
            _vm: vm,
            runs: 0,
            clock: Clock::default(),
            tells_system,
        })
    }

    /// Takes over the control registers and segments of a vCPU of the guest, with P's own
    /// descriptor tables and roots. Only needed when they changed since the last time. Returns what
    /// calls leave as it is now.
    pub fn adopt(
        &mut self,
        k: &kvm_sregs,
        monitor: &Monitor,
        kernel_root: u64,
    ) -> Result<Kept, PrivateVmError> {
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
        Ok(Kept::of(&sregs))
    }

    /// Makes P's time-stamp counter that of `k`; returns the number of system calls it took.
    pub fn follow_clock(&mut self, k: &VcpuFd) -> Result<u32, PrivateVmError> {
        self.clock.follow(k, &self.vcpu)
    }

    /// The time-stamp counters of K's vCPUs were set: P's is compared with them again from the next
    /// call on.
    pub fn forget_clock(&mut self) {
        self.clock.forget();
    }

    /// General registers at the last exit.
    pub fn regs(&self) -> kvm_regs {
        self.vcpu.sync_regs().regs
    }

    /// Sets the general registers for the next run.
    pub fn set_regs(&mut self, regs: &kvm_regs) {
        self.vcpu.sync_regs_mut().regs = *regs;
        self.vcpu.set_sync_dirty_reg(SyncReg::Register);
    }

    /// Whether [`PrivateVm::fault_registers`] needs no system call.
    pub fn tells_system(&self) -> bool {
        self.tells_system
    }

    /// Control registers at the last exit.
    pub fn fault_registers(&self) -> Result<FaultRegisters, PrivateVmError> {
        let sregs = match self.tells_system {
            true => self.vcpu.sync_regs().sregs,
            false => self.vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?,
        };
        Ok(FaultRegisters {
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            kept: Kept::of(&sregs),
        })
    }

    /// Lets KVM forget a half-done access, a pending exception or a triple fault after a call was
    /// stopped in the middle of something.
    pub fn settle(&mut self) -> Result<(), PrivateVmError> {
        self.vcpu.set_kvm_immediate_exit(1);
        // An access that crosses a page, or is of more than eight bytes, is several exits.
        let mut exits = 0..MAX_COMPLETION_EXITS;
        let end = exits.find_map(|_| self.vcpu.run().map(drop).err());
        self.vcpu.set_kvm_immediate_exit(0);
        match end {
            Some(end) if matches!(end.errno(), libc::EINTR | libc::EAGAIN) => {}
            Some(source) => {
                return Err(PrivateVmError::Kvm {
                    call: "KVM_RUN",
                    source,
                });
            }
            None => return Err(PrivateVmError::NotSettled),
        }
        let mut events = self
            .vcpu
            .get_vcpu_events()
            .map_err(kvm("KVM_GET_VCPU_EVENTS"))?;
        events.exception.injected = 0;
        events.exception.pending = 0;
        events.nmi.injected = 0;
        events.interrupt.injected = 0;
        events.interrupt.shadow = 0;
        events.triple_fault.pending = 0;
        events.flags &= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        self.vcpu
            .set_vcpu_events(&events)
            .map_err(kvm("KVM_SET_VCPU_EVENTS"))
    }

    /// Pages of guest memory written since the last time, monitor area left out.
    pub fn harvest(
        &mut self,
        bases: &[Pfn],
        mut seen: impl FnMut(Pfn),
    ) -> Result<(), PrivateVmError> {
        let harvest = self.ring.harvest(|slot, offset| {
            if let Some(base) = bases.get(slot as usize) {
                seen(Pfn(base.0 + offset));
            }
        });
        harvest.map_err(|lost| PrivateVmError::DirtyRing(std::io::Error::other(lost)))?;
        // A page that is dropped from the private view loses its mapping and appears again without
        // a reset, so one in tens of thousands of pages will do.
        match self.ring.is_half_seen() {
            true => self.reset_ring(),
            false => Ok(()),
        }
    }

    /// Whether half of the ring is to be harvested.
    pub fn ring_is_half_full(&self) -> bool {
        self.ring.is_half_full()
    }

    /// Empties the ring for KVM, after [`Exit::DirtyRingFull`].
    pub fn reset_ring(&mut self) -> Result<(), PrivateVmError> {
        self.ring.reset().map_err(PrivateVmError::DirtyRing)
    }

    /// Number of `KVM_RUN` calls made.
    pub fn runs(&self) -> u64 {
        self.runs
    }
}

/// First page of each memory slot, by slot number.
pub fn slot_bases(view: &PrivateView) -> Vec<Pfn> {
    view.private()
        .iter()
        .map(|region| Pfn::of(region.start_addr().raw_value()))
        .collect()
}

/// Makes accesses to the TSC deadline register exits: without an interrupt controller KVM would
/// forget what was written. Those to the x2APIC's registers exit by themselves, being unknown.
fn trap_timer(vm: &VmFd) -> Result<(), PrivateVmError> {
    const TSC_DEADLINE: u32 = 0x6e0;
    let deadline = MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: TSC_DEADLINE,
        msr_count: 1,
        bitmap: &[0],
    };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[deadline])
        .map_err(kvm("KVM_X86_SET_MSR_FILTER"))
}

fn set_slots(vm: &VmFd, view: &PrivateView, monitor: &Monitor) -> Result<(), PrivateVmError> {
    let mut slot = 0;
    let mut add = |guest_phys_addr, memory_size, userspace_addr, flags| {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr,
            memory_size,
            userspace_addr,
        };
        slot += 1;
        // SAFETY: the range is a mapping owned by the view or the monitor area, both of which the
        // domain keeps for as long as the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("KVM_SET_USER_MEMORY_REGION"))
    };
    for region in view.private().iter() {
        let gpa = region.start_addr().raw_value();
        add(
            gpa,
            region.len(),
            region.as_ptr() as u64,
            KVM_MEM_LOG_DIRTY_PAGES,
        )?;
    }
    add(
        monitor.gpa(),
        AREA_PAGES * PAGE_SIZE,
        monitor.host_address(),
        0,
    )
}
