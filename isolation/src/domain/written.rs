//! Where calls have written to the guest's memory.

use std::collections::HashMap;
use std::ops::Range;

use super::view::Pfn;

/// 64-bit words of guest memory that were written.
#[derive(Debug, Default)]
pub struct Written(HashMap<Pfn, [u64; 8]>);

impl Written {
    /// These bytes of page `pfn` were.
    pub(super) fn note(&mut self, pfn: Pfn, bytes: Range<usize>) {
        let words = self.0.entry(pfn).or_default();
        for word in bytes.start / 8..bytes.end.div_ceil(8) {
            if let Some(bits) = words.get_mut(word / 64) {
                *bits |= 1 << (word % 64);
            }
        }
    }

    /// Whether a byte of the word around guest physical address `gpa` was.
    pub fn has(&self, gpa: u64) -> bool {
        let word = (gpa % 4096 / 8) as usize;
        let words = self.0.get(&Pfn::of(gpa));
        words.is_some_and(|words| words[word / 64] >> (word % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_of_which_a_byte_was_written_was_written() {
        let mut written = Written::default();
        written.note(Pfn(3), 15..17);
        written.note(Pfn(3), 4095..4096);
        let at = |offset: u64| written.has(0x3000 + offset);
        assert_eq!(
            [0, 8, 16, 23, 24, 4088].map(at),
            [false, true, true, true, false, true]
        );
        assert!(!written.has(0x4008));
    }
}
