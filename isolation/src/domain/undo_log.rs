//! Old bytes of memory that a call put into the guest before it ended, to put them back if it fails
//! later.
//!
//! Kernel functions that the call ran and other threads write the same pages, so two things are
//! left alone: what is not in [`Restorable`], and words that are not any more as the call left
//! them. The unit is an aligned word of 8 bytes: half of somebody else's number is worth nothing.
//!
//! ```text
//!  part 1  A ─► B          undone last    B still there? ─► A
//!  others       B ─► C
//!  part 2       C ─► D     undone first   D still there? ─► C, which is not B: stays
//! ```

use std::collections::BTreeMap;

use super::list_links::{ChangedLinks, LINKS_BYTES};
use super::view::{PAGE_SIZE, Page, Pfn};
use crate::policy::diff::PageMask;

/// Most words kept for one call; each takes 40 bytes of the host's memory.
pub const MAX_WORDS: usize = 1 << 17;
/// Most pages of which something may be put back.
pub const MAX_PAGES: usize = 1 << 14;
/// Most links of lists that are looked at for one call; more are taken for unchanged.
pub const MAX_LINKS: usize = 1 << 15;

/// Bytes of guest memory that are a call's to put back: what belonged to the driver when the call
/// began.
#[derive(Debug, Clone, Default)]
pub struct Restorable {
    pages: BTreeMap<Pfn, PageMask>,
    too_large: bool,
    /// Offset in the page and guest virtual address of links of lists.
    links: BTreeMap<Pfn, Vec<(u16, u64)>>,
    links_count: usize,
}

impl Restorable {
    /// Adds the `bytes` bytes at guest physical address `gpa`.
    pub fn include(&mut self, gpa: u64, bytes: u64) {
        for (pfn, range) in pieces(gpa, bytes) {
            if self.pages.len() >= MAX_PAGES && !self.pages.contains_key(&pfn) {
                self.too_large = true;
                return;
            }
            let mask = self.pages.entry(pfn).or_insert(PageMask::EMPTY);
            mask.insert(range);
        }
    }

    /// Takes the `bytes` bytes at guest physical address `gpa` out again.
    pub fn exclude(&mut self, gpa: u64, bytes: u64) {
        for (pfn, range) in pieces(gpa, bytes) {
            if let Some(mask) = self.pages.get_mut(&pfn) {
                let mut out = PageMask::EMPTY;
                out.insert(range);
                *mask = mask.without(&out);
            }
        }
    }

    /// Notes links of a list (`struct list_head`) at guest physical address `gpa`, where the guest
    /// has them at `va`. They are not put back, but looked at ([`UndoLog::links`]).
    pub fn links(&mut self, gpa: u64, va: u64) {
        let offset = gpa % PAGE_SIZE;
        if offset.is_multiple_of(8)
            && offset <= PAGE_SIZE - LINKS_BYTES
            && self.links_count < MAX_LINKS
        {
            self.links_count += 1;
            let links = self.links.entry(Pfn::of(gpa)).or_default();
            links.push((offset as u16, va));
        }
    }

    /// Whether there was more than fits.
    pub fn is_too_large(&self) -> bool {
        self.too_large
    }

    /// Number of pages with such bytes.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }
}

/// The parts of a range on each of its pages. A range that does not end below 2^64 has none.
fn pieces(gpa: u64, bytes: u64) -> impl Iterator<Item = (Pfn, std::ops::Range<usize>)> {
    let end = gpa.checked_add(bytes).unwrap_or(gpa);
    let mut at = gpa;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let pfn = Pfn::of(at);
        let next = (at - at % PAGE_SIZE).saturating_add(PAGE_SIZE).min(end);
        let first = (at % PAGE_SIZE) as usize;
        let range = first..first + (next - at) as usize;
        at = next;
        Some((pfn, range))
    })
}

/// What was written into one aligned word.
#[derive(Debug, Clone, Copy)]
struct Word {
    pfn: Pfn,
    /// Offset in the page, a multiple of 8.
    offset: u16,
    /// Bits of the bytes that were changed.
    mask: u64,
    old: u64,
    new: u64,
}

