//! A campaign's figures.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Way;
use super::record::Record;
use super::times::Pace;
use super::verdict::Verdict;

/// How often each verdict came.
pub type Counts = BTreeMap<Verdict, u32>;

/// How many these are; of a file that lies, at most what the type holds.
pub fn total<'a>(counts: impl IntoIterator<Item = &'a u32>) -> u32 {
    counts.into_iter().copied().fold(0, u32::saturating_add)
}

/// How soon faults were detected, and how long it took to take calls back: of the first call that
/// was taken back in each run, in nanoseconds, in the order of the trials.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latencies {
    /// From the moment in which a call first came to the fault, of those where that is known.
    pub after_ns: Vec<u64>,
    /// From the exit that told of it to the return to the caller with an error.
    pub rollback_ns: Vec<u64>,
}

/// A campaign's figures.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Trials that were made.
    pub trials: u32,
    /// By the way in which they were made.
    pub ways: BTreeMap<Way, Counts>,
    /// The same of each kind.
    pub kinds: BTreeMap<String, BTreeMap<Way, Counts>>,
    /// The same of each function.
    pub functions: BTreeMap<String, BTreeMap<Way, Counts>>,
    /// Of the faults that are harm natively, what they came to when isolated.
    pub of_harm: BTreeMap<Way, Counts>,
    /// How soon faults were detected, by way.
    pub latencies: BTreeMap<Way, Latencies>,
    /// Trials that have to be looked at: not recovered, not noticed although they are harm
    /// natively, escaped.
    pub to_look_at: BTreeMap<Verdict, Vec<u32>>,
    /// How fast they were made.
    #[serde(default)]
    pub pace: Pace,
}

impl Summary {
    /// Of these trials.
    pub fn of(records: &[Record]) -> Self {
        let mut summary = Self::default();
        for record in records {
            summary.add(record);
        }
        summary
    }

    /// Adds a trial.
    pub fn add(&mut self, record: &Record) {
        self.trials += 1;
        self.pace.add(record);
        let native = record.runs.get(&Way::Native).map(|run| run.verdict);
        let is_harm = native.is_some_and(Verdict::is_harm);
        let kind = self
            .kinds
            .entry(record.trial.kind.name().to_owned())
            .or_default();
        let function = self
            .functions
            .entry(record.trial.function.clone())
            .or_default();
        for (way, run) in &record.runs {
            for ways in [&mut self.ways, &mut *kind, &mut *function] {
                *ways
                    .entry(*way)
                    .or_default()
                    .entry(run.verdict)
                    .or_default() += 1;
            }
            if *way == Way::Native {
                continue;
            }
            if let Some(detected) = &run.seen.violation {
                let latencies = self.latencies.entry(*way).or_default();
                latencies.after_ns.extend(detected.after_ns);
                latencies.rollback_ns.push(detected.rollback_ns);
            }
            if is_harm {
                let counts = self.of_harm.entry(*way).or_default();
                *counts.entry(run.verdict).or_default() += 1;
            }
            if run.verdict.is_bad(native) {
                let look_at = self.to_look_at.entry(run.verdict).or_default();
                if look_at.last() != Some(&record.trial.number) {
                    look_at.push(record.trial.number);
                }
            }
        }
    }

    /// Faults that are harm natively.
    pub fn harmful(&self) -> u32 {
        let native = self.ways.get(&Way::Native).into_iter().flatten();
        total(
            native
                .filter(|(verdict, _)| verdict.is_harm())
                .map(|(_, count)| count),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::record;
    use super::*;

    #[test]
    fn latencies_are_those_of_the_first_call_that_was_taken_back() {
        use super::super::verdict::Detected;
        let mut records =
            [1, 2, 3].map(|number| record(number, &[(Way::Once, Verdict::Recovered)]));
        for (record, after_ns) in records.iter_mut().zip([Some(30), None]) {
            let seen = &mut record.runs.get_mut(&Way::Once).unwrap().seen;
            seen.violation = Some(Detected {
                says: String::new(),
                after_ns,
                rollback_ns: u64::from(record.trial.number),
            });
        }
        let summary = Summary::of(&records);
        let latencies = &summary.latencies[&Way::Once];
        assert_eq!(
            (&latencies.after_ns[..], &latencies.rollback_ns[..]),
            (&[30][..], &[1, 2][..])
        );
    }

    #[test]
    fn verdicts_are_counted_by_way_and_of_harm_apart() {
        use Verdict::*;
        let all = |native, once, stays| {
            [
                (Way::Native, native),
                (Way::Once, once),
                (Way::Stays, stays),
            ]
        };
        let records = [
            record(1, &all(Crash, Recovered, Recovered)),
            record(2, &all(Benign, Undetected, Benign)),
            record(3, &all(LostDevice, Undetected, DetectedNotRecovered)),
            record(4, &all(Hang, Escaped, Escaped)),
        ];
        let summary = Summary::of(&records);
        assert_eq!((summary.trials, summary.harmful()), (4, 3));
        assert_eq!(summary.ways[&Way::Once][&Undetected], 2);
        assert_eq!(summary.of_harm[&Way::Once][&Undetected], 1);
        assert_eq!(summary.of_harm[&Way::Stays][&Recovered], 1);
        assert_eq!(summary.kinds["nop"][&Way::Native][&Crash], 1);
        assert_eq!(summary.functions["e1000_open"][&Way::Native][&Hang], 1);
        assert_eq!(summary.to_look_at[&Escaped], [4]);
        assert_eq!(
            summary.to_look_at[&Undetected],
            [3],
            "what is benign natively need not be noticed"
        );
        assert_eq!(summary.to_look_at[&DetectedNotRecovered], [3]);
        assert!(!summary.to_look_at.contains_key(&Recovered));
    }
}
