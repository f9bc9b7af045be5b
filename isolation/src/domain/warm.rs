//! Private pages that are kept from call to call.
//!
//! Dropping a private page costs a system call, and its next write a fault and a copy in the host.
//! Calls of one driver write the same few pages again and again, so those are kept: each is made
//! equal to K's page when a call begins and compared with it when the call ends. Then an abort has
//! nothing to do for them at all. A page is kept once two calls close to each other wrote it, so
//! that packet buffers and the like, another page each time, do not crowd out the rest; and it is
//! dropped when no call changed it for a while.

use std::collections::VecDeque;

use super::view::{Pfn, PrivateView, ViewError};

/// Most pages kept. Each costs a copy of 4 KiB at every entry.
const CAPACITY: usize = 48;
/// Calls after which a page that no call changed is given up: each of them copies it and compares
/// it once more.
const IDLE_CALLS: u32 = 16;

/// Calls over which a page must be written twice to be kept.
const MEMORY_CALLS: usize = 4;

#[derive(Debug, Clone, Copy)]
struct WarmPage {
    pfn: Pfn,
    idle: u32,
}

/// The pages kept, sorted by number.
#[derive(Debug, Default)]
pub struct WarmPages {
    pages: Vec<WarmPage>,
    /// Pages that the last calls wrote and that were not kept, sorted, newest call last.
    written: VecDeque<Vec<Pfn>>,
}

impl WarmPages {
    /// Number of pages kept.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Whether `pfn` is kept.
    pub fn contains(&self, pfn: Pfn) -> bool {
        self.pages
            .binary_search_by_key(&pfn, |page| page.pfn)
            .is_ok()
    }

    /// The pages kept.
    pub fn iter(&self) -> impl Iterator<Item = Pfn> {
        self.pages.iter().map(|page| page.pfn)
    }

    /// Makes every page kept equal to K's.
    pub fn refresh(&self, view: &mut PrivateView) -> Result<(), ViewError> {
        self.pages
            .iter()
            .try_for_each(|page| view.refresh(page.pfn))
    }

    /// Takes note of the pages `written` by a call (sorted) and keeps those that an earlier call
    /// wrote too, as far as there is room. Returns the pages that are not kept and must be dropped,
    /// sorted.
    pub fn admit(&mut self, written: &[Pfn]) -> Vec<Pfn> {
        let mut cold = Vec::new();
        for pfn in written {
            let Err(at) = self.pages.binary_search_by_key(pfn, |page| page.pfn) else {
                continue;
            };
            let again = self
                .written
                .iter()
                .any(|call| call.binary_search(pfn).is_ok());
            if again && self.pages.len() < CAPACITY {
                self.pages.insert(at, WarmPage { pfn: *pfn, idle: 0 });
            } else {
                cold.push(*pfn);
            }
        }
        if self.written.len() >= MEMORY_CALLS {
            self.written.pop_front();
        }
        self.written.push_back(cold.clone());
        cold
    }

    /// Tells that a call ended in which `changed` says of each page whether it was changed; returns
    /// the pages that are given up and must be dropped.
    pub fn age(&mut self, changed: impl Fn(Pfn) -> bool) -> Vec<Pfn> {
        let mut given_up = Vec::new();
        self.pages.retain_mut(|page| {
            page.idle = if changed(page.pfn) { 0 } else { page.idle + 1 };
            let keep = page.idle < IDLE_CALLS;
            if !keep {
                given_up.push(page.pfn);
            }
            keep
        });
        given_up
    }

    /// Gives up all pages; the caller drops them.
    pub fn clear(&mut self) -> Vec<Pfn> {
        std::mem::take(&mut self.pages)
            .into_iter()
            .map(|page| page.pfn)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two calls that write `pfns`.
    fn keep(warm: &mut WarmPages, pfns: &[Pfn]) {
        warm.admit(pfns);
        warm.admit(pfns);
    }

    #[test]
    fn a_page_is_kept_when_a_second_call_writes_it_soon() {
        let mut warm = WarmPages::default();
        assert_eq!(warm.admit(&[Pfn(3), Pfn(7)]), [Pfn(3), Pfn(7)]);
        assert_eq!(warm.admit(&[Pfn(1), Pfn(7)]), [Pfn(1)]);
        assert!(warm.contains(Pfn(7)));
        for other in 100..100 + MEMORY_CALLS as u64 {
            warm.admit(&[Pfn(other)]);
        }
        assert_eq!(warm.admit(&[Pfn(3)]), [Pfn(3)], "too long ago");
    }

    #[test]
    fn pages_that_no_call_changes_are_given_up() {
        let mut warm = WarmPages::default();
        keep(&mut warm, &[Pfn(3), Pfn(7)]);
        for _ in 1..IDLE_CALLS {
            assert!(warm.age(|pfn| pfn == Pfn(7)).is_empty());
        }
        assert_eq!(warm.age(|pfn| pfn == Pfn(7)), [Pfn(3)]);
        assert!(warm.contains(Pfn(7)) && !warm.contains(Pfn(3)));
    }

    #[test]
    fn a_full_set_takes_no_more_pages() {
        let mut warm = WarmPages::default();
        let full: Vec<Pfn> = (0..CAPACITY as u64).map(Pfn).collect();
        keep(&mut warm, &full);
        warm.admit(&[Pfn(10_000)]);
        assert_eq!(warm.admit(&[Pfn(10_000)]), [Pfn(10_000)]);
        assert!(
            warm.admit(&[Pfn(0)]).is_empty(),
            "a page already kept stays"
        );
        assert_eq!(warm.clear().len(), CAPACITY);
        assert!(warm.is_empty());
    }
}
