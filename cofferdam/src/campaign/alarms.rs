//! False alarms: calls that are taken back although there is no fault.
//!
//! The guest works with its driver isolated, its steps in an order that a seed decides, round after
//! round and without a rewind: what calls leave behind is there for the next ones.

use std::time::{Duration, Instant};

use anyhow::ensure;
use serde::{Deserialize, Serialize};

use super::worker::{EntryCalls, Setup, Worker};
use recovery::campaign::workload::Shuffle;

/// Texts of false alarms that are kept.
const MAX_KEPT: usize = 100;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FalseAlarms {
    /// The driver.
    pub driver: String,
    /// Release of the guest's kernel.
    pub kernel: String,
    /// What decided the order of the steps.
    pub seed: u64,
    /// Times that the guest did its work.
    pub rounds: u64,
    /// How long that took, in seconds.
    pub took_s: u64,
    /// Calls by function, since the driver was isolated.
    pub entries: Vec<EntryCalls>,
    /// Rounds after which something was otherwise than it should be: steps that failed, a device
    /// that did not work. Timing brings some of the steps about.
    pub failed_steps: Vec<String>,
    /// What the calls did that were taken back, the last ones.
    pub alarms: Vec<String>,
}

impl FalseAlarms {
    /// All calls, and those that were taken back.
    pub fn totals(&self) -> (u64, u64) {
        let sum = |of: fn(&EntryCalls) -> u64| self.entries.iter().map(of).sum();
        (sum(|entry| entry.calls), sum(|entry| entry.taken_back))
    }
}

/// Has the guest work for this time, and until a round has ended. `each` is told of each round; it
/// gives `false` to stop.
///
/// # Errors
/// A guest cannot be made ready, or does not end a round.
pub fn look(
    setup: &Setup,
    seed: u64,
    time: Duration,
    progress: &mut dyn FnMut(&str),
    each: &mut dyn FnMut(&FalseAlarms) -> bool,
) -> anyhow::Result<FalseAlarms> {
    let mut worker = Worker::start(setup, &[], progress)?;
    let mut order = Shuffle::new(seed);
    let mut found = FalseAlarms {
        driver: setup.workload.driver.clone(),
        kernel: worker.kernel().to_owned(),
        seed,
        ..FalseAlarms::default()
    };
    let begun = Instant::now();
    loop {
        let outcome = worker.round(&order.next(&setup.workload))?;
        ensure!(
            outcome.finished,
            "the guest did not end its work in round {}",
            found.rounds + 1
        );
        found.rounds += 1;
        found.took_s = begun.elapsed().as_secs();
        let round = |what: &str| format!("round {}: {what}", found.rounds);
        let mut failed: Vec<String> = outcome.differs.iter().map(|step| round(step)).collect();
        if !outcome.works {
            failed.push(round("the device does not work"));
        }
        if outcome.corrupted > 0 {
            failed.push(round(
                "contents are otherwise than they were sent or written",
            ));
        }
        found.failed_steps.extend(failed);
        found.failed_steps.truncate(MAX_KEPT);
        (found.entries, found.alarms) = worker.calls()?;
        found.alarms.truncate(MAX_KEPT);
        if !each(&found) || begun.elapsed() >= time {
            return Ok(found);
        }
    }
}
