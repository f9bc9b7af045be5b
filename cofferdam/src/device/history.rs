//! The switches of a device host.

use std::collections::VecDeque;

use devices::wire::turns::TurnTimes;
use isolation::status::histogram::Histogram;
use recovery::switch::Outcome;

use super::protocol::SwitchRecord;

/// Switches that are remembered.
const REMEMBERED: usize = 32;

/// See the module.
#[derive(Debug, Default)]
pub struct History {
    last: VecDeque<Remembered>,
    /// All that there were.
    pub count: u64,
    /// Those of them that failed.
    pub failed: u64,
    /// How long all of them took.
    pub times: Histogram,
    /// How long no frame passed at those behind which frames have passed.
    pub outages: Histogram,
}

#[derive(Debug)]
struct Remembered {
    record: SwitchRecord,
    /// The turn that it gave, if it gave any.
    turn: Option<u64>,
    /// Its outage is among those that were counted.
    is_counted: bool,
}

impl History {
    /// Adds a switch, which gets its number, and says what is known of it; `times` tells of the
    /// frames at the edges of a turn.
    pub fn add(
        &mut self,
        mut record: SwitchRecord,
        turn: Option<u64>,
        times: impl Fn(u64) -> Option<TurnTimes>,
    ) -> SwitchRecord {
        // Of the one that is forgotten nothing more will be known.
        self.count_outages(&times);
        self.count += 1;
        self.failed += u64::from(record.outcome != Outcome::Switched {});
        self.times.add_ns(record.phases.total_ns());
        record.number = self.count;
        if self.last.len() == REMEMBERED {
            self.last.pop_front();
        }
        self.last.push_back(Remembered {
            record: record.clone(),
            turn,
            is_counted: false,
        });
        with_frames(record, turn, &times)
    }

    /// The last ones, oldest first; `times` as for [`Self::add`].
    pub fn last(&mut self, times: impl Fn(u64) -> Option<TurnTimes>) -> Vec<SwitchRecord> {
        self.count_outages(&times);
        let records = self.last.iter();
        records
            .map(|one| with_frames(one.record.clone(), one.turn, &times))
            .collect()
    }

    /// Counts the outages that are known by now.
    fn count_outages(&mut self, times: &impl Fn(u64) -> Option<TurnTimes>) {
        for one in self.last.iter_mut().filter(|one| !one.is_counted) {
            let (_, outage_ns) = frames(one.turn, &times);
            if let Some(ns) = outage_ns {
                self.outages.add_ns(ns);
                one.is_counted = true;
            }
        }
    }
}

/// The record with the frames at the edges of its turn, as far as they have come.
fn with_frames(
    mut record: SwitchRecord,
    turn: Option<u64>,
    times: &impl Fn(u64) -> Option<TurnTimes>,
) -> SwitchRecord {
    (record.first_frame_ns, record.outage_ns) = frames(turn, times);
    record
}

/// How long after the beginning of a turn its first frame passed, and how long after the last one
/// before it, as far as that is known.
fn frames(
    turn: Option<u64>,
    times: &impl Fn(u64) -> Option<TurnTimes>,
) -> (Option<u64>, Option<u64>) {
    let Some(times) = turn.and_then(times) else {
        return (None, None);
    };
    let first = times.first_frame_ns;
    let edges = first.zip(times.last_frame_before_ns);
    (
        first.map(|first| first.saturating_sub(times.since_ns)),
        edges.map(|(first, last)| first.saturating_sub(last)),
    )
}

#[cfg(test)]
mod tests {
    use recovery::switch::Phases;

    use super::*;
    use crate::device::protocol::Reason;

    fn record(took_ns: u64) -> SwitchRecord {
        let mut record = SwitchRecord {
            number: 0,
            begin_ns: 1,
            from: None,
            to: Some("left".to_owned()),
            reason: Reason::Slice,
            outcome: Outcome::Switched {},
            phases: Phases::default(),
            first_frame_ns: None,
            outage_ns: None,
        };
        record.phases.save_ns = Some(took_ns);
        record
    }

    /// Frames of a turn: the first 7 us after its beginning, the last one 40 us before that.
    fn with_traffic(turn: u64) -> Option<TurnTimes> {
        let since_ns = turn * 1_000_000;
        Some(TurnTimes {
            serial: turn,
            since_ns,
            last_frame_before_ns: Some(since_ns - 40_000),
            first_frame_ns: Some(since_ns + 7_000),
        })
    }

    fn silent(turn: u64) -> Option<TurnTimes> {
        with_traffic(turn).map(|times| TurnTimes {
            first_frame_ns: None,
            ..times
        })
    }

    #[test]
    fn each_outage_is_counted_once_whenever_it_becomes_known_and_however_many_there_are() {
        let mut history = History::default();
        let many = 3 * REMEMBERED as u64;
        for turn in 1..=many {
            // When a switch is added nothing has passed behind it.
            let times = |of: u64| match of == turn {
                true => silent(of),
                false => with_traffic(of),
            };
            let added = history.add(record(2_000), Some(turn), times);
            assert_eq!((added.number, added.outage_ns), (turn, None));
        }
        assert_eq!((history.count, history.times.count()), (many, many));
        assert_eq!(history.times.sum_ns(), many * 2_000);
        assert_eq!(history.outages.count(), many - 1);
        for _ in 0..2 {
            let last = history.last(with_traffic);
            assert_eq!(last.len(), REMEMBERED);
            let seen = last.last().map(|one| (one.first_frame_ns, one.outage_ns));
            assert_eq!(seen, Some((Some(7_000), Some(47_000))));
            assert_eq!(history.outages.count(), many);
        }
        assert_eq!(history.outages.sum_ns(), many * 47_000);
    }

    #[test]
    fn a_switch_behind_which_nothing_passes_has_no_outage() {
        let mut history = History::default();
        history.add(record(1), Some(1), silent);
        history.add(record(1), Some(2), |_| None);
        assert_eq!(history.last(silent).len(), 2);
        let mut failed = History::default();
        failed.add(record(1), None, with_traffic);
        assert_eq!(failed.last(with_traffic).len(), 1);
        assert!(history.outages.is_empty() && failed.outages.is_empty());
        assert_eq!((history.times.count(), failed.times.count()), (2, 1));
    }
}
