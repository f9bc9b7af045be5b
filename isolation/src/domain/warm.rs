//! Private pages that are kept from call to call.
//!
//! Dropping a private page costs a system call, and its next write a fault and a copy in the host.
//! Calls of one driver write the same few pages again and again, so those are kept: each is made
//! equal to K's page when a call begins and compared with it when the call ends. Then an abort has
//! nothing to do for them at all. A page that was not changed for a while is dropped.

use super::view::{Pfn, PrivateView, ViewError};

/// Most pages kept. Each costs a copy of 4 KiB at every entry.
const CAPACITY: usize = 48;
/// Calls after which a page that no call changed is given up.
const IDLE_CALLS: u32 = 64;

#[derive(Debug, Clone, Copy)]
struct WarmPage {
    pfn: Pfn,
    idle: u32,
}

/// The pages kept, sorted by number.
#[derive(Debug, Default)]
pub struct WarmPages {
    pages: Vec<WarmPage>,
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

    /// Keeps `pfn` from now on if there is room; the caller drops it where this says `false`.
    pub fn keep(&mut self, pfn: Pfn) -> bool {
        match self.pages.binary_search_by_key(&pfn, |page| page.pfn) {
            Ok(_) => true,
            Err(_) if self.pages.len() >= CAPACITY => false,
            Err(at) => {
                self.pages.insert(at, WarmPage { pfn, idle: 0 });
                true
            }
        }
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

    #[test]
    fn pages_that_no_call_changes_are_given_up() {
        let mut warm = WarmPages::default();
        assert!(warm.keep(Pfn(7)));
        assert!(warm.keep(Pfn(3)));
        for _ in 1..IDLE_CALLS {
            assert!(warm.age(|pfn| pfn == Pfn(7)).is_empty());
        }
        assert_eq!(warm.age(|pfn| pfn == Pfn(7)), [Pfn(3)]);
        assert!(warm.contains(Pfn(7)) && !warm.contains(Pfn(3)));
    }

    #[test]
    fn a_full_set_takes_no_more_pages() {
        let mut warm = WarmPages::default();
        for pfn in 0..CAPACITY as u64 {
            assert!(warm.keep(Pfn(pfn)));
        }
        assert!(!warm.keep(Pfn(10_000)));
        assert!(warm.keep(Pfn(0)), "a page already kept stays");
        assert_eq!(warm.clear().len(), CAPACITY);
        assert!(warm.is_empty());
    }
}
