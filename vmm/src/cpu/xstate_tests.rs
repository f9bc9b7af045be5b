//! Leaf 0xD over what different hosts support.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

/// What a guest adds up: the size by the components' places equals what the leaf says. This is what
/// Linux checks in `paranoid_xstate_size_valid`, for all components enabled and for those after
/// power-on.
fn assert_consistent(leaves: &Leaves) {
    let xsave = is_set(leaves, features(1, 0, Ecx, ECX_XSAVE));
    let Some(main) = leaves.get(LEAF, 0).copied() else {
        assert!(!xsave, "XSAVE without leaf 0xD");
        for group in GROUPS.iter().filter(|g| g.components & SAVED_BY_USER != 0) {
            for bits in group.shown_by.iter().chain(group.needing) {
                assert!(!is_set(leaves, *bits), "{bits:?} without XSAVE");
            }
        }
        return;
    };
    assert!(xsave, "leaf 0xD without XSAVE");
    let user = u64::from(main.edx) << 32 | u64::from(main.eax);
    assert_eq!(user & X87_SSE, X87_SSE);
    let methods = *leaves.get(LEAF, 1).unwrap();
    let supervisor = u64::from(methods.edx) << 32 | u64::from(methods.ecx);
    assert_eq!(user & supervisor, 0);
    if methods.eax & XSAVES == 0 {
        assert_eq!(supervisor, 0, "components of IA32_XSS without XSAVES");
    }
    let described = |leaf| leaves.get(leaf, 0).is_some();
    assert!(user & AMX != 0 || !described(TILES) && !described(TILE_MULTIPLICATION));
    assert!(is_set(leaves, features(7, 0, Ebx, PROCESSOR_TRACE)) || !described(TRACE));
    let mut end = LEGACY_AND_HEADER;
    for i in 2..64 {
        let entry = leaves.get(LEAF, i);
        assert_eq!(entry.is_some(), (user | supervisor) >> i & 1 == 1, "{i}");
        let Some(entry) = entry else { continue };
        assert_ne!(entry.eax, 0);
        assert_eq!(entry.ecx & SUPERVISOR != 0, supervisor >> i & 1 == 1);
        if user >> i & 1 == 1 {
            assert!(entry.ebx >= LEGACY_AND_HEADER);
            end = end.max(entry.ebx + entry.eax);
        } else {
            assert_eq!(entry.ebx, 0);
        }
    }
    assert_eq!(main.ecx, end, "size of all components");
    assert_eq!(main.ebx, LEGACY_AND_HEADER, "size after power-on");
    let compacts = methods.eax & (XSAVEC | XSAVES) != 0;
    assert_eq!(methods.ebx, if compacts { LEGACY_AND_HEADER } else { 0 });
    for group in &GROUPS {
        let some = group.components & (user | supervisor);
        assert!(
            some == 0 || some == group.components,
            "half a group: {some:#x}"
        );
        let shown = group.shown_by.iter().any(|bits| is_set(leaves, *bits));
        assert!(some == 0 || shown, "components {some:#x} without a feature");
        if group.components & SAVED_BY_USER != 0 && some == 0 {
            for bits in group.shown_by.iter().chain(group.needing) {
                assert!(!is_set(leaves, *bits), "{bits:?} without its state");
            }
        }
    }
    assert!(user & AVX512 == 0 || user & AVX != 0, "AVX-512 without AVX");
}

const XSAVE_AVX: u32 = 1 << 26 | 1 << 28;

