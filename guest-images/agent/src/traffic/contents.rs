//! Contents that follow from where they stand.

/// Length of the sequence number that every datagram begins with, in bytes.
pub const SEQUENCE_BYTES: usize = 8;

/// Longest datagram: what an IPv4 packet of 1500 bytes carries after an ICMP or UDP header.
pub const MAX_DATAGRAM_BYTES: usize = 1472;

/// Mixes the bits of `value` (SplitMix64).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `data` with what a stream has from byte `offset` on.
pub fn fill_stream(offset: u64, data: &mut [u8]) {
    let mut at = offset;
    let mut rest = data;
    while !rest.is_empty() {
        let word = mix(at / 8).to_le_bytes();
        let from = (at % 8) as usize;
        let count = (8 - from).min(rest.len());
        let (now, later) = rest.split_at_mut(count);
        now.copy_from_slice(&word[from..from + count]);
        at = at.wrapping_add(count as u64);
        rest = later;
    }
}

/// Number of bytes of `data` that are not what a stream has from byte `offset` on. `scratch` is
/// working memory.
pub fn wrong_bytes(offset: u64, data: &[u8], scratch: &mut Vec<u8>) -> u64 {
    scratch.resize(data.len(), 0);
    fill_stream(offset, scratch);
    if scratch == data {
        return 0;
    }
    scratch.iter().zip(data).filter(|(a, b)| a != b).count() as u64
}

/// Makes the datagram of number `sequence`: the number, then bytes that follow from it. All lengths
/// from the shortest to the longest come up.
pub fn datagram(sequence: u64, into: &mut Vec<u8>) {
    let lengths = MAX_DATAGRAM_BYTES - SEQUENCE_BYTES + 1;
    // 617 has no factor in common with the number of lengths, so each of them comes up.
    let length = (sequence.wrapping_mul(617) % lengths as u64) as usize;
    into.clear();
    into.extend_from_slice(&sequence.to_le_bytes());
    into.resize(SEQUENCE_BYTES + length, 0);
    fill_stream(mix(sequence), &mut into[SEQUENCE_BYTES..]);
}

/// The number of a datagram.
pub fn sequence(datagram: &[u8]) -> Option<u64> {
    let bytes = datagram.first_chunk::<SEQUENCE_BYTES>()?;
    Some(u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_same_in_whatever_pieces_it_is_made() {
        let mut whole = vec![0; 100];
        fill_stream(5, &mut whole);
        let mut pieces = vec![0; 100];
        let (a, b) = pieces.split_at_mut(13);
        fill_stream(5, a);
        fill_stream(18, b);
        assert_eq!(whole, pieces);
    }

    #[test]
    fn a_shift_or_a_flip_is_seen() {
        let mut data = vec![0; 64];
        fill_stream(1000, &mut data);
        let mut scratch = Vec::new();
        assert_eq!(wrong_bytes(1000, &data, &mut scratch), 0);
        assert!(wrong_bytes(1001, &data, &mut scratch) > 32);
        data[9] ^= 1;
        assert_eq!(wrong_bytes(1000, &data, &mut scratch), 1);
    }

    #[test]
    fn datagrams_have_all_lengths_and_know_their_number() {
        let mut lengths = std::collections::BTreeSet::new();
        let mut data = Vec::new();
        for number in 0..1465 {
            datagram(number, &mut data);
            assert_eq!(sequence(&data), Some(number));
            lengths.insert(data.len());
        }
        assert_eq!(lengths.len(), 1465);
        assert_eq!((lengths.first(), lengths.last()), (Some(&8), Some(&1472)));
        assert_eq!(sequence(&[1, 2]), None);
    }
}
