//! One way to change an instruction, and what it must keep to.

use iced_x86::{Decoder, DecoderOptions, Encoder, Instruction};

use super::listing::{Insn, Listing};
use super::text;

/// NOPs of one to nine bytes (Intel SDM volume 2B, NOP, recommended multi-byte sequences).
const NOPS: [&[u8]; 9] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];

/// A way to change an instruction.
#[derive(Debug, Clone)]
pub(super) struct Change {
    /// What is put there, in front of the NOPs that fill it up.
    pub bytes: Vec<u8>,
    /// What is different.
    pub says: String,
    /// Nothing of it is derived from the old instruction's operands.
    pub whole: bool,
}

impl Change {
    /// Code that has nothing to do with the instruction.
    pub fn whole(bytes: &[u8], says: impl Into<String>) -> Self {
        Self {
            bytes: bytes.to_vec(),
            says: says.into(),
            whole: true,
        }
    }

    /// The instruction with other operands or another condition; none if there is no such
    /// instruction.
    pub fn to(changed: &Instruction, says: impl Into<String>) -> Option<Self> {
        let ip = changed.ip();
        let mut encoder = Encoder::try_new(64).ok()?;
        encoder.encode(changed, ip).ok()?;
        let bytes = encoder.take_buffer();
        // A constant or displacement that does not fit is cut off.
        let decoded = Decoder::with_ip(64, &bytes, ip, DecoderOptions::NONE).decode();
        (decoded == *changed).then(|| Self {
            bytes,
            says: says.into(),
            whole: false,
        })
    }

    /// Fills up to the instruction's length. None if it does not fit, if nothing is different, or
    /// if the new bytes are no whole instructions.
    pub fn fitted(mut self, listing: &Listing<'_>, insn: &Insn) -> Option<Self> {
        let old = listing.bytes(insn);
        let mut missing = old.len().checked_sub(self.bytes.len())?;
        while let Some(last) = missing.min(NOPS.len()).checked_sub(1) {
            let nop = NOPS.get(last)?;
            self.bytes.extend_from_slice(nop);
            missing = missing.checked_sub(nop.len())?;
        }
        let ip = insn.i.ip();
        let mut decoder = Decoder::with_ip(64, &self.bytes, ip, DecoderOptions::NONE);
        let whole = decoder.iter().all(|i| !i.is_invalid());
        let other = text::of_bytes(listing, &self.bytes, ip) != text::of(listing, &insn.i);
        (whole && other && self.bytes != old).then_some(self)
    }
}
