//! All of a vCPU's and of the interrupt controllers' state as values: taken once when the machine is
//! new and put back at each reset.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, MsrList, Msrs,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::error::Error;

/// IA32_TIME_STAMP_COUNTER: goes on over a reset, so that all vCPUs stay in step.
const MSR_IA32_TSC: u32 = 0x10;

/// State of one vCPU, CPUID apart.
pub(crate) struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: Option<kvm_xcrs>,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
}

impl VcpuState {
    /// Takes the state of `vcpu`, with the values of all MSRs in `msr_indices`.
    pub fn save(kvm: &Kvm, vcpu: &VcpuFd, msr_indices: &MsrList) -> Result<Self, Error> {
        let xcrs = kvm.check_extension(Cap::Xcrs);
        Ok(Self {
            mp_state: vcpu
                .get_mp_state()
                .map_err(Error::kvm("read a vCPU's run state"))?,
            regs: vcpu.get_regs().map_err(Error::kvm("read registers"))?,
            sregs: vcpu
                .get_sregs()
                .map_err(Error::kvm("read special registers"))?,
            xsave: vcpu
                .get_xsave()
                .map_err(Error::kvm("read extended registers"))?,
            xcrs: match xcrs {
                true => Some(vcpu.get_xcrs().map_err(Error::kvm("read XCR0"))?),
                false => None,
            },
            debug_regs: vcpu
                .get_debug_regs()
                .map_err(Error::kvm("read debug registers"))?,
            lapic: vcpu.get_lapic().map_err(Error::kvm("read a local APIC"))?,
            msrs: read_msrs(vcpu, msr_indices)?,
            events: vcpu
                .get_vcpu_events()
                .map_err(Error::kvm("read pending events"))?,
        })
    }

    /// Puts the state into `vcpu`, which is out of the guest with no I/O pending.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        vcpu.set_mp_state(self.mp_state)
            .map_err(Error::kvm("set a vCPU's run state"))?;
        vcpu.set_regs(&self.regs)
            .map_err(Error::kvm("set registers"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(Error::kvm("set special registers"))?;
        // SAFETY: the structure has the 4 KiB that the call reads; no feature that needs more was
        // ever enabled for the guest (arch_prctl ARCH_REQ_XCOMP_GUEST_PERM is never called).
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(Error::kvm("set extended registers"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(Error::kvm("set XCR0"))?;
        }
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(Error::kvm("set debug registers"))?;
        write_msrs(vcpu, &self.msrs)?;
        vcpu.set_lapic(&self.lapic)
            .map_err(Error::kvm("set a local APIC"))?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(Error::kvm("set pending events"))
    }
}

/// Reads those of `indices` that can be read.
fn read_msrs(vcpu: &VcpuFd, indices: &MsrList) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut wanted: Vec<kvm_msr_entry> = indices
        .as_slice()
        .iter()
        .filter(|&&index| index != MSR_IA32_TSC)
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let mut values = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let mut batch = batch(&wanted)?;
        let done = vcpu.get_msrs(&mut batch).map_err(Error::kvm("read MSRs"))?;
        values.extend_from_slice(&batch.as_slice()[..done]);
        // The call stops at the first that cannot be read.
        wanted.drain(..(done + 1).min(wanted.len()));
    }
    Ok(values)
}

/// Writes those of `values` that can be written; read-only ones keep theirs anyway.
fn write_msrs(vcpu: &VcpuFd, mut values: &[kvm_msr_entry]) -> Result<(), Error> {
    while !values.is_empty() {
        let done = vcpu
            .set_msrs(&batch(values)?)
            .map_err(Error::kvm("set MSRs"))?;
        if let Some(refused) = values.get(done) {
            tracing::trace!(index = refused.index, "MSR not put back");
        }
        values = values.get(done + 1..).unwrap_or_default();
    }
    Ok(())
}

fn batch(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    // Fails only for more entries than KVM takes, and the list came from KVM.
    Msrs::from_entries(entries).map_err(|_| Error::KvmLacks("a usable list of MSRs"))
}

/// State of the interrupt controllers and the timer of a machine.
pub(crate) struct ChipState {
    chips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

impl ChipState {
    /// Takes the state.
    pub fn save(vm: &VmFd) -> Result<Self, Error> {
        let mut chips = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ]
        .map(|chip_id| kvm_irqchip {
            chip_id,
            ..Default::default()
        });
        for chip in &mut chips {
            vm.get_irqchip(chip)
                .map_err(Error::kvm("read an interrupt controller"))?;
        }
        let pit = vm.get_pit2().map_err(Error::kvm("read the timer"))?;
        Ok(Self { chips, pit })
    }

    /// Puts it back.
    pub fn restore(&self, vm: &VmFd) -> Result<(), Error> {
        for chip in &self.chips {
            vm.set_irqchip(chip)
                .map_err(Error::kvm("set an interrupt controller"))?;
        }
        vm.set_pit2(&self.pit).map_err(Error::kvm("set the timer"))
    }
}
