//! What a test has a scripted guest do from now on.

use std::sync::atomic::Ordering;

use super::Script;

impl Script {
    /// From now on it has a module called [`HOSTILE`](super::HOSTILE), has panicked with that, and
    /// says that of a call that failed.
    pub fn be_hostile(&self) {
        self.hostile.store(true, Ordering::Relaxed);
    }

    /// From now on it has so many modules more, of long names.
    pub fn have_modules(&self, count: usize) {
        self.modules.store(count, Ordering::Relaxed);
    }

    /// So many more calls of each of its modules fail.
    pub fn fail(&self, more: u64) {
        *self.violations.lock().unwrap() += more;
    }
}
