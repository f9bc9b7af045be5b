//! CPUID as the guest sees it: what KVM supports on this host, with the machine's own topology.
//!
//! Each vCPU is a core of one socket, without hyper-threads; its APIC id is its number. Caches from
//! the third level on are shared by all cores, those before belong to one. Extended state is in
//! [`xstate`].

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::leaves::Leaves;
use super::{probe, xstate};
use crate::error::Error;

/// Leaf 1, EDX: several logical processors in this package.
const EDX_HTT: u32 = 1 << 28;
/// Leaf 1, ECX: the local APIC's timer takes a TSC deadline.
const ECX_TSC_DEADLINE: u32 = 1 << 24;
/// KVM's features (Linux, Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;
/// KVM_FEATURE_ASYNC_PF, KVM_FEATURE_ASYNC_PF_VMEXIT, KVM_FEATURE_ASYNC_PF_INT.
const EAX_ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;
/// Leaf 1: Intel's virtualisation.
const ECX_VMX: u32 = 1 << 5;
/// Leaf 0x8000_0001: AMD's virtualisation, described in leaf 0x8000_000a.
const ECX_SVM: u32 = 1 << 2;
/// Leaf 1, ECX: runs under a hypervisor. Linux looks for KVM's clock only if this is set.
const ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 0x8000_0001, ECX, AMD only: the logical processors that HTT speaks of are cores.
const ECX_CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x8000_0001, ECX, AMD only: leaves 0x8000_001D and 0x8000_001E are there.
const ECX_TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// What a guest of this machine may be shown on this host.
#[derive(Debug, Clone)]
pub(crate) struct Shown {
    leaves: Leaves,
    tsc_deadline: bool,
}

impl Shown {
    /// What KVM supports here and what works.
    pub fn on_this_host(kvm: &Kvm) -> Result<Self, Error> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("list CPUID leaves"))?;
        let mut shown = Self::new(
            supported.as_slice(),
            kvm.check_extension(Cap::TscDeadlineTimer),
        );
        let has_xsave = |leaves: &Leaves| {
            leaves
                .get(1, 0)
                .is_some_and(|entry| entry.ecx & xstate::ECX_XSAVE != 0)
        };
        if has_xsave(&shown.leaves) && !probe::xsetbv_reaches_kvm(kvm) {
            xstate::hide(&mut shown.leaves);
        }
        Ok(shown)
    }

    fn new(supported: &[kvm_cpuid_entry2], tsc_deadline: bool) -> Self {
        let mut leaves = Leaves::from(supported);
        xstate::make_consistent(&mut leaves);
        Self {
            leaves,
            tsc_deadline,
        }
    }

    /// Physical address bits.
    pub fn physical_address_bits(&self) -> u8 {
        self.leaves
            .get(0x8000_0008, 0)
            .map_or(36, |entry| entry.eax as u8)
    }

    /// CPUID of vCPU `index` of `count`.
    pub fn for_vcpu(&self, index: u8, count: u8) -> Leaves {
        let mut leaves = self.leaves.clone();
        let topology = Topology {
            id: u32::from(index),
            count: u32::from(count),
        };
        topology.write(&mut leaves);
        if let Some(entry) = leaves.get_mut(1, 0) {
            entry.ecx |= ECX_HYPERVISOR;
            set_bit(&mut entry.ecx, ECX_TSC_DEADLINE, self.tsc_deadline);
        }
        hide_what_has_no_state(&mut leaves);
        leaves
    }
}

/// Hides what a guest could have under way that no state tells: page faults that KVM tells it of
/// when they are done (a task that waits for that would wait for ever after a restore), and VMs of
/// its own.
fn hide_what_has_no_state(leaves: &mut Leaves) {
    if let Some(entry) = leaves.get_mut(KVM_FEATURES, 0) {
        entry.eax &= !EAX_ASYNC_PAGE_FAULTS;
    }
    if let Some(entry) = leaves.get_mut(1, 0) {
        entry.ecx &= !ECX_VMX;
    }
    if let Some(entry) = leaves.get_mut(0x8000_0001, 0) {
        entry.ecx &= !ECX_SVM;
    }
    leaves.remove(0x8000_000a);
}

