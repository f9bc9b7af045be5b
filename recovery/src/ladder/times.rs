//! How long the rungs of a ladder took that take time.

use std::time::Duration;

use isolation::status::histogram::Histogram;
use serde::{Deserialize, Serialize};

/// A rung that takes time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rung {
    /// The device is resumed.
    Resume,
    /// The driver is restarted.
    Restart,
    /// The guest goes back to its last mark or snapshot.
    Rewind,
    /// The guest is reset.
    Reset,
}

/// How long each of them took, from its begin to its end; those that failed for themselves.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RungTimes {
    resume: Histogram,
    failed_resume: Histogram,
    restart: Histogram,
    failed_restart: Histogram,
    rewind: Histogram,
    failed_rewind: Histogram,
    reset: Histogram,
    failed_reset: Histogram,
}

impl RungTimes {
    /// Counts one.
    pub fn add(&mut self, rung: Rung, failed: bool, took: Duration) {
        let histogram = match (rung, failed) {
            (Rung::Resume, false) => &mut self.resume,
            (Rung::Resume, true) => &mut self.failed_resume,
            (Rung::Restart, false) => &mut self.restart,
            (Rung::Restart, true) => &mut self.failed_restart,
            (Rung::Rewind, false) => &mut self.rewind,
            (Rung::Rewind, true) => &mut self.failed_rewind,
            (Rung::Reset, false) => &mut self.reset,
            (Rung::Reset, true) => &mut self.failed_reset,
        };
        histogram.add(took);
    }

    /// Each with its name.
    pub fn each(&self) -> [(&'static str, &Histogram); 8] {
        [
            ("resume", &self.resume),
            ("failed_resume", &self.failed_resume),
            ("restart", &self.restart),
            ("failed_restart", &self.failed_restart),
            ("rewind", &self.rewind),
            ("failed_rewind", &self.failed_rewind),
            ("reset", &self.reset),
            ("failed_reset", &self.failed_reset),
        ]
    }

    /// Whether there was none.
    pub fn is_empty(&self) -> bool {
        self.each()
            .iter()
            .all(|(_, histogram)| histogram.is_empty())
    }
}
