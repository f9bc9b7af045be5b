//! Following which pages change while memory is copied and the guest runs.
//!
//! ```text
//!  start (at rest) ─► copy all ─► changed: copy these ─► again while that is much ─► changed (at rest): copy the rest
//! ```

use std::sync::MutexGuard;

use crate::dirty::User;
use crate::error::Error;
use crate::handle::VmHandle;
use crate::machine::Machine;
use crate::refused::Refused;

/// So few pages that they are copied at rest.
pub(crate) const FEW_PAGES: usize = 128;
/// Rounds while the guest runs: it may write faster than is copied.
pub(crate) const ROUNDS: usize = 6;

/// One at a time; dropped, changes are not followed any more.
pub(crate) struct Copying<'a> {
    machine: &'a Machine,
    _one: MutexGuard<'a, ()>,
}

/// Why changes are not followed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyingError {
    /// The machine cannot be paused.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// KVM cannot do it.
    #[error(transparent)]
    Kvm(#[from] Error),
}

impl VmHandle {
    /// Waits until nobody else copies memory: what is changed is told to one at a time.
    pub(crate) fn one_copying(&self) -> MutexGuard<'_, ()> {
        self.machine().ram.owning()
    }

    /// Follows which pages change from now on. Not to be called with a device locked.
    pub(crate) fn follow_copying<'a>(
        &'a self,
        one: MutexGuard<'a, ()>,
    ) -> Result<Copying<'a>, CopyingError> {
        let machine = self.machine();
        let copying = Copying { machine, _one: one };
        self.with_devices_at_rest(|| {
            let mut tracker = machine.dirty.lock();
            tracker.start(User::Copying, &machine.vm, &machine.ram)
        })??;
        Ok(copying)
    }

    /// Calls `look` while no vCPU runs guest code and no device works.
    pub(crate) fn with_devices_at_rest<R>(&self, look: impl FnOnce() -> R) -> Result<R, Refused> {
        self.with_paused(|_vcpus| {
            let _devices_rest = self.machine().at_work.lock();
            look()
        })
    }
}

impl Copying<'_> {
    /// Takes the pages that changed since the last time, by their numbers in rising order. The
    /// machine is at rest.
    pub fn changed(&self) -> Result<Vec<u32>, Error> {
        let mut tracker = self.machine.dirty.lock();
        tracker.collect(&self.machine.ram)?;
        let Some(set) = tracker.set(User::Copying) else {
            return Ok(Vec::new());
        };
        let mut pages = set.pages().to_vec();
        pages.sort_unstable();
        set.clear();
        Ok(pages)
    }
}

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        let machine = self.machine;
        let mut tracker = machine.dirty.lock();
        if let Err(error) = tracker.stop(User::Copying, &machine.vm, &machine.ram) {
            tracing::warn!(%error, "changes of guest memory are followed for nobody");
        }
    }
}
