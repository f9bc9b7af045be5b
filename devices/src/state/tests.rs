//! What is stored comes back or is refused, whatever became of it.

use proptest::prelude::*;

use super::*;

const FORM: Form = Form {
    kind: "thing",
    version: 3,
};

/// A part as it comes back from where it was stored.
pub(crate) fn stored(part: &Part) -> Part {
    postcard::from_bytes(&postcard::to_stdvec(part).unwrap()).unwrap()
}

/// Random numbers that are the same in every run (xorshift64*).
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// One of `0..limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }
}

#[test]
fn another_kind_and_another_version_are_told() {
    let part = stored(&Part::new(FORM, &7u32).unwrap());
    assert_eq!(part.open::<u32>(FORM), Ok(7));
    let newer = Form { version: 4, ..FORM };
    assert!(matches!(
        part.open::<u32>(newer),
        Err(StateError::Version {
            found: 3,
            known: 4,
            ..
        })
    ));
    let other = Form {
        kind: "other",
        ..FORM
    };
    assert!(matches!(
        part.open::<u32>(other),
        Err(StateError::Kind { .. })
    ));
    // More or less than there should be.
    assert_eq!(part.open::<()>(FORM), Err(StateError::Damaged("thing")));
    assert!(part.open::<(u32, u32)>(FORM).is_err());
}

proptest! {
    #[test]
    fn a_part_that_was_cut_or_changed_is_refused(
        content in prop::collection::vec(any::<u64>(), 0..20),
        cut in any::<prop::sample::Index>(),
        flip in any::<prop::sample::Index>(),
    ) {
        let bytes = postcard::to_stdvec(&Part::new(FORM, &content).unwrap()).unwrap();
        let open = |bytes: &[u8]| -> Option<Vec<u64>> {
            let (part, rest) = postcard::take_from_bytes::<Part>(bytes).ok()?;
            rest.is_empty().then_some(())?;
            part.open(FORM).ok()
        };
        prop_assert_eq!(open(&bytes), Some(content));
        prop_assert_eq!(open(&bytes[..cut.index(bytes.len())]), None);
        let mut changed = bytes.clone();
        let bit = flip.index(bytes.len() * 8);
        changed[bit / 8] ^= 1 << (bit % 8);
        prop_assert_eq!(open(&changed), None);
    }

    #[test]
    fn what_was_never_a_state_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(part) = postcard::from_bytes::<Part>(&bytes) {
            prop_assert!(part.open::<Vec<u64>>(FORM).is_err());
        }
    }
}
