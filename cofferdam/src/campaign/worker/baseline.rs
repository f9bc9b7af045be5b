//! How the work ends without a fault, how long it is waited for with one, and where the time goes.

use std::time::{Duration, Instant};

use recovery::campaign::Way;
use recovery::campaign::workload::{Outcome, Workload};

use crate::campaign::millis;
use crate::campaign::patience::Limits;

/// How many times as long as without a fault it may take, and how much longer: retries of a network
/// take seconds, and a lab is not always as fast. A step may take as many times as long as the
/// longest, and `STEP_LONGER` longer: none waits by itself for more than some four seconds.
const TIMES: u32 = 3;
const LONGER: Duration = Duration::from_secs(30);
const STEP_LONGER: Duration = Duration::from_secs(6);

/// How long an agent may give no sign while its guest works. An isolated call, with which the guest
/// stands still, may take longer than anything else.
const SILENCE: Duration = Duration::from_secs(5);
const SILENCE_ISOLATED: Duration = Duration::from_secs(10);

/// How the workload ends without a fault, and how long it may take with one.
#[derive(Default)]
pub(super) struct Baseline {
    pub(super) outcome: Outcome,
    pub(super) took: Duration,
}

impl Baseline {
    /// How long these steps of the work may take in a run that is made in this `way`.
    pub(super) fn limits(&self, part: &Workload, way: Way) -> Limits {
        let took = self.took.saturating_sub(self.outcome.left_out(part));
        let longest = self.outcome.took.values().max();
        Limits {
            all: took.saturating_mul(TIMES) + LONGER,
            line: longest.map_or(took, |longest| longest.saturating_mul(TIMES)) + STEP_LONGER,
            silence: match way {
                Way::Native => SILENCE,
                Way::Once | Way::Stays => SILENCE_ISOLATED,
            },
            until_stall: true,
        }
    }
}

/// Measures phases that come one after the other.
pub(super) struct Laps(pub(super) Instant);

impl Laps {
    /// Milliseconds from the end of the phase before until `end`, or until now.
    pub(super) fn lap(&mut self, end: Option<Instant>) -> u64 {
        let end = end.unwrap_or_else(Instant::now);
        millis(end.saturating_duration_since(std::mem::replace(&mut self.0, end)))
    }
}
