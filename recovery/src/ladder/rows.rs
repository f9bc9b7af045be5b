//! Functions that fail again and again: how often in a row, and what was tried for them.

use super::{Fault, Ladder, OnFault, REMEMBERED_NS, State};

/// Failures that a call counts for which used up its time: each keeps the whole guest waiting.
pub(super) const HANG: u32 = 25;

/// Calls of one function that failed one after the other.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Row {
    failures: u32,
    /// The same while a rung is tried.
    meanwhile: u32,
    /// How many rungs were tried for it, and when the last one was.
    tried: u32,
    tried_ns: u64,
}

impl Ladder {
    /// Counts a failure of a function while a rung is tried; whether there have been too many in a
    /// row.
    pub(super) fn keeps_failing(&mut self, fault: &Fault<'_>) -> bool {
        let is_tried = !matches!(self.status.state, State::Running | State::Unisolated);
        if !is_tried || is_further_run(fault) {
            return false;
        }
        let limit = self.config.failures_in_a_row;
        let row = self.rows.entry(fault.entry.to_owned()).or_default();
        if !fault.in_a_row {
            row.meanwhile = 0;
        }
        row.meanwhile = row.meanwhile.saturating_add(weight(fault));
        if row.meanwhile < limit {
            return false;
        }
        row.meanwhile = 0;
        true
    }

    /// Counts a failure of a function; what is to be tried if there have been too many in a row.
    pub(super) fn livelock(&mut self, fault: &Fault<'_>) -> Option<OnFault> {
        // A rung is being tried, or this is a further run of a call that was counted.
        if self.status.state != State::Running || is_further_run(fault) {
            return None;
        }
        let row = self.rows.entry(fault.entry.to_owned()).or_default();
        if !fault.in_a_row {
            row.failures = 0;
        }
        row.meanwhile = 0;
        row.failures = row.failures.saturating_add(weight(fault));
        if row.failures < self.config.failures_in_a_row {
            return None;
        }
        row.failures = 0;
        if fault.now_ns.saturating_sub(row.tried_ns) >= REMEMBERED_NS {
            row.tried = 0;
        }
        row.tried += 1;
        row.tried_ns = fault.now_ns;
        Some(match row.tried {
            1 => OnFault::Resume,
            2 => OnFault::Restart,
            _ => OnFault::Stop,
        })
    }
}

/// Whether this is another run of a call that was counted.
fn is_further_run(fault: &Fault<'_>) -> bool {
    fault.attempts > 1 && !fault.out_of_time
}

/// As how many failures it counts.
fn weight(fault: &Fault<'_>) -> u32 {
    if fault.out_of_time { HANG } else { 1 }
}
