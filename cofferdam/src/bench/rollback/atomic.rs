//! Rollbacks of calls that stay atomic.

use anyhow::{Context, bail};
use recovery::fault::{FaultKind, Place};

use super::faults::{Bench, CANDIDATES, Fired};
use crate::bench::network::DRIVER;
use crate::bench::operation::Operation;
use crate::report::{Method, Phase, Recovery};

/// Faults that are put in, in turn from place to place.
const FAULTS: [FaultKind; 2] = [FaultKind::NullDereference, FaultKind::UndefinedInstruction];

/// Faults ordered at most for one rollback, at a place that calls do not always come by.
const TRIES: usize = 16;

impl Bench<'_> {
    /// Rollbacks of calls of `entry`, in turn at each place.
    pub(super) fn entry(
        &mut self,
        entry: &str,
        operation: Operation,
        runs: usize,
        progress: &mut dyn FnMut(&str),
    ) -> anyhow::Result<Vec<Recovery>> {
        let mut all = Vec::new();
        for (index, place) in Place::ALL.into_iter().enumerate() {
            // The first places take what does not divide evenly.
            let share = (runs + Place::ALL.len() - 1 - index) / Place::ALL.len();
            if share == 0 {
                continue;
            }
            let fault = FAULTS[index % FAULTS.len()];
            let offset = self
                .find(entry, operation, place, fault)
                .with_context(|| format!("{} instruction", place.name()))?;
            let what = format!("{} at +{offset:#x} ({})", fault.name(), place.name());
            let mut of_place = Vec::new();
            for _ in 0..share * TRIES {
                if of_place.len() == share {
                    break;
                }
                match self.order(entry, operation, offset, fault)? {
                    Fired::Yes => of_place.push(self.collect(entry)?),
                    // Another way through the function this time.
                    Fired::Missed => {}
                    Fired::NoCall => bail!("{entry} is not called any more after {what}"),
                }
            }
            self.works(operation)
                .with_context(|| format!("after {what}"))?;
            let returned: Vec<f64> = of_place
                .iter()
                .filter_map(|run| run.at_us.get(&Phase::Returned).copied())
                .collect();
            let median = crate::report::Stat::from_samples(&returned).map_or(0.0, |s| s.p50);
            progress(&format!(
                "rollback {entry}, {what}: {} of {share}, {median:.0} us",
                of_place.len()
            ));
            let recovery = Recovery::from_runs(DRIVER, Method::Rollback, of_place);
            all.extend(recovery.map(|recovery| Recovery {
                entry: Some(entry.to_owned()),
                fault: Some(what),
                ..recovery
            }));
        }
        Ok(all)
    }

    /// An instruction at `place` that calls reach.
    fn find(
        &mut self,
        entry: &str,
        operation: Operation,
        place: Place,
        fault: FaultKind,
    ) -> anyhow::Result<u64> {
        let instructions = self.instructions(entry)?;
        for offset in place.candidates(&instructions).into_iter().take(CANDIDATES) {
            match self.order(entry, operation, offset, fault)? {
                Fired::Yes => {
                    self.collect(entry)?;
                    return Ok(offset);
                }
                Fired::Missed => {}
                Fired::NoCall => {
                    bail!(
                        "{entry} is not called at +{offset:#x}{}",
                        self.guest.last_words()
                    )
                }
            }
        }
        bail!("none of the instructions tried is reached by calls of {entry}");
    }
}
