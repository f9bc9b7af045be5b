//! Following which pages change, for diffs of snapshots: what others ask the machine for.

use std::time::Duration;

use crate::dirty::{ChangedPages, User};
use crate::error::Error;
use crate::handle::VmHandle;
use crate::quiesce::Quiesced;
use crate::refused::QuiesceError;

impl VmHandle {
    /// Follows which pages change from now on, for [`Quiesced::changed_pages`]. If that was done
    /// already, what changed until now is forgotten. `limit` is how long to wait for the machine to
    /// come to rest.
    pub fn track_changes(&self, limit: Duration) -> Result<(), TrackError> {
        Ok(self.quiesce(limit, |quiesced| quiesced.track_changes())??)
    }

    /// The snapshot that `changed` was for is complete.
    pub fn confirm_changes(&self, changed: &ChangedPages) {
        self.machine().dirty.lock().confirm(changed);
    }

    /// Does not follow changes for snapshots any more.
    pub fn stop_tracking_changes(&self) -> Result<(), Error> {
        let machine = self.machine();
        let mut tracker = machine.dirty.lock();
        tracker.forget_told();
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
        tracker.forget_told();
        tracker.start(User::Snapshots, &self.machine.vm, &self.machine.ram)
    }

    /// Pages that changed since the last snapshot that was confirmed, or since
    /// [`VmHandle::track_changes`]; `None` if nobody asked for that.
    pub fn changed_pages(&mut self) -> Result<Option<ChangedPages>, Error> {
        self.machine.dirty.lock().tell(&self.machine.ram)
    }
}
