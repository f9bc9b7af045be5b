//! Which pages of guest memory this process wrote.
//!
//! Every write through [`super::GuestMemory`] comes here: devices, queues, what is patched into the
//! guest, what its start puts there. KVM knows nothing of these writes, and this log nothing of the
//! guest's own.
//!
//! ```text
//!   upper   1 1 0 0     a bit for each word of the lower level that has bits (256 KiB of memory)
//!           │ └───────────────┐
//!   lower   0100..0 0000..1   a bit for each page of 4 KiB
//! ```
//!
//! Off, a write costs one relaxed load. On, it sets two bits, and taking what was marked costs by
//! what was marked: of memory, only 2 KiB for each 4 GiB are looked at.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use super::{ForeignMapping, MissingPages};
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

/// Bytes of a page.
const PAGE_BYTES: usize = 4096;
/// Pages in a word of the lower level, and words of the lower level in one of the upper.
const BITS: usize = u64::BITS as usize;

/// See the module's text. One for each contiguous part of guest memory.
#[derive(Debug, Default)]
pub struct DirtyLog {
    on: AtomicBool,
    elsewhere: AtomicBool,
    missing: RwLock<Option<Arc<dyn MissingPages>>>,
    pages: usize,
    /// Made when it is first turned on.
    levels: OnceLock<Levels>,
    /// Dropped with the memory, after its last user.
    kept: OnceLock<ForeignMapping>,
}

#[derive(Debug)]
struct Levels {
    upper: Box<[AtomicU64]>,
    lower: Box<[AtomicU64]>,
}

fn words(count: usize) -> Box<[AtomicU64]> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

impl DirtyLog {
    /// The log of memory that lies in `mapping`, which lives as long.
    pub(super) fn of_foreign(mapping: ForeignMapping, len: usize) -> Self {
        let log = Self::with_len(len);
        // It was made a line above and has none.
        let _ = log.kept.set(mapping);
        log
    }

    /// Whether the owner of the memory has taken some of it away.
    pub(super) fn has_shrunk(&self) -> bool {
        self.kept.get().is_some_and(ForeignMapping::has_shrunk)
    }

    /// Turns it on. What is written by now is not in it, unless it was on already.
    pub fn start(&self) {
        self.levels.get_or_init(|| {
            let lower = self.pages.div_ceil(BITS);
            Levels {
                upper: words(lower.div_ceil(BITS)),
                lower: words(lower),
            }
        });
        self.on.store(true, Ordering::SeqCst);
    }

    /// Turns it off and forgets what is in it.
    pub fn stop(&self) {
        self.on.store(false, Ordering::SeqCst);
        self.take(|_| {});
    }

    /// Whether writes are marked.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Calls `page` with the number of every page that was marked since the last time, in rising
    /// order. A write that is under way is in what is taken now or next.
    pub fn take(&self, mut page: impl FnMut(usize)) {
        let Some(levels) = self.levels.get() else {
            return;
        };
        for (high, upper) in levels.upper.iter().enumerate() {
            if upper.load(Ordering::Acquire) == 0 {
                continue;
            }
            let mut marked = upper.swap(0, Ordering::AcqRel);
            while marked != 0 {
                let middle = high * BITS + marked.trailing_zeros() as usize;
                marked &= marked - 1;
                let Some(lower) = levels.lower.get(middle) else {
                    continue;
                };
                let mut bits = lower.swap(0, Ordering::AcqRel);
                while bits != 0 {
                    page(middle * BITS + bits.trailing_zeros() as usize);
                    bits &= bits - 1;
                }
            }
        }
    }

    /// Says whether the memory's bytes are elsewhere than in the file behind it: whoever maps the
    /// file does not see them.
    pub fn set_elsewhere(&self, elsewhere: bool) {
        self.elsewhere.store(elsewhere, Ordering::Release);
    }

    /// See [`DirtyLog::set_elsewhere`].
    pub fn is_elsewhere(&self) -> bool {
        self.elsewhere.load(Ordering::Acquire)
    }

    /// Says who brings pages that are missing in the file behind the memory: with that, further
    /// mappings of the file see the memory's bytes although they are elsewhere.
    pub fn set_missing_pages(&self, missing: Option<Arc<dyn MissingPages>>) {
        let place = self.missing.write();
        *place.unwrap_or_else(PoisonError::into_inner) = missing;
    }

