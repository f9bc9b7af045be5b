//! What holds for any code.

use proptest::prelude::*;

use super::*;

/// All that may be done to the code keeps what is around it.
fn holds(code: &[u8], seed: u64) {
    let function = function(code);
    let sites = sites(&function);
    let head = if code.starts_with(&[0xf3, 0x0f, 0x1e, 0xfa]) {
        9
    } else {
        5
    };
    for site in &sites {
        assert!(site.offset >= head);
        for kind in Kind::ALL {
            let change = mutate(&function, *kind, site.offset, seed);
            assert_eq!(
                change.is_ok(),
                site.kinds.contains(kind),
                "{kind:?} {site:?}"
            );
            let Ok(change) = change else { continue };
            keeps_what_is_around(code, &change);
            assert_eq!((change.offset, &change.old_text), (site.offset, &site.text));
            assert_eq!(mutate(&function, *kind, site.offset, seed), Ok(change));
        }
    }
    let is_site = |offset| sites.iter().any(|site| site.offset == offset);
    for offset in (0..code.len() as u32 + 2).filter(|offset| !is_site(*offset)) {
        assert!(mutate(&function, Kind::Nop, offset, seed).is_err());
    }
}

/// Pieces of code as compilers make it.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 1..8),
        // A call of one of the functions that have names, or near it.
        (0_u8..2, 0_i32..24).prop_map(|(jump, to)| {
            let far = 0x0010_0000 + 0x100 * to;
            [&[0xe8 + jump], far.to_le_bytes().as_slice()].concat()
        }),
        (0x70_u8..0x80, any::<i8>()).prop_map(|(jcc, to)| vec![jcc, to as u8]),
        any::<[u8; 2]>().prop_map(|[modrm, value]| vec![0x48, 0x83, modrm, value]),
        any::<[u8; 4]>().prop_map(|[rex, opcode, modrm, sib]| {
            vec![0x40 | rex & 0xf, 0x88 | opcode & 3, modrm, sib, 0, 1, 0, 0]
        }),
        (0xb8_u8..0xc0, any::<u32>()).prop_map(|(mov, value)| [
            &[mov],
            value.to_le_bytes().as_slice()
        ]
        .concat()),
        Just(vec![0xf3, 0x48, 0xab]),
        Just(vec![0x85, 0xc0]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_bytes_keep_their_boundaries(code in proptest::collection::vec(any::<u8>(), 0..80), seed in any::<u64>()) {
        holds(&code, seed);
    }

    #[test]
    fn what_looks_like_code_keeps_its_boundaries(
        pieces in proptest::collection::vec(piece(), 0..20),
        endbr in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut code = if endbr { vec![0xf3, 0x0f, 0x1e, 0xfa] } else { Vec::new() };
        code.extend([0x0f, 0x1f, 0x44, 0x00, 0x00]);
        code.extend(pieces.concat());
        holds(&code, seed);
    }
}
