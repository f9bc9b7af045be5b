//! Timers whose calls take longer, isolated, than the time that they are armed for: when such a
//! call ends it is due again, and the processor never gets to anything else (`__run_timers`, which
//! goes on for as long as a timer has expired). Only calls that end well when they are first tried
//! count: a faulty function must not get itself run by the guest by failing slowly.
//!
//! ```text
//!   timer ─► call, isolated ─────────────► timer ─► call, isolated ────────────►   nothing in between: overdue
//!   timer ─► call ►     guest     timer ─► call ►     guest     timer ─► call ►    run by the guest for a while
//! ```

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::domain::transaction::Refusals;

/// Where the guest has had less than this part of the time that calls took, it got to nothing.
const LEAST_PART: u32 = 16;
/// Most timers that are known at a time; all are forgotten when there are more.
const MAX_TIMERS: usize = 256;

/// Its last call.
#[derive(Debug, Clone, Copy)]
struct Last {
    begun: Instant,
    /// Time of all isolated calls of timers until then.
    spent: Duration,
    /// Time that all have waited until then.
    waited: Duration,
}

/// The timers of a module.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    /// Time of all isolated calls of timers.
    spent: Duration,
    /// Time that calls of timers have waited for the other vCPUs to be held: neither theirs nor the
    /// guest's.
    waited: Duration,
    /// By the gate of the function and its argument.
    last: HashMap<(u64, u64), Last>,
    /// How it went with the calls of each function.
    went: HashMap<u64, Refusals>,
}

impl Timers {
    /// The timer `argument` has called the function with its gate at `gate`, and then waited:
    /// whether that is to be isolated. It is not where the last calls in a row left the guest no
    /// time to speak of.
    pub fn begins(&mut self, gate: u64, argument: u64, now: Instant, waited: Duration) -> bool {
        let timer = (gate, argument);
        if self.last.len() >= MAX_TIMERS && !self.last.contains_key(&timer) {
            self.last.clear();
        }
        let begun = Last {
            begun: now,
            spent: self.spent,
            waited: self.waited,
        };
        self.waited = self.waited.saturating_add(waited);
        let last = self.last.insert(timer, begun);
        let went = self.went.entry(gate).or_default();
        if let Some(last) = last {
            let spent = self.spent.saturating_sub(last.spent);
            let waited = begun.waited.saturating_sub(last.waited);
            let all = now.saturating_duration_since(last.begun);
            let all = all.saturating_sub(waited);
            // Where the guest has run it itself there is nothing to be learnt.
            if !spent.is_zero() {
                went.ended(all.saturating_sub(spent) >= spent / LEAST_PART);
            }
        }
        went.begins()
    }

    /// An isolated call of a timer has ended well, not having failed before, and took so long.
    pub fn committed(&mut self, took: Duration) {
        self.spent = self.spent.saturating_add(took);
    }

    /// A call of this function has failed: what is known of its calls so far is no reason any more
    /// to have the guest run it.
    pub fn failed(&mut self, gate: u64) {
        self.went.remove(&gate);
        self.last.retain(|(of, _), _| *of != gate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATE: u64 = 0xffff_ffff_c000_0000;

    /// Calls of timers by turns, each of which takes `call` if it is isolated and then leaves the
    /// guest `between`: how many of 200 are isolated.
    fn isolated(timers: &mut Timers, call: u64, between: u64, arguments: &[u64]) -> usize {
        let mut now = Instant::now();
        let mut count = 0;
        for argument in arguments.iter().cycle().take(200) {
            if timers.begins(GATE, *argument, now, Duration::ZERO) {
                timers.committed(Duration::from_millis(call));
                now += Duration::from_millis(call);
                count += 1;
            }
            now += Duration::from_millis(between);
        }
        count
    }

    #[test]
    fn a_timer_that_leaves_the_guest_no_time_is_run_by_the_guest_for_ever_longer() {
        let mut timers = Timers::default();
        assert!(isolated(&mut timers, 160, 1, &[1]) <= 20);
        assert!(isolated(&mut timers, 160, 1, &[1]) <= 10);
        // It is isolated again once it leaves time, at the latest when it is tried next.
        let more = (0..100).map(|_| isolated(&mut timers, 1, 15, &[1]));
        assert_eq!(more.last(), Some(200));
    }

    #[test]
    fn so_are_several_by_turns() {
        let mut timers = Timers::default();
        assert!(isolated(&mut timers, 160, 1, &[1, 2, 3]) <= 30);
    }

    #[test]
    fn timers_that_leave_time_and_those_that_expire_together_are_isolated() {
        let mut timers = Timers::default();
        assert_eq!(isolated(&mut timers, 10, 5, &[1]), 200);
        // Forty at once, each of which is due only much later.
        let mut now = Instant::now();
        for _ in 0..10 {
            for timer in 0..40 {
                assert!(timers.begins(GATE, timer, now, Duration::ZERO));
                timers.committed(Duration::from_millis(1));
                now += Duration::from_millis(1);
            }
            now += Duration::from_millis(100);
        }
    }

    #[test]
    fn only_so_many_timers_are_remembered() {
        let mut timers = Timers::default();
        for timer in 0..3 * MAX_TIMERS as u64 {
            timers.begins(GATE, timer, Instant::now(), Duration::ZERO);
        }
        assert!(timers.last.len() <= MAX_TIMERS);
    }

    #[test]
    fn calls_that_fail_are_no_reason_and_take_away_the_others() {
        const SLOW: Duration = Duration::from_millis(160);
        let mut timers = Timers::default();
        let mut now = Instant::now();
        for call in 0..200 {
            assert!(timers.begins(GATE, 1, now, Duration::ZERO), "{call}");
            match call % 4 {
                3 => timers.failed(GATE),
                _ => timers.committed(SLOW),
            }
            now += SLOW;
        }
        // Nor are those that do not end well otherwise.
        for _ in 0..200 {
            timers.begins(GATE, 2, now, Duration::ZERO);
            now += SLOW;
        }
        // A rest ends with the first one.
        let mut timers = Timers::default();
        while timers.begins(GATE, 1, now, Duration::ZERO) {
            timers.committed(SLOW);
            now += SLOW;
        }
        timers.failed(GATE);
        assert!(timers.begins(GATE, 1, now, Duration::ZERO));
    }

    #[test]
    fn waiting_for_the_other_processors_is_neither_the_calls_time_nor_the_guests() {
        let [call, between, waits] = [10, 5, 500].map(Duration::from_millis);
        let isolated = |between: Duration| {
            let mut timers = Timers::default();
            let mut now = Instant::now();
            let calls = (0..50).filter(|_| {
                let begins = timers.begins(GATE, 1, now, waits);
                now += waits + between;
                if begins {
                    timers.committed(call);
                    now += call;
                }
                begins
            });
            calls.count()
        };
        assert_eq!(isolated(between), 50);
        assert!(isolated(Duration::ZERO) < 10);
    }
}
