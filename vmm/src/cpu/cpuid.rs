//! CPUID as the guest sees it: what KVM supports on this host, with the machine's own topology.
//!
//! Each vCPU is a core of one socket, without hyper-threads; its APIC id is its number.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

use crate::error::Error;

/// Leaf 1, EDX: several logical processors in this package.
const EDX_HTT: u32 = 1 << 28;
/// Leaf 1, ECX: the local APIC's timer takes a TSC deadline.
const ECX_TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: runs under a hypervisor. Linux looks for KVM's clock only if this is set.
const ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 0x8000_0001, ECX: cores are counted as AMD does, not as hyper-threads.
const ECX_CMP_LEGACY: u32 = 1 << 1;

/// What KVM can show a guest on this host.
pub(crate) fn supported(kvm: &Kvm) -> Result<CpuId, Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("list CPUID leaves"))
}

/// Physical address bits that `supported` announces.
pub(crate) fn physical_address_bits(supported: &CpuId) -> u8 {
    supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == 0x8000_0008)
        .map_or(36, |entry| entry.eax as u8)
}

/// CPUID of vCPU `index` of `count`.
pub(crate) fn for_vcpu(kvm: &Kvm, supported: &CpuId, index: u8, count: u8) -> Result<CpuId, Error> {
    let (id, count) = (u32::from(index), u32::from(count));
    // Bits of the APIC id that number cores.
    let core_bits = count.next_power_of_two().trailing_zeros();
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut entries: Vec<kvm_cpuid_entry2> = supported.as_slice().to_vec();
    // Extended topology is written anew below; leaf 0x1f (dies) is left out.
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_0026));
    for entry in &mut entries {
        match (entry.function, entry.index) {
            (0, _) => entry.eax = entry.eax.max(0xb),
            (1, _) => {
                entry.ecx |= ECX_HYPERVISOR;
                set_bit(&mut entry.ecx, ECX_TSC_DEADLINE, deadline);
                // Brand and CLFLUSH size stay; processors per package and APIC id are ours.
                entry.ebx = entry.ebx & 0xffff | id << 24 | (1 << core_bits) << 16;
                set_bit(&mut entry.edx, EDX_HTT, count > 1);
            }
            // Intel: a cache's sharing processors in EAX 25:14, cores per package in EAX 31:26.
            (4, _) => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << core_bits) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << core_bits) - 1) << 26;
            }
            (0x8000_0001, _) => set_bit(&mut entry.ecx, ECX_CMP_LEGACY, false),
            // AMD: bits of the core number in ECX 15:12, cores less one in ECX 7:0.
            (0x8000_0008, _) => entry.ecx = core_bits << 12 | (count - 1),
            // AMD: as leaf 4.
            (0x8000_001d, _) => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            // AMD: extended APIC id, core id with one thread per core, one node.
            (0x8000_001e, _) => {
                (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0);
            }
            _ => {}
        }
    }
    for (index, shift, processors, kind) in [(0, 0, 1, 1), (1, core_bits, count, 2), (2, 0, 0, 0)] {
        entries.push(kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: kind << 8 | index,
            edx: id,
            ..Default::default()
        });
    }
    CpuId::from_entries(&entries).map_err(|_| Error::KvmLacks("room for CPUID leaves"))
}

fn set_bit(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit
    } else {
        *register &= !bit
    }
}
