//! Where the time of a campaign goes: how much of it the guest works, and what else there is.

use serde::{Deserialize, Serialize};

use super::record::Record;

/// Milliseconds of the host's monotonic clock that the phases of a run took, one after the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// Going back to the mark.
    pub rewind: u64,
    /// Putting the fault in.
    pub fault: u64,
    /// Until the guest's shell has begun: the agent's first answer, and the start of a program.
    pub begin: u64,
    /// The guest's work: its steps, and whether the device works.
    pub work: u64,
    /// The checks behind it, of contents and of the kernel's heap.
    pub checks: u64,
    /// Looking at what came of it: the agent, the ladder, the console.
    pub look: u64,
}

impl Times {
    /// The phases with their names, in their order.
    pub fn phases(&self) -> [(&'static str, u64); 6] {
        [
            ("rewind", self.rewind),
            ("fault", self.fault),
            ("begin", self.begin),
            ("work", self.work),
            ("checks", self.checks),
            ("look", self.look),
        ]
    }

    /// Adds another run's.
    pub fn add(&mut self, other: &Self) {
        let phases = [
            (&mut self.rewind, other.rewind),
            (&mut self.fault, other.fault),
            (&mut self.begin, other.begin),
            (&mut self.work, other.work),
            (&mut self.checks, other.checks),
            (&mut self.look, other.look),
        ];
        for (sum, ms) in phases {
            *sum = sum.saturating_add(ms);
        }
    }
}

/// How fast trials were made, of those whose time is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    /// How many those are.
    pub trials: u32,
    /// Time of their VM, in milliseconds, that of others which had to take its place among it.
    pub took_ms: u64,
    /// Of all of their runs.
    pub times: Times,
}

impl Pace {
    /// Adds a trial, if its time is known.
    pub fn add(&mut self, record: &Record) {
        let times = record.runs.values().filter_map(|run| run.seen.times);
        if record.took_ms == 0 {
            return;
        }
        self.trials = self.trials.saturating_add(1);
        self.took_ms = self.took_ms.saturating_add(record.took_ms);
        times.for_each(|times| self.times.add(&times));
    }

    /// Trials that one VM makes in a minute; `None` if the time of none is known.
    pub fn a_minute(&self) -> Option<f64> {
        (self.took_ms > 0).then(|| f64::from(self.trials) * 60_000.0 / self.took_ms as f64)
    }

    /// What share of `of_ms` milliseconds the guest did not work, from 0 to 1.
    pub fn outside(&self, of_ms: u64) -> f64 {
        match of_ms {
            0 => 0.0,
            all => 1.0 - (self.times.work as f64 / all as f64).min(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Way;
    use super::super::record::tests::record;
    use super::super::verdict::Verdict;
    use super::*;

    fn timed(took_ms: u64, work: u64) -> Record {
        let ways = [
            (Way::Native, Verdict::Crash),
            (Way::Once, Verdict::Recovered),
        ];
        let mut record = record(1, &ways);
        record.took_ms = took_ms;
        for run in record.runs.values_mut() {
            run.seen.times = Some(Times {
                rewind: 5,
                work,
                ..Times::default()
            });
        }
        record
    }

    #[test]
    fn what_is_not_work_is_outside_of_it_also_what_is_in_no_run() {
        let mut pace = Pace::default();
        assert_eq!((pace.a_minute(), pace.outside(0)), (None, 0.0));
        pace.add(&timed(2000, 800));
        pace.add(&timed(1000, 400));
        // One of a file from before there were times.
        pace.add(&timed(0, 400));
        assert_eq!((pace.trials, pace.took_ms), (2, 3000));
        assert_eq!((pace.times.work, pace.times.rewind), (2400, 20));
        assert_eq!(pace.a_minute(), Some(40.0));
        assert!((pace.outside(pace.took_ms) - 0.2).abs() < 1e-9);
        // A file that lies.
        assert_eq!(pace.outside(100), 0.0);
        pace.add(&timed(u64::MAX, u64::MAX));
        assert_eq!(pace.took_ms, u64::MAX);
    }
}