/// Where a vCPU is among the others.
struct Topology {
    id: u32,
    count: u32,
}

impl Topology {
    /// Bits of the APIC id that number cores.
    fn core_bits(&self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }

    fn write(&self, leaves: &mut Leaves) {
        let Self { id, count } = *self;
        let core_bits = self.core_bits();
        let amd = is_amd(leaves);
        // Extended topology is written anew below; leaves 0x1f and 0x8000_0026 (dies) are left out.
        for leaf in [0xb, 0x1f, 0x8000_0026] {
            leaves.remove(leaf);
        }
        let extensions = amd
            && leaves
                .get(0x8000_0001, 0)
                .is_some_and(|entry| entry.ecx & ECX_TOPOLOGY_EXTENSIONS != 0);
        if !extensions {
            leaves.remove(0x8000_001d);
            leaves.remove(0x8000_001e);
        }
        for entry in leaves.iter_mut() {
            match entry.function {
                0 => entry.eax = entry.eax.max(0xb),
                1 => {
                    // Brand and CLFLUSH size stay; processors per package and APIC id are ours.
                    entry.ebx = entry.ebx & 0xffff | id << 24 | (1 << core_bits) << 16;
                    set_bit(&mut entry.edx, EDX_HTT, count > 1);
                }
                // Intel: a cache's sharing processors in EAX 25:14, cores per package in EAX 31:26.
                4 if cache_type(entry) != 0 => {
                    let sharing = if cache_level(entry) >= 3 {
                        (1 << core_bits) - 1
                    } else {
                        0
                    };
                    entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << core_bits) - 1) << 26;
                }
                0x8000_0001 => set_bit(&mut entry.ecx, ECX_CMP_LEGACY, amd && count > 1),
                // Bits of the core number in ECX 15:12, cores less one in ECX 7:0; reserved
                // elsewhere.
                0x8000_0008 => {
                    entry.ecx = if amd {
                        core_bits << 12 | (count - 1)
                    } else {
                        0
                    };
                }
                // As leaf 4.
                0x8000_001d if cache_type(entry) != 0 => {
                    let sharing = if cache_level(entry) >= 3 {
                        count - 1
                    } else {
                        0
                    };
                    entry.eax = entry.eax & 0x3fff | sharing << 14;
                }
                // Extended APIC id, core id with one thread per core, one node.
                0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
                _ => {}
            }
        }
        let levels = [(0, 0, 1, 1), (1, core_bits, count, 2), (2, 0, 0, 0)];
        for (index, shift, processors, kind) in levels {
            leaves.push(kvm_cpuid_entry2 {
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
    }
}

/// Type of the cache that a sub-leaf describes: 0 ends the list.
fn cache_type(entry: &kvm_cpuid_entry2) -> u32 {
    entry.eax & 0x1f
}

fn cache_level(entry: &kvm_cpuid_entry2) -> u32 {
    entry.eax >> 5 & 7
}

/// AMD, and Hygon, which has its leaves.
fn is_amd(leaves: &Leaves) -> bool {
    let name = leaves.get(0, 0).map(|entry| {
        let mut name = [0; 12];
        for (bytes, register) in name
            .chunks_exact_mut(4)
            .zip([entry.ebx, entry.edx, entry.ecx])
        {
            bytes.copy_from_slice(&register.to_le_bytes());
        }
        name
    });
    name.is_some_and(|name| matches!(&name, b"AuthenticAMD" | b"HygonGenuine"))
}

fn set_bit(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit
    } else {
        *register &= !bit
    }
}

#[cfg(test)]
#[path = "cpuid_tests.rs"]
mod tests;
