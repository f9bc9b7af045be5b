//! Sets of pages.

/// A set of pages of guest memory, by number: offset in the file of guest memory divided by 4096.
/// Everything about it costs by the pages in it, not by the memory there is.
#[derive(Debug)]
pub(crate) struct PageSet {
    /// A bit for each page. Zeros that nothing was ever written over take no memory.
    bits: Vec<u64>,
    pages: Vec<u32>,
}

impl PageSet {
    /// An empty set of pages out of the first `count`.
    pub fn new(count: u32) -> Self {
        Self {
            bits: vec![0; (count as usize).div_ceil(64)],
            pages: Vec::new(),
        }
    }

    /// Adds `page`; ignores what is no page of the memory.
    pub fn insert(&mut self, page: u32) {
        let Some(word) = self.bits.get_mut(page as usize / 64) else {
            return;
        };
        let bit = 1 << (page % 64);
        if *word & bit == 0 {
            *word |= bit;
            self.pages.push(page);
        }
    }

    /// Its pages, in no order.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Empties it.
    pub fn clear(&mut self) {
        for &page in &self.pages {
            self.bits[page as usize / 64] = 0;
        }
        self.pages.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_has_what_was_put_in_once(rounds in prop::collection::vec(prop::collection::vec(0u32..5000, 0..200), 1..4)) {
            let mut set = PageSet::new(4000);
            for pages in rounds {
                let mut expected = BTreeSet::new();
                for page in pages {
                    set.insert(page);
                    expected.insert(page);
                }
                // Whole words are kept, so a few pages more than there are may be in it.
                expected.retain(|&page| page < 4000u32.div_ceil(64) * 64);
                let mut found = set.pages().to_vec();
                found.sort_unstable();
                prop_assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
                set.clear();
                prop_assert!(set.pages().is_empty());
            }
        }
    }
}
