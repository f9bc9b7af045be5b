//! Topology and caches over what different hosts support.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::cpu::leaves::Entry;

const INTEL: [u32; 4] = [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69];
const AMD: [u32; 4] = [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65];

fn shown(entries: &[Entry]) -> Shown {
    Shown::new(Leaves::of(entries).as_slice(), true)
}

/// A server with many cores, two threads each: caches shared by many.
fn intel_server() -> Shown {
    shown(&[
        (0, 0, INTEL),
        (1, 0, [0, 0x2010_0800, 0, EDX_HTT]),
        (4, 0, [0x1c00_4121, 0x01c0_003f, 0x3f, 0]),
        (4, 2, [0x1c00_4143, 0x03c0_003f, 0x3ff, 0]),
        (4, 3, [0x1c03_c163, 0x0280_003f, 0xbfff, 4]),
        (4, 4, [0, 0, 0, 0]),
        (0xb, 0, [1, 2, 0x100, 0]),
        (0xb, 1, [6, 40, 0x201, 0]),
        (0x1f, 0, [1, 2, 0x100, 0]),
        (0x8000_0001, 0, [0, 0, 0x121, 0]),
        (0x8000_0008, 0, [0x302e, 0, 0, 0]),
    ])
}

fn amd_server(extensions: u32) -> Shown {
    shown(&[
        (0, 0, AMD),
        (1, 0, [0, 0x2010_0800, 0, EDX_HTT]),
        (4, 0, [0, 0, 0, 0]),
        (0xb, 0, [1, 2, 0x100, 0]),
        (0x8000_0001, 0, [0, 0, ECX_CMP_LEGACY | extensions, 0]),
        (0x8000_0008, 0, [0x3030, 0, 0x707f, 0]),
        (0x8000_001d, 0, [0x4121, 0x01c0_003f, 0x3f, 0]),
        (0x8000_001d, 3, [0x3_c163, 0x03c0_003f, 0x7fff, 1]),
        (0x8000_001d, 4, [0, 0, 0, 0]),
        (0x8000_001e, 0, [7, 0x103, 0x200, 0]),
        (0x8000_0026, 0, [1, 2, 0x100, 0]),
    ])
}