    /// See [`DirtyLog::set_missing_pages`].
    pub fn missing_pages(&self) -> Option<Arc<dyn MissingPages>> {
        let missing = self.missing.read();
        missing.unwrap_or_else(PoisonError::into_inner).clone()
    }

    #[cold]
    fn mark(&self, offset: usize, len: usize) {
        let (Some(levels), Some(last)) = (self.levels.get(), offset.checked_add(len - 1)) else {
            return;
        };
        for page in offset / PAGE_BYTES..=last / PAGE_BYTES {
            let (Some(lower), Some(upper)) = (
                levels.lower.get(page / BITS),
                levels.upper.get(page / BITS / BITS),
            ) else {
                return;
            };
            // The lower first: who takes the upper bit must find it.
            lower.fetch_or(1 << (page % BITS), Ordering::AcqRel);
            upper.fetch_or(1 << (page / BITS % BITS), Ordering::AcqRel);
        }
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyLog {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyLog {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if self.on.load(Ordering::Relaxed) && len > 0 {
            self.mark(offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_BYTES;
        let word = self
            .levels
            .get()
            .and_then(|levels| levels.lower.get(page / BITS));
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (page % BITS) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for DirtyLog {
    fn with_len(len: usize) -> Self {
        Self {
            pages: len.div_ceil(PAGE_BYTES),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory};

    use super::*;
    use crate::dma::GuestMemory;

    const MEMORY: usize = 96 << 20;

    fn taken(log: &DirtyLog) -> Vec<usize> {
        let mut pages = Vec::new();
        log.take(|page| pages.push(page));
        pages
    }

    #[test]
    fn nothing_is_marked_while_it_is_off() {
        let log = DirtyLog::with_len(MEMORY);
        log.mark_dirty(0, 4096);
        assert!(taken(&log).is_empty() && !log.dirty_at(0));
        log.start();
        log.mark_dirty(4095, 2);
        log.mark_dirty(8192, 0);
        log.stop();
        log.mark_dirty(0, 1);
        log.start();
        assert!(taken(&log).is_empty());
    }

    #[test]
    fn what_is_outside_is_ignored() {
        let log = DirtyLog::with_len(3 * PAGE_BYTES);
        log.start();
        log.mark_dirty(usize::MAX, 2);
        log.mark_dirty(usize::MAX - 1, 1);
        log.mark_dirty(MEMORY, 1);
        assert!(taken(&log).is_empty());
    }

    #[test]
    fn writes_by_every_way_are_marked() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(1 << 32), 1 << 20)]).unwrap();
        let region = memory.iter().next().unwrap();
        let log = region.get_mmap();
        log.bitmap().start();
        let at = |page: u64| GuestAddress((1 << 32) + page * 4096);
        memory.write_slice(&[1; 8192], at(1)).unwrap();
        memory.write_obj(1u32, at(5)).unwrap();
        memory.store(1u64, at(7), Ordering::Relaxed).unwrap();
        let slice = memory.get_slices(at(9), 4096).next().unwrap().unwrap();
        slice.copy_from(&[1u8; 16]);
        slice
            .offset(16)
            .unwrap()
            .get_ref::<u16>(0)
            .unwrap()
            .store(1);
        memory.read_obj::<u64>(at(20)).unwrap();
        assert!(region.bitmap().dirty_at(9 * 4096));
        assert_eq!(taken(log.bitmap()), [1, 2, 5, 7, 9]);
    }

    proptest! {
        #[test]
        fn what_is_taken_is_what_was_marked(
            writes in prop::collection::vec((0..MEMORY, 0usize..20_000), 0..40),
            rounds in 1usize..4,
        ) {
            let log = DirtyLog::with_len(MEMORY);
            log.start();
            for _ in 0..rounds {
                let mut expected = BTreeSet::new();
                for &(offset, len) in &writes {
                    let len = len.min(MEMORY - offset);
                    log.mark_dirty(offset, len);
                    if len > 0 {
                        expected.extend(offset / PAGE_BYTES..=(offset + len - 1) / PAGE_BYTES);
                    }
                }
                prop_assert_eq!(taken(&log), expected.into_iter().collect::<Vec<_>>());
            }
        }
    }
}
