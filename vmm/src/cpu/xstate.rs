//! Extended state in CPUID: which state components XSAVE knows, where they lie, how large an area
//! is.
//!
//! Leaf 0xD has to agree with itself and with the feature bits of other leaves (Intel's manual,
//! volume 1, chapter 13; AMD's, volume 2, section 11.5, and volume 3, appendix E.4.9). A guest adds
//! the sizes up and does not go on where they differ: Linux 6.1 warns and does without XSAVE, 7.2
//! panics. KVM's list of what it supports agrees on most hosts; here it is made to.
//!
//! ```text
//!  standard format:   0 legacy 512 header 576 ... each component at the offset of its sub-leaf (EBX)
//!  compacted format:  0 legacy 512 header 576 each component behind the one before, some at multiples of 64
//! ```

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::leaves::Leaves;

/// The leaf of this module.
pub(super) const LEAF: u32 = 0xd;
/// Legacy region and header of an XSAVE area, in bytes: x87 and SSE state are in it.
const LEGACY_AND_HEADER: u32 = 576;
/// Components 0 and 1, x87 and SSE: there wherever XSAVE is.
const X87_SSE: u64 = 0b11;
/// Component 0, all that is enabled after power-on.
const X87: u64 = 0b1;
/// Highest component that there can be: bit 63 of XCR0 is reserved.
const LAST_COMPONENT: u32 = 62;
/// Bytes of the standard format that a machine can save: size of `kvm_xsave`.
const MAX_STANDARD_BYTES: u32 = 4096;

/// Leaf 1, ECX: XSAVE, XCR0 and leaf 0xD are there.
pub(super) const ECX_XSAVE: u32 = 1 << 26;
/// Leaf 1, ECX: the guest has set CR4.OSXSAVE. KVM shows it when that is so.
const ECX_OSXSAVE: u32 = 1 << 27;
/// Leaf 7, ECX: the guest has set CR4.PKE. KVM shows it when that is so.
const ECX_OSPKE: u32 = 1 << 4;

/// Leaves that describe a feature and are there with it only (Intel SDM volume 2A, CPUID): AMX's
/// palettes and its multiplication, processor trace.
const TILES: u32 = 0x1d;
const TILE_MULTIPLICATION: u32 = 0x1e;
const TRACE: u32 = 0x14;
/// Leaf 7, EBX: processor trace.
const PROCESSOR_TRACE: u32 = 1 << 25;

/// Leaf 0xD, sub-leaf 1, EAX.
const XSAVEC: u32 = 1 << 1;
const XSAVES: u32 = 1 << 3;
const XFD: u32 = 1 << 4;

/// Sub-leaf of a component, ECX: in IA32_XSS, not in XCR0.
const SUPERVISOR: u32 = 1 << 0;
/// Sub-leaf of a component, ECX: at a multiple of 64 bytes in the compacted format.
const ALIGNED: u32 = 1 << 1;

/// A register of a leaf that has feature bits.
#[derive(Debug, Clone, Copy)]
struct Features {
    leaf: u32,
    index: u32,
    register: Register,
    bits: u32,
}

#[derive(Debug, Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

const fn features(leaf: u32, index: u32, register: Register, bits: u32) -> Features {
    Features {
        leaf,
        index,
        register,
        bits,
    }
}

use Register::{Eax, Ebx, Ecx, Edx};

/// Components that go together, the feature that they belong to, and what else needs them.
struct Group {
    components: u64,
    /// Any of these shows that the components are there.
    shown_by: &'static [Features],
    /// What cannot be without the components, besides `shown_by`.
    needing: &'static [Features],
}

