//! P: the second KVM VM, over the private view, on whose vCPUs isolated calls run.
//!
//! It has one for each of the guest's, of which one at most runs: calls of a guest's vCPU always run
//! on the same thread and the same vCPU of P. Before Linux 6.13 KVM waits for a grace period of RCU
//! where another thread than the last runs a vCPU.
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
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, kvm_enable_cap, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{
    Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, SyncReg, VcpuFd, VmFd,
};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::monitor::{AREA_PAGES, Monitor};
use super::view::{PAGE_SIZE, Pfn, PrivateView};
pub use control::FaultRegisters;
use control::Kept;
pub use exits::Exit;
use processor::Processor;
use vmm::dirty_ring::DirtyRing;

mod clock;
mod control;
mod exits;
mod processor;

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
    // Fields are dropped in this order: the vCPUs before the VM.
    processors: Vec<Processor>,
    /// The one that runs, or ran last.
    current: usize,
    _vm: VmFd,
    runs: u64,
    /// An exit leaves the control registers and segments in the shared page.
    tells_system: bool,
}

impl PrivateVm {
    /// A VM over the private side of `view` and the `monitor` area, for a guest with so many vCPUs,
    /// which have `cpuid`. The first is the one that runs.
    pub fn new(
        kvm_device: &Kvm,
        view: &PrivateView,
        monitor: &Monitor,
        (vcpus, cpuid): (u8, &CpuId),
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
        // Where KVM can, each exit tells the control registers, too, which most exceptions ask for.
        let shared = kvm_device.check_extension_int(Cap::SyncRegs);
        let tells_system = shared & KVM_SYNC_X86_SREGS.cast_signed() != 0;
        let processors = (0..vcpus.max(1)).map(|n| Processor::new(&vm, n, cpuid, tells_system));
        Ok(Self {
            processors: processors.collect::<Result<_, _>>()?,
            current: 0,
            _vm: vm,
            runs: 0,
            tells_system,
        })
    }

    /// Has all that follows done by the vCPU for this one of the guest's, from 0. `false`, and
    /// nothing done, if there is none.
    pub fn turn_to(&mut self, vcpu: u8) -> bool {
        let is_there = usize::from(vcpu) < self.processors.len();
        if is_there {
            self.current = vcpu.into();
        }
        is_there
    }

    fn processor(&self) -> &Processor {
        &self.processors[self.current]
    }

    fn processor_mut(&mut self) -> &mut Processor {
        &mut self.processors[self.current]
    }

    fn vcpu(&self) -> &VcpuFd {
        &self.processor().vcpu
    }

    fn vcpu_mut(&mut self) -> &mut VcpuFd {
        &mut self.processor_mut().vcpu
    }

    /// Takes over the control registers and segments of a vCPU of the guest if they changed since
    /// the last time, with P's own descriptor tables and roots; says whether they did.
    pub fn adopt(
        &mut self,
        k: &kvm_sregs,
        monitor: &Monitor,
        kernel_root: u64,
    ) -> Result<bool, PrivateVmError> {
        self.processor_mut().adopt(k, monitor, kernel_root)
    }

    /// Whether the control registers are still those that were taken over.
    pub fn is_as_adopted(&self, now: &FaultRegisters) -> bool {
        self.processor().is_as_adopted(now)
    }

    /// A call may have changed them: they are taken over anew for the next one.
    pub fn forget_adopted(&mut self) {
        self.processor_mut().forget_adopted();
    }

    /// Makes P's time-stamp counter that of `k`; returns the number of system calls it took.
    pub fn follow_clock(&mut self, k: &VcpuFd) -> Result<u32, PrivateVmError> {
        let processor = self.processor_mut();
        processor.clock.follow(k, &processor.vcpu)
    }

    /// The time-stamp counters of K's vCPUs were set: P's is compared with them again from the next
    /// call on.
    pub fn forget_clock(&mut self) {
        for processor in &mut self.processors {
            processor.clock.forget();
        }
    }

    /// General registers at the last exit.
    pub fn regs(&self) -> kvm_regs {
        self.vcpu().sync_regs().regs
    }

    /// Sets the general registers for the next run.
    pub fn set_regs(&mut self, regs: &kvm_regs) {
        let vcpu = self.vcpu_mut();
        vcpu.sync_regs_mut().regs = *regs;
        vcpu.set_sync_dirty_reg(SyncReg::Register);
    }

    /// Whether [`PrivateVm::fault_registers`] needs no system call.
    pub fn tells_system(&self) -> bool {
        self.tells_system
    }

    /// Control registers at the last exit.
    pub fn fault_registers(&self) -> Result<FaultRegisters, PrivateVmError> {
        let sregs = match self.tells_system {
            true => self.vcpu().sync_regs().sregs,
            false => self.vcpu().get_sregs().map_err(kvm("KVM_GET_SREGS"))?,
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
        let vcpu = self.vcpu_mut();
        vcpu.set_kvm_immediate_exit(1);
        // An access that crosses a page, or is of more than eight bytes, is several exits.
        let mut exits = 0..MAX_COMPLETION_EXITS;
        let end = exits.find_map(|_| vcpu.run().map(drop).err());
        vcpu.set_kvm_immediate_exit(0);
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
        let mut events = vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?;
        events.exception.injected = 0;
        events.exception.pending = 0;
        events.nmi.injected = 0;
        events.interrupt.injected = 0;
        events.interrupt.shadow = 0;
        events.triple_fault.pending = 0;
        events.flags &= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        vcpu.set_vcpu_events(&events)
            .map_err(kvm("KVM_SET_VCPU_EVENTS"))
    }

    /// Pages of guest memory written since the last time, monitor area left out.
    pub fn harvest(
        &mut self,
        bases: &[Pfn],
        mut seen: impl FnMut(Pfn),
    ) -> Result<(), PrivateVmError> {
        let harvest = self.processor_mut().ring.harvest(|slot, offset| {
            if let Some(base) = bases.get(slot as usize) {
                seen(Pfn(base.0 + offset));
            }
        });
        harvest.map_err(|lost| PrivateVmError::DirtyRing(std::io::Error::other(lost)))?;
        // A page that is dropped from the private view loses its mapping and appears again without
        // a reset, so one in tens of thousands of pages will do.
        match self.processor().ring.is_half_seen() {
            true => self.reset_ring(),
            false => Ok(()),
        }
    }

    /// Whether half of the ring is to be harvested.
    pub fn ring_is_half_full(&self) -> bool {
        self.processor().ring.is_half_full()
    }

    /// Empties the rings for KVM, after [`Exit::DirtyRingFull`].
    pub fn reset_ring(&mut self) -> Result<(), PrivateVmError> {
        let reset = self.processor_mut().ring.reset();
        reset.map_err(PrivateVmError::DirtyRing)?;
        // All of a VM are.
        for processor in &mut self.processors {
            processor.ring.was_reset();
        }
        Ok(())
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
