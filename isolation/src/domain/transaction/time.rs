//! How much time a call has had, over all parts of it, and how much it may have.
//!
//! What counts is processor time of the thread that runs P: real time passes also while the host
//! does something else, while the process is stopped (`SIGSTOP`), and while the host makes a page
//! ready that the call has asked for. The time between two exits of P is the call's own, the rest
//! the host's work for it, and each has its limit:
//!
//! | time | limit | beyond it |
//! | --- | --- | --- |
//! | the call's own | its budget, and more for each exit | it hangs: it is aborted |
//! | the host's work | [`HOST_LIMIT`] | it is only slow: the guest runs it |
//! | waits, as asked for and as they took | `sleep_limit`, [`LATE`] times as much | it goes on waiting in the guest |
//!
//! Asking for a thread's processor time is a system call. As long as nothing takes long, real time
//! is counted instead, which is never less.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Real time that a call may take on either side of an exit before processor time is looked at.
const COARSE: Duration = Duration::from_millis(2);
/// What is counted at most where it is not known how much of a longer time the thread got.
const UNKNOWN: Duration = Duration::from_millis(10);
/// Processor time that the host may work for one call: half of what another processor of the guest
/// may be kept waiting until the kernel calls that a lock-up (`watchdog_thresh`, 10 s, twice).
pub(super) const HOST_LIMIT: Duration = Duration::from_secs(10);
/// A call whose runs end in exits gets on, and slowly where exits are slow: for each it gets this
/// part of its budget besides, up to [`MOST`] budgets in all.
const SHARE_OF_EXIT: u32 = 256;
const MOST: u32 = 10;
/// Times as long as they were asked for that waits may take: timers are late on a busy host.
const LATE: u32 = 4;

/// Time that one call has had by now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CallTime {
    /// In the private VM.
    pub own: Duration,
    /// The host's work for it.
    pub host: Duration,
    /// Exits of P.
    pub exits: u32,
    /// Waits with the guest standing still, as they were asked for.
    pub asked: Duration,
    /// And what has really passed in them.
    pub waited: Duration,
}

impl CallTime {
    /// Whether a call of this budget hangs.
    pub(super) fn hangs(&self, budget: Duration) -> bool {
        let more = (budget / SHARE_OF_EXIT).saturating_mul(self.exits);
        let most = budget.saturating_mul(MOST);
        self.own > budget.saturating_add(more).min(most)
    }

    /// Whether the host has worked for it for too long.
    pub(super) fn is_slow(&self) -> bool {
        self.host > HOST_LIMIT
    }

    /// Whether it may wait for `time` more, if it may wait for `limit` in all.
    pub(super) fn may_wait(&self, time: Duration, limit: Duration) -> bool {
        self.asked.saturating_add(time) <= limit && self.waited <= limit.saturating_mul(LATE)
    }
}

/// Tells how much of the time that passes the thread gets, for as long as a call stays on it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Meter {
    /// The thread's processor time at the end of what was counted last; `None` as long as nothing
    /// took long.
    last: Option<Duration>,
}

impl Meter {
    /// What the thread got of `real`, the time since this was asked last.
    pub(super) fn count(&mut self, real: Duration) -> Duration {
        self.count_by(real, thread_time)
    }

    fn count_by(&mut self, real: Duration, thread_time: impl FnOnce() -> Duration) -> Duration {
        if self.last.is_none() && real < COARSE {
            return real;
        }
        let now = thread_time();
        match self.last.replace(now) {
            Some(before) => now.saturating_sub(before).min(real),
            None => real.min(UNKNOWN),
        }
    }
}

/// Processor time of this thread, that in guests included.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // Neither part is ever negative.
    let seconds = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or_default());
    seconds + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn what_is_short_is_counted_as_it_is_and_nobody_is_asked() {
        let mut meter = Meter::default();
        let asked = || panic!("processor time was asked for");
        assert_eq!(meter.count_by(ms(1), asked), ms(1));
        assert_eq!(meter.count_by(ms(1), asked), ms(1));
    }

    #[test]
    fn a_thread_that_got_no_processor_had_no_time() {
        let mut meter = Meter::default();
        // The process was stopped for a minute before anybody had asked.
        assert_eq!(meter.count_by(60 * SECOND, || ms(700)), UNKNOWN);
        // And once more; then it ran for 5 ms of 20.
        assert_eq!(meter.count_by(60 * SECOND, || ms(700)), Duration::ZERO);
        assert_eq!(meter.count_by(ms(20), || ms(705)), ms(5));
        // Clocks are not read at the same moment.
        assert_eq!(meter.count_by(ms(1), || ms(708)), ms(1));
    }

    #[test]
    fn a_thread_that_is_stopped_has_no_processor_time() {
        let mut meter = Meter::default();
        meter.count(SECOND);
        let asleep = std::time::Instant::now();
        std::thread::sleep(ms(50));
        assert!(meter.count(asleep.elapsed()) < ms(50));
    }

    #[test]
    fn who_runs_without_an_exit_hangs_and_who_gets_on_is_given_more() {
        let ran = |own, exits| CallTime {
            own,
            exits,
            ..CallTime::default()
        };
        assert!(!ran(SECOND, 0).hangs(SECOND));
        assert!(ran(SECOND + ms(1), 0).hangs(SECOND));
        assert!(!ran(4 * SECOND, 1000).hangs(SECOND));
        // But not for ever.
        assert!(ran(10 * SECOND + ms(1), u32::MAX).hangs(SECOND));
        // Who is slow does not hang.
        let slow = CallTime {
            host: HOST_LIMIT + ms(1),
            ..CallTime::default()
        };
        assert!(slow.is_slow() && !slow.hangs(ms(20)));
    }

    #[test]
    fn waits_are_limited_by_what_was_asked_for_and_by_what_has_passed() {
        let after = |asked, waited| CallTime {
            asked,
            waited,
            ..CallTime::default()
        };
        assert!(after(ms(90), ms(100)).may_wait(ms(10), ms(100)));
        assert!(!after(ms(91), ms(91)).may_wait(ms(10), ms(100)));
        // Ten thousand waits for nothing.
        assert!(!after(Duration::ZERO, ms(401)).may_wait(Duration::ZERO, ms(100)));
    }
}