const GROUPS: [Group; 9] = [
    // AVX: the upper halves of YMM registers.
    Group {
        components: 1 << 2,
        shown_by: &[features(1, 0, Ecx, 1 << 28)],
        needing: &[
            // FMA, F16C.
            features(1, 0, Ecx, 1 << 12 | 1 << 29),
            // AVX2; VAES, VPCLMULQDQ.
            features(7, 0, Ebx, 1 << 5),
            features(7, 0, Ecx, 1 << 9 | 1 << 10),
            // SHA512, SM3, SM4, AVX-VNNI, AVX-IFMA; AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16.
            features(7, 1, Eax, 0b111 | 1 << 4 | 1 << 23),
            features(7, 1, Edx, 1 << 4 | 1 << 5 | 1 << 10 | 1 << 19),
            // AMD: XOP, FMA4.
            features(0x8000_0001, 0, Ecx, 1 << 11 | 1 << 16),
        ],
    },
    // MPX: bound registers, BNDCSR.
    Group {
        components: 0b11 << 3,
        shown_by: &[features(7, 0, Ebx, 1 << 14)],
        needing: &[],
    },
    // AVX-512: opmask, ZMM_Hi256, Hi16_ZMM.
    Group {
        components: 0b111 << 5,
        shown_by: &[features(7, 0, Ebx, 1 << 16)],
        needing: &[
            // DQ, IFMA, PF, ER, CD, BW, VL.
            features(
                7,
                0,
                Ebx,
                1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31,
            ),
            // VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ.
            features(7, 0, Ecx, 1 << 1 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14),
            // 4VNNIW, 4FMAPS, VP2INTERSECT, FP16.
            features(7, 0, Edx, 1 << 2 | 1 << 3 | 1 << 8 | 1 << 23),
            // BF16.
            features(7, 1, Eax, 1 << 5),
        ],
    },
    // Processor trace.
    Group {
        components: 1 << 8,
        shown_by: &[features(7, 0, Ebx, PROCESSOR_TRACE)],
        needing: &[],
    },
    // Protection keys: PKRU.
    Group {
        components: 1 << 9,
        shown_by: &[features(7, 0, Ecx, 1 << 3)],
        needing: &[],
    },
    // Control-flow enforcement: shadow stacks, indirect branch tracking; the bits do without
    // XSAVES.
    Group {
        components: 0b11 << 11,
        shown_by: &[features(7, 0, Ecx, 1 << 7), features(7, 0, Edx, 1 << 20)],
        needing: &[],
    },
    // User interrupts.
    Group {
        components: 1 << 14,
        shown_by: &[features(7, 0, Edx, 1 << 5)],
        needing: &[],
    },
    // Last branch records.
    Group {
        components: 1 << 15,
        shown_by: &[features(7, 0, Edx, 1 << 19)],
        needing: &[],
    },
    // AMX: TILECFG, TILEDATA.
    Group {
        components: 0b11 << 17,
        shown_by: &[features(7, 0, Edx, 1 << 24)],
        needing: &[
            // BF16, INT8.
            features(7, 0, Edx, 1 << 22 | 1 << 25),
            // FP16, COMPLEX.
            features(7, 1, Eax, 1 << 21),
            features(7, 1, Edx, 1 << 8),
        ],
    },
];

/// Makes leaf 0xD and the feature bits that depend on it agree. What only one of both knows is
/// shown by neither.
pub(super) fn make_consistent(leaves: &mut Leaves) {
    // The guest's own doing, which KVM adds.
    clear(leaves, features(1, 0, Ecx, ECX_OSXSAVE));
    clear(leaves, features(7, 0, Ecx, ECX_OSPKE));
    let mut user = user_components(leaves);
    if user & X87_SSE != X87_SSE {
        hide(leaves);
        return;
    }
    let main = leaves.get(LEAF, 1).copied().unwrap_or_default();
    let mut methods = main.eax;
    // A component is XCR0's or IA32_XSS's, never both's (volume 1, section 13.1).
    let known = GROUPS
        .iter()
        .fold(0, |known, group| known | group.components);
    user &= X87_SSE | SAVED_BY_USER;
    let mut supervisor = match methods & XSAVES {
        0 => 0,
        _ => (u64::from(main.edx) << 32 | u64::from(main.ecx)) & known & !SAVED_BY_USER,
    };
    for group in &GROUPS {
        let shown = group.shown_by.iter().any(|bits| is_set(leaves, *bits));
        let there = group.components & (user | supervisor) == group.components
            && described(leaves, group.components, user);
        if !shown || !there {
            user &= !group.components;
            supervisor &= !group.components;
        }
        // Supervisor components are a way to save state, not the only one: their features stay.
        let saved_by_user = group.components & SAVED_BY_USER != 0;
        if saved_by_user && (!shown || !there) {
            for bits in group.shown_by.iter().chain(group.needing) {
                clear(leaves, *bits);
            }
        }
    }
    // AVX-512 is an extension of AVX, in XCR0 too.
    if user & AVX == 0 && user & AVX512 != 0 {
        user &= !AVX512;
        clear_group(leaves, AVX512);
    }
    if user & AMX == 0 {
        methods &= !XFD;
        leaves.remove(TILES);
        leaves.remove(TILE_MULTIPLICATION);
    }
    if !is_set(leaves, features(7, 0, Ebx, PROCESSOR_TRACE)) {
        leaves.remove(TRACE);
    }
    write(leaves, user, supervisor, methods, main);
}

const AVX: u64 = 1 << 2;
const AVX512: u64 = 0b111 << 5;
const AMX: u64 = 0b11 << 17;
/// Components of XCR0: without them their feature cannot be used.
const SAVED_BY_USER: u64 = AVX | 0b11 << 3 | AVX512 | 1 << 9 | AMX;

/// Takes XSAVE away with all that needs it, as on a processor that never had it.
pub(super) fn hide(leaves: &mut Leaves) {
    clear(leaves, features(1, 0, Ecx, ECX_XSAVE | ECX_OSXSAVE));
    // AMD: lightweight profiling keeps its state in XSAVE areas.
    clear(leaves, features(0x8000_0001, 0, Ecx, 1 << 15));
    for group in &GROUPS {
        if group.components & SAVED_BY_USER != 0 {
            clear_group(leaves, group.components);
        }
    }
    for leaf in [LEAF, TILES, TILE_MULTIPLICATION] {
        leaves.remove(leaf);
    }
}

