//! Which bytes of a page differ between two copies of it.

use std::ops::Range;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;

/// A page's worth of bytes.
pub type PageBytes = [u8; PAGE_BYTES];

const WORDS: usize = PAGE_BYTES / 64;

/// As many bytes are compared at once: most parts of most pages are equal.
const PART: usize = 512;

/// A set of bytes of one page: one bit each.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PageMask {
    words: [u64; WORDS],
    /// Which of these have any byte, one bit each.
    used: u64,
}

impl PageMask {
    /// No byte.
    pub const EMPTY: Self = Self {
        words: [0; WORDS],
        used: 0,
    };

    /// The bytes that differ between `old` and `new`.
    pub fn changed(old: &PageBytes, new: &PageBytes) -> Self {
        let mut mask = Self::EMPTY;
        let parts = old.as_chunks::<PART>().0.iter();
        let parts = parts.zip(new.as_chunks::<PART>().0).enumerate();
        for (part, (old, new)) in parts.filter(|(_, (old, new))| old != new) {
            let blocks = old.as_chunks::<64>().0.iter().zip(new.as_chunks::<64>().0);
            let first = part * (PART / 64);
            let changed = blocks
                .enumerate()
                .filter(|(_, (old, new))| differ(old, new));
            for (block, (old, new)) in changed {
                mask.words[first + block] = different_bytes(old, new);
                mask.used |= 1 << (first + block);
            }
        }
        mask
    }

    /// Adds the bytes of `range`; what lies past the page is left out.
    pub fn insert(&mut self, range: Range<usize>) {
        let end = range.end.min(PAGE_BYTES);
        let mut at = range.start;
        while at < end {
            let word = at / 64;
            let stop = end.min((word + 1) * 64);
            let bits = stop - at;
            let run = if bits == 64 {
                u64::MAX
            } else {
                ((1 << bits) - 1) << (at % 64)
            };
            self.words[word] |= run;
            self.used |= 1 << word;
            at = stop;
        }
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// How many bytes are in it.
    pub fn count(&self) -> usize {
        self.words
            .iter()
            .map(|word| word.count_ones() as usize)
            .sum()
    }

    /// Whether byte `at` of the page is in it.
    pub fn contains(&self, at: usize) -> bool {
        self.words
            .get(at / 64)
            .is_some_and(|word| word >> (at % 64) & 1 != 0)
    }

    /// The bytes in both.
    pub fn and(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a & b)
    }

    /// The bytes in either.
    pub fn or(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a | b)
    }

    /// The bytes of this one that are not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a & !b)
    }

    fn combine(&self, other: &Self, with: impl Fn(u64, u64) -> u64) -> Self {
        let mut words = self.words;
        let mut used = 0;
        for (at, (word, other)) in words.iter_mut().zip(other.words).enumerate() {
            *word = with(*word, other);
            used |= u64::from(*word != 0) << at;
        }
        Self { words, used }
    }

    /// Runs of neighbouring bytes, in order; as long as they can be.
    pub fn runs(&self) -> Runs<'_> {
        Runs { mask: self, at: 0 }
    }

    /// First position from `at` on whose membership is `wanted`; the end of the page if none is.
    fn next(&self, at: usize, wanted: bool) -> usize {
        let mut word = at / 64;
        let mut skip = at % 64;
        while let Some(bits) = self.words.get(word) {
            let bits = if wanted { *bits } else { !*bits };
            let bits = bits >> skip << skip;
            if bits != 0 {
                return word * 64 + bits.trailing_zeros() as usize;
            }
            word += 1;
            skip = 0;
            if wanted {
                let later = self.used.checked_shr(word as u32).unwrap_or(0);
                word = word.saturating_add(later.trailing_zeros() as usize);
            }
        }
        PAGE_BYTES
    }
}

impl std::fmt::Debug for PageMask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.runs()).finish()
    }
}

/// A part of a page for which a mask has one word.
type Block = [u8; 64];

/// Pairs of words, combined.
fn differences(old: &Block, new: &Block) -> impl Iterator<Item = u64> {
    let pairs = old.as_chunks::<8>().0.iter().zip(new.as_chunks::<8>().0);
    pairs.map(|(old, new)| u64::from_le_bytes(*old) ^ u64::from_le_bytes(*new))
}

/// Whether two blocks differ, without a branch for each word.
fn differ(old: &Block, new: &Block) -> bool {
    differences(old, new).fold(0, |any, one| any | one) != 0
}

