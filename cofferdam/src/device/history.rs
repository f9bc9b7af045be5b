//! The switches of a device host.

use std::collections::VecDeque;

use recovery::switch::Outcome;

use super::card::Card;
use super::protocol::SwitchRecord;

/// Switches that are remembered.
const REMEMBERED: usize = 32;

/// See the module.
#[derive(Debug, Default)]
pub struct History {
    /// With which turn each gave, if it gave any.
    last: VecDeque<(SwitchRecord, Option<u64>)>,
    /// All that there were.
    pub count: u64,
    /// Those of them that failed.
    pub failed: u64,
}

impl History {
    /// Adds a switch, which gets its number, and says what is known of it.
    pub fn add(
        &mut self,
        mut record: SwitchRecord,
        turn: Option<u64>,
        card: &impl Card,
    ) -> SwitchRecord {
        self.count += 1;
        self.failed += u64::from(record.outcome != Outcome::Switched {});
        record.number = self.count;
        if self.last.len() == REMEMBERED {
            self.last.pop_front();
        }
        self.last.push_back((record.clone(), turn));
        with_frames(record, turn, card)
    }

    /// The last ones, oldest first.
    pub fn last(&self, card: &impl Card) -> Vec<SwitchRecord> {
        let records = self.last.iter();
        records
            .map(|(record, turn)| with_frames(record.clone(), *turn, card))
            .collect()
    }
}

/// The record with the frames at the edges of its turn, as far as they have come.
fn with_frames(mut record: SwitchRecord, turn: Option<u64>, card: &impl Card) -> SwitchRecord {
    if let Some(times) = turn.and_then(|turn| card.times(turn)) {
        let first = times.first_frame_ns;
        record.first_frame_ns = first.map(|first| first.saturating_sub(times.since_ns));
        let edges = first.zip(times.last_frame_before_ns);
        record.outage_ns = edges.map(|(first, last)| first.saturating_sub(last));
    }
    record
}