/// The log of one call.
#[derive(Debug, Clone, Default)]
pub struct UndoLog {
    restorable: Restorable,
    words: Vec<Word>,
    links: Vec<ChangedLinks>,
    /// Words and links that are in the guest for good unless they are undone.
    settled: (usize, usize),
    overflowed: bool,
}

impl UndoLog {
    /// An empty log.
    pub fn new(restorable: Restorable) -> Self {
        Self {
            restorable,
            ..Self::default()
        }
    }

    /// Bytes of the host's memory that it takes.
    pub fn bytes(&self) -> u64 {
        let pages = self.restorable.pages.len() * (size_of::<(Pfn, PageMask)>() + 16);
        let words = self.words.capacity() * size_of::<Word>();
        let links = self.restorable.links_count * size_of::<(u16, u64)>();
        let changed = self.links.capacity() * size_of::<ChangedLinks>();
        (pages + words + links + changed) as u64
    }

    /// There is no room for it: nothing is recorded, and nothing can be put back.
    pub fn give_up(&mut self) {
        *self = Self {
            overflowed: true,
            ..Self::default()
        };
    }

    /// Page `pfn` is about to become `new` in the guest, where it is `old`.
    pub fn record(&mut self, pfn: Pfn, old: &Page, new: &Page) {
        for (offset, va) in self.restorable.links.get(&pfn).into_iter().flatten() {
            let both = |page| [word_of(page, *offset), word_of(page, *offset + 8)];
            let (old, new) = (both(old), both(new));
            if old != new && self.links.len() < MAX_LINKS {
                self.links.push(ChangedLinks { at: *va, old, new });
            }
        }
        let Some(restorable) = self.restorable.pages.get(&pfn) else {
            return;
        };
        let mask = PageMask::changed(old, new).and(restorable);
        let mut word: Option<Word> = None;
        for at in mask.runs().flatten() {
            let offset = at as u16 & !7;
            if word.is_none_or(|word| word.offset != offset) {
                self.words.extend(word.take());
                if self.words.len() >= MAX_WORDS {
                    self.overflowed = true;
                    return;
                }
            }
            let word = word.get_or_insert(Word {
                pfn,
                offset,
                mask: 0,
                old: word_of(old, offset),
                new: word_of(new, offset),
            });
            word.mask |= 0xff << (8 * (at % 8));
        }
        self.words.extend(word);
    }

    /// What was recorded so far stays in the guest.
    pub fn settle(&mut self) {
        self.settled = (self.words.len(), self.links.len());
    }

    /// What was recorded since the last [`UndoLog::settle`] has been taken back otherwise.
    pub fn discard(&mut self) {
        self.words.truncate(self.settled.0);
        self.links.truncate(self.settled.1);
    }

    /// Whether something was not recorded for want of room.
    pub fn is_incomplete(&self) -> bool {
        self.overflowed || self.restorable.is_too_large()
    }

    /// Links of lists that were changed, in each part of the call.
    pub fn links(&self) -> &[ChangedLinks] {
        &self.links
    }

    /// Puts the old bytes back, newest first, wherever the word still is what was recorded.
    /// `with_page` calls what it is given with a page of the guest's. Returns the number of bytes
    /// put back.
    pub fn undo<E>(
        &self,
        mut with_page: impl FnMut(Pfn, &mut dyn FnMut(&mut Page)) -> Result<(), E>,
    ) -> Result<u64, E> {
        let mut restored = 0;
        for words in self.words.chunk_by(|a, b| a.pfn == b.pfn).rev() {
            let Some(first) = words.first() else { continue };
            with_page(first.pfn, &mut |page| {
                for word in words.iter().rev() {
                    let offset = word.offset;
                    let now = word_of(page, offset);
                    if (now ^ word.new) & word.mask == 0 {
                        let then = now & !word.mask | word.old & word.mask;
                        let at = usize::from(offset);
                        page[at..at + 8].copy_from_slice(&then.to_le_bytes());
                        restored += u64::from(word.mask.count_ones() / 8);
                    }
                }
            })?;
        }
        Ok(restored)
    }
}

fn word_of(page: &Page, offset: u16) -> u64 {
    let mut bytes = [0; 8];
    let at = usize::from(offset);
    bytes.copy_from_slice(&page[at..at + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
#[path = "undo_log_tests.rs"]
mod tests;