/// The emulated AMD server of the lab, as KVM's list in it is.
fn nested_lab_host() -> Leaves {
    Leaves::of(&[
        (0, 0, [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        (1, 0, [0, 0, XSAVE_AVX | 1 << 29, 0]),
        (7, 0, [0, 1 << 5, 1 << 3, 0]),
        (0xd, 0, [0x207, 0xa88, 0xa88, 0]),
        (0xd, 1, [5, 0, 0, 0]),
        (0xd, 2, [0x100, 0x240, 0, 0]),
        (0xd, 9, [8, 0xa80, 0, 0]),
    ])
}

/// A large Intel server: AVX-512, protection keys, AMX, supervisor states.
fn intel_server() -> Leaves {
    Leaves::of(&[
        (0, 0, [0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        (1, 0, [0, 0, XSAVE_AVX | 1 << 12 | 1 << 27, 0]),
        (
            7,
            0,
            [
                2,
                1 << 5 | 1 << 16 | 1 << 17 | 1 << 31 | 1 << 25,
                1 << 1 | 1 << 3 | 1 << 4 | 1 << 7 | 1 << 11,
                1 << 20 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 25,
            ],
        ),
        (7, 1, [1 << 4 | 1 << 5 | 1 << 21, 0, 0, 0]),
        (0xd, 0, [0x602e7, 0x2b00, 0x2b00, 0]),
        (0xd, 1, [0x1f, 0x2b00, 0x1800, 0]),
        (0xd, 2, [0x100, 0x240, 0, 0]),
        (0xd, 5, [0x40, 0x440, 0, 0]),
        (0xd, 6, [0x200, 0x480, 0, 0]),
        (0xd, 7, [0x400, 0x680, 0, 0]),
        (0xd, 9, [8, 0xa80, 0, 0]),
        (0xd, 0xb, [0x10, 0, 1, 0]),
        (0xd, 0xc, [0x18, 0, 1, 0]),
        (0xd, 0x11, [0x40, 0xac0, 2, 0]),
        (0xd, 0x12, [0x2000, 0xb00, 6, 0]),
        (0x14, 0, [1, 0xf, 7, 0]),
        (0x1d, 0, [1, 0, 0, 0]),
        (0x1d, 1, [0x0400_2000, 0x0008_0040, 0x10, 0]),
        (0x1e, 0, [0, 0x4010, 0, 0]),
    ])
}

#[test]
fn a_list_that_agrees_stays_but_for_sizes_after_power_on() {
    let mut leaves = nested_lab_host();
    make_consistent(&mut leaves);
    assert_consistent(&leaves);
    let main = leaves.get(LEAF, 0).unwrap();
    assert_eq!((main.eax, main.ebx, main.ecx), (0x207, 576, 0xa88));
    assert!(is_set(&leaves, features(7, 0, Ecx, 1 << 3)));
    assert!(is_set(&leaves, features(7, 0, Ebx, 1 << 5)));
}

#[test]
fn a_large_intel_server_shows_what_a_machine_can_save() {
    let mut leaves = intel_server();
    make_consistent(&mut leaves);
    assert_consistent(&leaves);
    let main = *leaves.get(LEAF, 0).unwrap();
    // AMX needs more room than an area that is saved has.
    assert_eq!((main.eax, main.ecx), (0x2e7, 0xa88));
    assert!(!is_set(
        &leaves,
        features(7, 0, Edx, 1 << 22 | 1 << 24 | 1 << 25)
    ));
    assert!(!is_set(&leaves, features(7, 1, Eax, 1 << 21)));
    assert!(is_set(&leaves, features(7, 0, Ebx, 1 << 16)));
    assert_eq!(leaves.get(LEAF, 1).unwrap().eax & XFD, 0);
    assert_eq!(leaves.get(LEAF, 1).unwrap().ecx, 0x1800);
    assert!(leaves.get(TILES, 0).is_none() && leaves.get(TILE_MULTIPLICATION, 0).is_none());
    assert!(leaves.get(TRACE, 0).is_some());
    assert!(!is_set(&leaves, features(1, 0, Ecx, ECX_OSXSAVE)));
    assert!(!is_set(&leaves, features(7, 0, Ecx, ECX_OSPKE)));
}

#[test]
fn components_whose_feature_is_absent_go() {
    let mut leaves = nested_lab_host();
    leaves.get_mut(7, 0).unwrap().ecx = 0;
    make_consistent(&mut leaves);
    assert_consistent(&leaves);
    let main = leaves.get(LEAF, 0).unwrap();
    assert_eq!((main.eax, main.ecx), (7, 0x340));
    assert!(leaves.get(LEAF, 9).is_none());
}

#[test]
fn features_whose_component_is_absent_go() {
    let mut leaves = intel_server();
    leaves.get_mut(LEAF, 0).unwrap().eax = 3;
    make_consistent(&mut leaves);
    assert_consistent(&leaves);
    assert!(!is_set(&leaves, features(1, 0, Ecx, 1 << 12 | 1 << 28)));
    assert!(!is_set(
        &leaves,
        features(7, 0, Ebx, 1 << 5 | 1 << 16 | 1 << 17)
    ));
    assert!(!is_set(&leaves, features(7, 0, Ecx, 1 << 3)));
}

#[test]
fn avx512_goes_with_avx() {
    let mut leaves = intel_server();
    leaves.get_mut(1, 0).unwrap().ecx &= !(1 << 28);
    make_consistent(&mut leaves);
    assert_consistent(&leaves);
    assert_eq!(leaves.get(LEAF, 0).unwrap().eax, 0x203);
    assert!(!is_set(&leaves, features(7, 0, Ebx, 1 << 16)));
}

#[test]
fn a_component_that_is_listed_as_both_kinds_is_of_one() {
    let mut leaves = intel_server();
    leaves.get_mut(1, 0).unwrap().ecx &= !(1 << 28);
    leaves.get_mut(LEAF, 1).unwrap().ecx |= 0xe0;
    make_consistent(&mut leaves);
    assert_consistent(&leaves);
    assert_eq!(leaves.get(LEAF, 1).unwrap().ecx, 0x1800);
}

#[test]
fn hidden_means_as_if_never_there() {
    let mut leaves = intel_server();
    make_consistent(&mut leaves);
    hide(&mut leaves);
    assert_consistent(&leaves);
    assert!(leaves.get(LEAF, 0).is_none());
}

proptest! {
    /// Whatever a host says, what is shown agrees with itself.
    #[test]
    fn any_list_becomes_one_that_agrees(
        features in any::<[u32; 10]>(),
        main in any::<[u32; 4]>(),
        second in any::<[u32; 4]>(),
        components in proptest::collection::vec((any::<bool>(), any::<[u32; 4]>()), 62),
        plausible in any::<bool>(),
    ) {
        let mut entries = vec![
            (1, 0, [0, 0, features[0] | ECX_XSAVE, features[1]]),
            (7, 0, [2, features[2], features[3], features[4]]),
            (7, 1, [features[5], 0, 0, features[6]]),
            (0x8000_0001, 0, [0, 0, features[7], features[8]]),
            (LEAF, 0, [main[0] | 3, main[1], main[2], main[3]]),
            (LEAF, 1, second),
            (TRACE, 0, second),
            (TILES, 0, main),
        ];
        for (i, (there, registers)) in components.into_iter().enumerate() {
            let [mut eax, mut ebx, mut ecx, edx] = registers;
            if plausible {
                (eax, ebx, ecx) = (eax & 0xff | 1, 576 + (ebx & 0x3ff), ecx & 0b11);
            }
            if there {
                entries.push((LEAF, i as u32 + 2, [eax, ebx, ecx, edx]));
            }
        }
        let mut leaves = Leaves::of(&entries);
        make_consistent(&mut leaves);
        assert_consistent(&leaves);
        let once = format!("{leaves:?}");
        make_consistent(&mut leaves);
        prop_assert_eq!(once, format!("{leaves:?}"));
        hide(&mut leaves);
        assert_consistent(&leaves);
    }
}