fn get(leaves: &Leaves, function: u32, index: u32) -> [u32; 4] {
    let entry = leaves.get(function, index).unwrap();
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

/// What holds for each vCPU of each machine on each host.
fn check(shown: &Shown, amd: bool) {
    for count in 1..=crate::MAX_VCPUS {
        let bits = u32::from(count).next_power_of_two().trailing_zeros();
        for index in 0..count {
            let leaves = shown.for_vcpu(index, count);
            let (id, count) = (u32::from(index), u32::from(count));
            let [_, ebx, ecx, edx] = get(&leaves, 1, 0);
            assert_eq!((ebx >> 24, ebx >> 16 & 0xff), (id, 1 << bits));
            assert_eq!(edx & EDX_HTT != 0, count > 1);
            assert_eq!(ecx & ECX_HYPERVISOR, ECX_HYPERVISOR);
            // Threads, then cores, then the end; the APIC id in each.
            assert_eq!(get(&leaves, 0xb, 0), [0, 1, 0x100, id]);
            assert_eq!(get(&leaves, 0xb, 1), [bits, count, 0x201, id]);
            assert_eq!(get(&leaves, 0xb, 2), [0, 0, 2, id]);
            assert!(leaves.get(0x1f, 0).is_none() && leaves.get(0x8000_0026, 0).is_none());
            let [_, _, features, _] = get(&leaves, 0x8000_0001, 0);
            assert_eq!(features & ECX_CMP_LEGACY != 0, amd && count > 1);
            let [_, _, cores, _] = get(&leaves, 0x8000_0008, 0);
            assert_eq!(cores, if amd { bits << 12 | (count - 1) } else { 0 });
        }
    }
}

#[test]
fn cores_of_an_intel_machine_agree_in_all_leaves() {
    let shown = intel_server();
    check(&shown, false);
    let leaves = shown.for_vcpu(2, 6);
    // Caches of a core are shared by one processor, the last one by all eight that there could be.
    assert_eq!(get(&leaves, 4, 0)[0], 7 << 26 | 0x121);
    assert_eq!(get(&leaves, 4, 2)[0], 7 << 26 | 0x143);
    assert_eq!(get(&leaves, 4, 3)[0], 7 << 26 | 7 << 14 | 0x163);
    assert_eq!(get(&leaves, 4, 4), [0; 4], "the end of the list");
    assert_eq!(shown.physical_address_bits(), 46);
}

#[test]
fn cores_of_an_amd_machine_agree_in_all_leaves() {
    let shown = amd_server(ECX_TOPOLOGY_EXTENSIONS);
    check(&shown, true);
    let leaves = shown.for_vcpu(2, 6);
    assert_eq!(get(&leaves, 4, 0), [0; 4], "no cache by Intel's leaf");
    assert_eq!(get(&leaves, 0x8000_001d, 0)[0], 0x121);
    assert_eq!(get(&leaves, 0x8000_001d, 3)[0], 5 << 14 | 0x163);
    assert_eq!(get(&leaves, 0x8000_001d, 4), [0; 4]);
    assert_eq!(get(&leaves, 0x8000_001e, 0), [2, 2, 0, 0]);
}

#[test]
fn topology_extensions_are_absent_as_a_whole() {
    let leaves = amd_server(0).for_vcpu(0, 2);
    assert!(leaves.get(0x8000_001d, 0).is_none());
    assert!(leaves.get(0x8000_001e, 0).is_none());
}

#[test]
fn what_kvm_gives_here_is_consistent_and_taken_by_kvm() {
    let kvm = crate::kvm::open().expect("this host has no usable KVM");
    let shown = Shown::on_this_host(&kvm).unwrap();
    let vm = crate::kvm::create_empty_vm(&kvm).unwrap();
    for index in 0..2 {
        let vcpu = vm.create_vcpu(u64::from(index)).unwrap();
        vcpu.set_cpuid2(&shown.for_vcpu(index, 2).to_kvm().unwrap())
            .unwrap();
    }
}

#[test]
fn what_has_no_state_is_hidden() {
    let host = shown(&[
        (0, 0, AMD),
        (1, 0, [0, 0x2010_0800, ECX_VMX, 0]),
        (KVM_FEATURES, 0, [0x0100_7efb, 0, 0, 0]),
        (0x8000_0001, 0, [0, 0, ECX_SVM | 1, 0]),
        (0x8000_000a, 0, [1, 8, 0, 1]),
    ]);
    let leaves = host.for_vcpu(0, 1);
    assert_eq!(leaves.get(1, 0).unwrap().ecx & ECX_VMX, 0);
    assert_eq!(leaves.get(0x8000_0001, 0).unwrap().ecx & 0xff, 1);
    assert!(leaves.get(0x8000_000a, 0).is_none());
    // KVM's clock, steal time and end of interrupt stay.
    let features = leaves.get(KVM_FEATURES, 0).unwrap().eax;
    assert_eq!(features, 0x0100_7efb & !(1 << 4 | 1 << 10 | 1 << 14));
    assert_eq!(
        features & (1 << 3 | 1 << 5 | 1 << 6),
        1 << 3 | 1 << 5 | 1 << 6
    );
}

/// What the leaves of each vCPU say of the others, and of the caches that it shares with them
/// (Intel SDM, volume 3, section 10.9; AMD APM, volume 3, appendix E).
fn assert_topology(shown: &Shown, count: u8) {
    let bits = u32::from(count).next_power_of_two().trailing_zeros();
    let all = shown.for_vcpu(0, count);
    let amd = is_amd(&all);
    for index in 0..count {
        let leaves = shown.for_vcpu(index, count);
        let (id, count) = (u32::from(index), u32::from(count));
        assert_eq!(get(&leaves, 0xb, 0), [0, 1, 0x100, id]);
        assert_eq!(get(&leaves, 0xb, 1), [bits, count, 0x201, id]);
        assert!(leaves.get(0, 0).is_none_or(|entry| entry.eax >= 0xb));
        for entry in leaves.as_slice() {
            let [eax, ebx, ecx, edx] = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            let sharing = eax >> 14 & 0xfff;
            let shared = if eax >> 5 & 7 >= 3 { count } else { 1 };
            match entry.function {
                1 => {
                    assert_eq!((ebx >> 24, ebx >> 16 & 0xff), (id, 1 << bits));
                    assert_eq!(edx & EDX_HTT != 0, count > 1);
                }
                4 if eax & 0x1f != 0 => {
                    assert_eq!(eax >> 26, (1 << bits) - 1, "cores of the package");
                    assert_eq!(sharing + 1, shared.next_power_of_two());
                }
                0x8000_001d if eax & 0x1f != 0 => assert_eq!(sharing + 1, shared),
                0x8000_001e => assert_eq!((eax, ebx, ecx), (id, id, 0)),
                0x8000_0008 if amd => assert_eq!(ecx, bits << 12 | (count - 1)),
                0x8000_0008 => assert_eq!(ecx, 0),
                0x1f | 0x8000_0026 => panic!("a leaf with the host's dies"),
                _ => {}
            }
            // The same but for its own number.
            let first = all.get(entry.function, entry.index).unwrap();
            match entry.function {
                1 => assert_eq!((eax, ebx << 8, edx), (first.eax, first.ebx << 8, first.edx)),
                0xb => assert_eq!((eax, ebx, ecx), (first.eax, first.ebx, first.ecx)),
                0x8000_001e => assert_eq!((ecx, edx), (first.ecx, first.edx)),
                _ => assert_eq!(entry, first),
            }
        }
    }
}

proptest! {
    /// Whatever a host says of its own cores and caches, a machine's are its own, for any number of
    /// vCPUs.
    #[test]
    fn topology_is_the_machines_whatever_the_hosts_is(
        registers in proptest::collection::vec(any::<[u32; 4]>(), 16),
        vendor in prop_oneof![Just(INTEL), Just(AMD)],
        there in any::<u16>(),
        count in 1..=crate::MAX_VCPUS,
    ) {
        let places = [
            (1, 0), (4, 0), (4, 1), (4, 2), (4, 3), (0xb, 0), (0xb, 1), (0x1f, 0), (0x8000_0001, 0), (0x8000_0008, 0),
            (0x8000_001d, 0), (0x8000_001d, 1), (0x8000_001d, 2), (0x8000_001d, 3), (0x8000_001e, 0), (0x8000_0026, 0),
        ];
        let mut entries = vec![(0, 0, vendor)];
        for (number, ((function, index), registers)) in places.into_iter().zip(registers).enumerate() {
            if there >> number & 1 == 1 {
                entries.push((function, index, registers));
            }
        }
        assert_topology(&shown(&entries), count);
    }
}