/// One bit per byte that differs. Most blocks of most pages are equal: this is kept out of their
/// way.
#[cold]
#[inline(never)]
fn different_bytes(old: &Block, new: &Block) -> u64 {
    let words = differences(old, new).map(|word| u64::from(nonzero_bytes(word)));
    (0u32..)
        .step_by(8)
        .zip(words)
        .fold(0, |mask, (shift, bits)| mask | bits << shift)
}

/// One bit per byte of `word`, set where the byte is not zero.
fn nonzero_bytes(word: u64) -> u8 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    // Bit 7 of each byte: set if any bit of the byte is.
    let high = (((word & LOW) + LOW) | word) & !LOW;
    // Gathers the eight bits in the top byte, the lowest byte's lowest.
    ((high >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
}

/// Iterator over the runs of a mask.
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    mask: &'a PageMask,
    at: usize,
}

impl Iterator for Runs<'_> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        let start = self.mask.next(self.at, true);
        if start >= PAGE_BYTES {
            self.at = PAGE_BYTES;
            return None;
        }
        self.at = self.mask.next(start, false);
        Some(start..self.at)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn by_bytes(old: &PageBytes, new: &PageBytes) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for at in (0..PAGE_BYTES).filter(|at| old[*at] != new[*at]) {
            match runs.last_mut() {
                Some(run) if run.end == at => run.end += 1,
                _ => runs.push(at..at + 1),
            }
        }
        runs
    }

    #[test]
    fn equal_pages_have_no_runs_and_a_full_change_is_one() {
        let (zeros, ones) = ([0; PAGE_BYTES], [1; PAGE_BYTES]);
        assert!(PageMask::changed(&zeros, &zeros).is_empty());
        let all = PageMask::changed(&zeros, &ones);
        assert!(all.runs().eq(std::iter::once(0..PAGE_BYTES)));
        assert_eq!(all.count(), PAGE_BYTES);
    }

    #[test]
    fn every_single_byte_value_is_seen() {
        let old = [0; PAGE_BYTES];
        for at in [0, 7, 8, 63, 64, 4095] {
            for value in 1..=255 {
                let mut new = old;
                new[at] = value;
                let changed = PageMask::changed(&old, &new);
                assert!(
                    changed.runs().eq(std::iter::once(at..at + 1)),
                    "{changed:?}"
                );
            }
        }
    }

    #[test]
    fn a_range_past_the_page_is_cut() {
        let mut mask = PageMask::EMPTY;
        mask.insert(4090..usize::MAX);
        mask.insert(5000..6000);
        assert!(mask.runs().eq(std::iter::once(4090..4096)));
        assert!(mask.contains(4095) && !mask.contains(4096));
    }

    proptest! {
        #[test]
        fn runs_are_those_of_a_byte_by_byte_comparison(
            changes in prop::collection::vec((0..PAGE_BYTES, 1usize..80, any::<u8>()), 0..20),
        ) {
            let old: PageBytes = std::array::from_fn(|i| (i * 7) as u8);
            let mut new = old;
            for (at, len, value) in changes {
                new[at..(at + len).min(PAGE_BYTES)].fill(value);
            }
            let mask = PageMask::changed(&old, &new);
            let runs: Vec<_> = mask.runs().collect();
            prop_assert_eq!(&runs, &by_bytes(&old, &new));
            let mut again = PageMask::EMPTY;
            runs.into_iter().for_each(|run| again.insert(run));
            prop_assert_eq!(mask, again);
        }

        #[test]
        fn sets_combine_byte_by_byte(
            a in prop::collection::vec((0..PAGE_BYTES, 0usize..300), 0..8),
            b in prop::collection::vec((0..PAGE_BYTES, 0usize..300), 0..8),
        ) {
            let mask = |ranges: &[(usize, usize)]| {
                let mut mask = PageMask::EMPTY;
                ranges.iter().for_each(|(at, len)| mask.insert(*at..at + len));
                mask
            };
            let model = |ranges: &[(usize, usize)], at: usize| {
                ranges.iter().any(|(from, len)| (*from..from + len).contains(&at))
            };
            let (x, y) = (mask(&a), mask(&b));
            for at in 0..PAGE_BYTES {
                let (in_a, in_b) = (model(&a, at), model(&b, at));
                prop_assert_eq!(x.contains(at), in_a);
                prop_assert_eq!(x.and(&y).contains(at), in_a && in_b);
                prop_assert_eq!(x.or(&y).contains(at), in_a || in_b);
                prop_assert_eq!(x.without(&y).contains(at), in_a && !in_b);
            }
        }
    }
}