/// Components that XCR0 may have, by sub-leaf 0.
fn user_components(leaves: &Leaves) -> u64 {
    if !is_set(leaves, features(1, 0, Ecx, ECX_XSAVE)) {
        return 0;
    }
    leaves
        .get(LEAF, 0)
        .map_or(0, |main| u64::from(main.edx) << 32 | u64::from(main.eax))
}

/// Whether each of `components` has a sub-leaf that can be: with a size, of the right kind, behind
/// the header and within what can be saved.
fn described(leaves: &Leaves, components: u64, user: u64) -> bool {
    (2..=LAST_COMPONENT)
        .filter(|&i| components >> i & 1 == 1)
        .all(|i| {
            leaves.get(LEAF, i).is_some_and(|entry| {
                let is_user = user >> i & 1 == 1;
                let end = entry.ebx.checked_add(entry.eax);
                let placed = entry.ebx >= LEGACY_AND_HEADER
                    && end.is_some_and(|end| end <= MAX_STANDARD_BYTES);
                entry.eax != 0 && is_user == (entry.ecx & SUPERVISOR == 0) && (placed || !is_user)
            })
        })
}

/// Writes leaf 0xD anew.
fn write(leaves: &mut Leaves, user: u64, supervisor: u64, methods: u32, main: kvm_cpuid_entry2) {
    let components: Vec<kvm_cpuid_entry2> = (2..=LAST_COMPONENT)
        .filter(|&i| (user | supervisor) >> i & 1 == 1)
        .filter_map(|i| leaves.get(LEAF, i).copied())
        .collect();
    leaves.remove(LEAF);
    let entry = |index| kvm_cpuid_entry2 {
        function: LEAF,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        ..main
    };
    let compacted = match methods & (XSAVEC | XSAVES) {
        0 => 0,
        // XCR0 and IA32_XSS as after power-on. KVM brings this up to date when the guest sets them.
        _ => compacted_size(&components, X87),
    };
    leaves.push(kvm_cpuid_entry2 {
        eax: user as u32,
        ebx: standard_size(&components, X87),
        ecx: standard_size(&components, user),
        edx: (user >> 32) as u32,
        ..entry(0)
    });
    leaves.push(kvm_cpuid_entry2 {
        eax: methods,
        ebx: compacted,
        ecx: supervisor as u32,
        edx: (supervisor >> 32) as u32,
        ..entry(1)
    });
    for component in components {
        let is_user = user >> component.index & 1 == 1;
        leaves.push(kvm_cpuid_entry2 {
            eax: component.eax,
            ebx: if is_user { component.ebx } else { 0 },
            ecx: component.ecx,
            edx: 0,
            ..entry(component.index)
        });
    }
}

/// Bytes of an area in the standard format with `enabled` components of XCR0.
fn standard_size(components: &[kvm_cpuid_entry2], enabled: u64) -> u32 {
    components
        .iter()
        .filter(|entry| enabled >> entry.index & 1 == 1)
        .map(|entry| entry.ebx.saturating_add(entry.eax))
        .fold(LEGACY_AND_HEADER, u32::max)
}

/// Bytes of an area in the compacted format with `enabled` components of XCR0 and IA32_XSS.
fn compacted_size(components: &[kvm_cpuid_entry2], enabled: u64) -> u32 {
    components
        .iter()
        .filter(|entry| enabled >> entry.index & 1 == 1)
        .fold(LEGACY_AND_HEADER, |end, entry| {
            let start = match entry.ecx & ALIGNED {
                0 => end,
                _ => end.saturating_add(63) & !63,
            };
            start.saturating_add(entry.eax)
        })
}

fn clear_group(leaves: &mut Leaves, components: u64) {
    for group in GROUPS
        .iter()
        .filter(|group| group.components & components != 0)
    {
        for bits in group.shown_by.iter().chain(group.needing) {
            clear(leaves, *bits);
        }
    }
}

fn is_set(leaves: &Leaves, features: Features) -> bool {
    leaves
        .get(features.leaf, features.index)
        .is_some_and(|entry| {
            let value = match features.register {
                Eax => entry.eax,
                Ebx => entry.ebx,
                Ecx => entry.ecx,
                Edx => entry.edx,
            };
            value & features.bits != 0
        })
}

fn clear(leaves: &mut Leaves, features: Features) {
    if let Some(entry) = leaves.get_mut(features.leaf, features.index) {
        let register = match features.register {
            Eax => &mut entry.eax,
            Ebx => &mut entry.ebx,
            Ecx => &mut entry.ecx,
            Edx => &mut entry.edx,
        };
        *register &= !features.bits;
    }
}

#[cfg(test)]
#[path = "xstate_tests.rs"]
mod tests;
