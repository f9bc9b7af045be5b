//! State of one vCPU, its TSC apart.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_VCPUEVENT_VALID_TRIPLE_FAULT, MsrList, Msrs,
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::Restore;
use crate::error::Error;

/// IA32_TIME_STAMP_COUNTER: in [`super::time`], so that all vCPUs stay in step.
pub(super) const MSR_IA32_TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: means something only once the local APIC's timer is set.
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Memory type range registers, which KVM has and does not list: variable, fixed, default type
/// (Intel SDM, volume 3, section 12.11).
const MTRRS: [std::ops::RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];
/// Most MSRs that a state may have; KVM lists some hundred.
pub(super) const MAX_MSRS: usize = 4096;
/// Most that KVM takes at once.
const MSR_BATCH: usize = 256;

/// State of one vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
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
        let cpuid = vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("read CPUID"))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
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

    /// Number of MSRs.
    pub(super) fn msr_count(&self) -> usize {
        self.msrs.len()
    }

    #[cfg(test)]
    pub(super) fn msr_indices(&self) -> impl Iterator<Item = u32> {
        self.msrs.iter().map(|entry| entry.index)
    }

    /// Gives `vcpu`, which has never run, this CPUID.
    pub(super) fn restore_cpuid(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|_| Error::KvmLacks("room for CPUID leaves"))?;
        vcpu.set_cpuid2(&cpuid).map_err(Error::kvm("set CPUID"))
    }

    /// Puts the rest of the state into `vcpu`, which is out of the guest with no I/O pending.
    pub fn restore(&self, vcpu: &VcpuFd, how: Restore) -> Result<(), Error> {
        vcpu.set_mp_state(self.mp_state)
            .map_err(Error::kvm("set a vCPU's run state"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(Error::kvm("set special registers"))?;
        vcpu.set_regs(&self.regs)
            .map_err(Error::kvm("set registers"))?;
        // SAFETY: the structure has the 4 KiB that the call reads; no feature that needs more was
        // ever enabled for the guest (arch_prctl ARCH_REQ_XCOMP_GUEST_PERM is never called).
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(Error::kvm("set extended registers"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(Error::kvm("set XCR0"))?;
        }
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(Error::kvm("set debug registers"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(Error::kvm("set a local APIC"))?;
        match how {
            // Writing some has an effect beyond the value: that of the wall clock has KVM write
            // guest memory.
            Restore::Back => write_msrs(vcpu, &changed_msrs(vcpu, &self.msrs)?)?,
            Restore::GoOn | Restore::Reset => write_msrs(vcpu, &self.msrs)?,
        }
        let events = match how {
            Restore::GoOn => events_for(vcpu, self.events)?,
            Restore::Back | Restore::Reset => self.events,
        };
        vcpu.set_vcpu_events(&events)
            .map_err(Error::kvm("set pending events"))
    }
}

/// `events` of another host as this one takes them.
fn events_for(vcpu: &VcpuFd, mut events: kvm_vcpu_events) -> Result<kvm_vcpu_events, Error> {
    let now = vcpu
        .get_vcpu_events()
        .map_err(Error::kvm("read pending events"))?;
    if events.flags & !now.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0 {
        if events.triple_fault.pending != 0 {
            return Err(Error::KvmLacks("triple faults among a vCPU's events"));
        }
        events.flags &= !KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    }
    Ok(events)
}

/// Reads those of `indices` and of what KVM does not list that can be read.
fn read_msrs(vcpu: &VcpuFd, indices: &MsrList) -> Result<Vec<kvm_msr_entry>, Error> {
    let unlisted = MTRRS.into_iter().flatten();
    let mut wanted: Vec<kvm_msr_entry> = indices
        .as_slice()
        .iter()
        .copied()
        .filter(|&index| index != MSR_IA32_TSC && index != MSR_IA32_TSC_DEADLINE)
        .chain(unlisted.filter(|index| !indices.as_slice().contains(index)))
        .chain([MSR_IA32_TSC_DEADLINE])
        .map(|index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let mut values = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let mut batch = batch(&wanted[..wanted.len().min(MSR_BATCH)])?;
        let done = vcpu.get_msrs(&mut batch).map_err(Error::kvm("read MSRs"))?;
        let asked = batch.as_slice().len();
        values.extend_from_slice(&batch.as_slice()[..done]);
        // The call stops at the first that cannot be read.
        wanted.drain(..(done + 1).min(asked));
    }
    Ok(values)
}

/// Those of `values` that are others now, and the deadline, which arms a timer.
fn changed_msrs(vcpu: &VcpuFd, values: &[kvm_msr_entry]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut changed = Vec::new();
    for wanted in values.chunks(MSR_BATCH) {
        let mut now = batch(wanted)?;
        let known = vcpu.get_msrs(&mut now).map_err(Error::kvm("read MSRs"))?;
        for (index, wanted) in wanted.iter().enumerate() {
            let same = index < known && now.as_slice()[index].data == wanted.data;
            if !same || wanted.index == MSR_IA32_TSC_DEADLINE {
                changed.push(*wanted);
            }
        }
    }
    Ok(changed)
}

/// Writes those of `values` that can be written; read-only ones keep theirs anyway.
fn write_msrs(vcpu: &VcpuFd, mut values: &[kvm_msr_entry]) -> Result<(), Error> {
    while !values.is_empty() {
        let now = &values[..values.len().min(MSR_BATCH)];
        let done = vcpu
            .set_msrs(&batch(now)?)
            .map_err(Error::kvm("set MSRs"))?;
        if let Some(refused) = now.get(done) {
            tracing::trace!(index = refused.index, "MSR not put back");
        }
        values = values.get((done + 1).min(now.len())..).unwrap_or_default();
    }
    Ok(())
}

fn batch(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    // Fails only for more entries than KVM takes, and the list came from KVM.
    Msrs::from_entries(entries).map_err(|_| Error::KvmLacks("a usable list of MSRs"))
}
