//! Zstandard as others pack with it (RFC 8878): frames one after the other, skippable ones among
//! them, and what is said of their contents by a checksum is so.

use std::io::{self, Read};

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// Bytes of a frame's magic number.
const MAGIC: usize = 4;

/// Reads what is packed in `R`, which should have a buffer. A frame may ask for a window of up to
/// 128 MiB.
pub struct Decoder<R> {
    packed: R,
    frame: FrameDecoder,
    is_in_frame: bool,
}

impl<R: Read> Decoder<R> {
    /// Of all frames in `packed`.
    pub fn new(packed: R) -> Self {
        Self {
            packed,
            frame: FrameDecoder::new(),
            is_in_frame: false,
        }
    }

    /// Comes to the next frame, if there is one.
    fn begin(&mut self) -> io::Result<bool> {
        use FrameDecoderError::ReadFrameHeaderError as OfHeader;
        loop {
            let mut magic = Vec::new();
            self.packed
                .by_ref()
                .take(MAGIC as u64)
                .read_to_end(&mut magic)?;
            if magic.is_empty() {
                return Ok(false);
            }
            let length = match self.frame.init(magic.chain(&mut self.packed)) {
                Ok(()) => return Ok(true),
                Err(OfHeader(ReadFrameHeaderError::SkipFrame { length, .. })) => u64::from(length),
                Err(error) => return Err(damaged(error)),
            };
            let skipped = io::copy(&mut self.packed.by_ref().take(length), &mut io::sink())?;
            if skipped < length {
                return Err(damaged("it ends in a frame that is skipped"));
            }
        }
    }
}

fn damaged(why: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_string())
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.is_in_frame {
                self.is_in_frame = self.begin()?;
                if !self.is_in_frame {
                    return Ok(0);
                }
            }
            while self.frame.can_collect() == 0 && !self.frame.is_finished() {
                let one = BlockDecodingStrategy::UptoBlocks(1);
                self.frame
                    .decode_blocks(&mut self.packed, one)
                    .map_err(damaged)?;
            }
            let count = self.frame.read(buffer)?;
            if count > 0 {
                return Ok(count);
            }
            let said = self.frame.get_checksum_from_data();
            if said.is_some() && said != self.frame.get_calculated_checksum() {
                return Err(damaged("its contents do not have its checksum"));
            }
            self.is_in_frame = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::zst;

    fn unpacked(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        Decoder::new(packed).read_to_end(&mut all)?;
        Ok(all)
    }

    fn content() -> Vec<u8> {
        (0..1_000_000_u32).map(|at| (at / 7 % 251) as u8).collect()
    }

    #[test]
    fn all_frames_are_read_and_what_is_to_be_skipped_is_not() {
        let (one, two) = (content(), b"two".to_vec());
        let mut packed = zst(one.as_slice());
        packed.extend([0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 9, 9, 9]);
        packed.extend(zst(two.as_slice()));
        assert_eq!(unpacked(&packed).unwrap(), [one, two].concat());
        assert_eq!(unpacked(&[]).unwrap(), b"");
    }

    #[test]
    fn what_is_cut_short_or_changed_is_an_error_or_the_same() {
        let content = content();
        let packed = zst(content.as_slice());
        for length in 1..packed.len() {
            assert!(unpacked(&packed[..length]).is_err(), "{length}");
        }
        for at in 0..packed.len() {
            let mut changed = packed.clone();
            changed[at] ^= 1 << (at % 8);
            assert!(
                unpacked(&changed).map_or(true, |same| same == content),
                "{at}"
            );
        }
    }
}
