//! Internet checksums (RFC 1071) and the Ethernet frame check sequence.

/// One's complement sum of the big-endian 16-bit words of `data`, not complemented; an odd last
/// byte counts as the high half of a word.
pub fn ones_complement_sum(data: &[u8]) -> u16 {
    let mut sum = 0u64;
    let mut chunks = data.chunks_exact(4);
    for chunk in &mut chunks {
        sum += u64::from(u32::from_be_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]));
    }
    let mut tail = [0; 4];
    tail[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    fold(sum + u64::from(u32::from_be_bytes(tail)))
}

/// Adds with end-around carry until 16 bits are left.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Puts the checksum of `frame[start..=end]` at `offset`, as the transmitter's checksum unit does:
/// what is in the field takes part in the sum; `end` 0 means the end of the frame; a field or a
/// start behind the end inserts nothing. `zero_as_ones` writes a sum of 0 as 0xffff (UDP).
pub fn insert(frame: &mut [u8], start: u8, offset: u8, end: u16, zero_as_ones: bool) {
    let (start, offset) = (usize::from(start), usize::from(offset));
    let end = match end {
        0 => frame.len(),
        end => frame.len().min(usize::from(end) + 1),
    };
    if start >= end || offset + 2 > frame.len() {
        return;
    }
    let mut sum = !ones_complement_sum(&frame[start..end]);
    if sum == 0 && zero_as_ones {
        sum = 0xffff;
    }
    frame[offset..offset + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Frame check sequence of `frame`, in the order in which it goes over the wire.
pub fn fcs(frame: &[u8]) -> [u8; 4] {
    crc32fast::hash(frame).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_sum_equals_word_by_word_addition(data in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut sum = 0u32;
            for pair in data.chunks(2) {
                let word = u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from);
                sum += word;
                sum = (sum & 0xffff) + (sum >> 16);
            }
            prop_assert_eq!(ones_complement_sum(&data), sum as u16);
        }

        #[test]
        fn insertion_never_reaches_outside(
            mut data in prop::collection::vec(any::<u8>(), 0..300),
            start in any::<u8>(), offset in any::<u8>(), end in any::<u16>(),
        ) {
            let before = data.clone();
            insert(&mut data, start, offset, end, false);
            for (i, (old, new)) in before.iter().zip(&data).enumerate() {
                let in_field = i == usize::from(offset) || i == usize::from(offset) + 1;
                prop_assert!(in_field || old == new);
            }
        }
    }

    #[test]
    fn the_frame_check_sequence_of_a_known_frame() {
        // CRC-32 check value of the catalogue: "123456789" gives 0xcbf43926.
        assert_eq!(fcs(b"123456789"), 0xcbf4_3926u32.to_le_bytes());
    }
}
