//! Pages that changed since the last snapshot, for the next one.
//!
//! ```text
//!  track_changes ─► the guest runs ─► changed_pages (at rest) ─► they are written ─► confirm_changes
//!                        ▲  changes go on being followed  │ the snapshot fails │            │
//!                        └────────────────────────────────┴────────────────────┘◄───────────┘
//! ```
//!
//! Pages that were told and not confirmed are told again the next time, with those that changed
//! since.

use std::ops::Range;

use super::{Tracker, User};
use crate::error::Error;
use crate::memory::GuestRam;

/// Pages that changed since the last snapshot that was confirmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedPages {
    pages: Vec<u32>,
    number: u64,
}

impl ChangedPages {
    /// Their numbers in rising order: offset in the file of guest memory
    /// ([`crate::memory::RamRegion::file_offset`]) divided by 4096.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// The same as ranges, adjacent pages joined.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        ranges(&self.pages)
    }
}

/// Pages in rising order as ranges, adjacent ones joined.
pub(crate) fn ranges(pages: &[u32]) -> impl Iterator<Item = Range<u64>> {
    let ranges = pages.chunk_by(|page, next| page.checked_add(1) == Some(*next));
    ranges.filter_map(|run| Some(u64::from(*run.first()?)..u64::from(*run.last()?) + 1))
}

/// Pages that were told.
#[derive(Debug, Default)]
pub(super) struct Told {
    pages: Vec<u32>,
    /// How often pages were told.
    number: u64,
}

impl Tracker {
    /// What changed between the last snapshot and now is not known: nothing was told.
    pub fn forget_told(&mut self) {
        self.told.pages = Vec::new();
    }

    /// The snapshot that `changed` was for is complete.
    pub fn confirm(&mut self, changed: &ChangedPages) {
        // Another snapshot may have been begun, and been told these pages again.
        if self.told.number == changed.number {
            self.forget_told();
        }
    }

    /// Tells the pages that changed since the last snapshot that was confirmed; `None` if they are
    /// not followed. The machine is at rest.
    pub fn tell(&mut self, ram: &GuestRam) -> Result<Option<ChangedPages>, Error> {
        self.collect(ram)?;
        let Some(set) = &mut self.sets[User::Snapshots as usize] else {
            return Ok(None);
        };
        for page in std::mem::take(&mut self.told.pages) {
            set.insert(page);
        }
        let mut pages = set.pages().to_vec();
        pages.sort_unstable();
        set.clear();
        self.told.pages.clone_from(&pages);
        self.told.number += 1;
        Ok(Some(ChangedPages {
            pages,
            number: self.told.number,
        }))
    }
}
