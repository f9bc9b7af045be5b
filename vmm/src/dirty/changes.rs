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
use std::time::Duration;

use super::{Tracker, User};
use crate::error::Error;
use crate::handle::VmHandle;
use crate::quiesce::{QuiesceError, Quiesced};

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

impl VmHandle {
    /// Follows which pages change from now on, for [`Quiesced::changed_pages`]. If that was done
    /// already, what changed until now is forgotten. `limit` is how long to wait for the machine to
    /// come to rest.
    pub fn track_changes(&self, limit: Duration) -> Result<(), TrackError> {
        Ok(self.quiesce(limit, |quiesced| quiesced.track_changes())??)
    }

    /// The snapshot that `changed` was for is complete.
    pub fn confirm_changes(&self, changed: &ChangedPages) {
        let told = &mut self.machine().dirty.lock().told;
        // Another snapshot may have been begun, and been told these pages again.
        if told.number == changed.number {
            told.pages = Vec::new();
        }
    }

    /// Does not follow changes for snapshots any more.
    pub fn stop_tracking_changes(&self) -> Result<(), Error> {
        let machine = self.machine();
        let mut tracker = machine.dirty.lock();
        tracker.told.pages = Vec::new();
        tracker.stop(User::Snapshots, &machine.vm, &machine.ram)
    }
}

/// Why changes are not followed.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The machine did not come to rest.
    #[error(transparent)]
    Rest(#[from] QuiesceError),
    /// KVM cannot do it.
    #[error(transparent)]
    Kvm(#[from] Error),
}

impl Quiesced<'_, '_> {
    /// See [`VmHandle::track_changes`].
    pub fn track_changes(&mut self) -> Result<(), Error> {
        // What changed between that one and now is not known.
        *self.machine.last_snapshot() = None;
        let mut tracker = self.machine.dirty.lock();
        tracker.told.pages = Vec::new();
        tracker.start(User::Snapshots, &self.machine.vm, &self.machine.ram)
    }

    /// Pages that changed since the last snapshot that was confirmed, or since
    /// [`VmHandle::track_changes`]; `None` if nobody asked for that.
    pub fn changed_pages(&mut self) -> Result<Option<ChangedPages>, Error> {
        let mut guard = self.machine.dirty.lock();
        let tracker: &mut Tracker = &mut guard;
        tracker.collect(&self.machine.ram)?;
        let Some(set) = &mut tracker.sets[User::Snapshots as usize] else {
            return Ok(None);
        };
        for page in std::mem::take(&mut tracker.told.pages) {
            set.insert(page);
        }
        let mut pages = set.pages().to_vec();
        pages.sort_unstable();
        set.clear();
        tracker.told.pages.clone_from(&pages);
        tracker.told.number += 1;
        Ok(Some(ChangedPages {
            pages,
            number: tracker.told.number,
        }))
    }
}
