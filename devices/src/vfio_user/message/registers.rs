//! [`FEATURE_REGISTERS`]: registers of a device in memory that both sides have. It is none of the
//! specification's; a server says in its version that it has it.

use super::{MessageError, Payload, Reader, put};
use crate::pci::config::BAR_COUNT;
use crate::pci::shared::{MAX_SHARED, SharedLayout};

/// Number of the feature, which can be asked for: the reply has a [`SharedLayout`] and one
/// descriptor, of the memory. It is at the far end of what Linux numbers from 0.
pub const FEATURE_REGISTERS: u32 = 0xc0fd;

impl Payload for SharedLayout {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        let bar = u8::try_from(reader.u32()?).ok();
        let bar = bar.filter(|bar| usize::from(*bar) < BAR_COUNT);
        let bar = bar.ok_or(MessageError::Field("base address register"))?;
        let offset = |reader: &mut Reader<'_>| {
            let offset = Some(reader.u32()?).filter(|offset| offset.is_multiple_of(4));
            offset.ok_or(MessageError::Field("register"))
        };
        let (causes, set_mask) = (offset(&mut reader)?, offset(&mut reader)?);
        let (clear_mask, bits) = (offset(&mut reader)?, reader.u32()?);
        let counts = [reader.u32()?, reader.u32()?];
        if counts.iter().any(|count| *count as usize > MAX_SHARED) {
            return Err(MessageError::Field("number of registers"));
        }
        let mut list = |count| (0..count).map(|_| offset(&mut reader)).collect();
        let [values, late]: [Result<Vec<_>, _>; 2] = counts.map(&mut list);
        let (values, late) = (values?, late?);
        reader.end()?;
        Ok(Self {
            bar,
            causes,
            set_mask,
            clear_mask,
            bits,
            values,
            late,
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        let places = [self.causes, self.set_mask, self.clear_mask];
        put(out, [self.bar.into()]);
        put(out, places);
        let counts = [self.values.len() as u32, self.late.len() as u32];
        put(out, [self.bits, counts[0], counts[1]]);
        for register in self.values.iter().chain(&self.late) {
            put(out, [*register]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_is_the_same_behind_the_wire_and_refused_cut_or_wrong() {
        let layout = SharedLayout {
            bar: 5,
            causes: 0xc0,
            set_mask: 0xd0,
            clear_mask: 0xd8,
            bits: 0x1_ffff,
            values: vec![8, 0x10],
            late: vec![0x2818],
        };
        let bytes = layout.to_bytes();
        assert_eq!(SharedLayout::parse(&bytes), Ok(layout));
        for end in 0..bytes.len() {
            assert_eq!(SharedLayout::parse(&bytes[..end]), Err(MessageError::Short));
        }
        let longer = [&bytes[..], &[0; 4]].concat();
        assert_eq!(SharedLayout::parse(&longer), Err(MessageError::Long));
        // The register, an offset, a count, an offset of the lists.
        for (at, value) in [
            (0, 6),
            (0, 0x100),
            (4, 0xc1),
            (20, 17),
            (24, u32::MAX),
            (28, 9),
        ] {
            let mut wrong = bytes.clone();
            wrong[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
            let refused = SharedLayout::parse(&wrong);
            assert!(
                matches!(refused, Err(MessageError::Field(_))),
                "{at}: {refused:?}"
            );
        }
    }
}
