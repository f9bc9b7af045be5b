//! The controller's timers, all behind one timerfd.
//!
//! The descriptor is armed for the earliest deadline and is not moved when a deadline only moves
//! later: it then fires early once and is armed anew. A delay timer that restarts with every packet
//! so costs one system call for each time that it is waited for, not one for each packet.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Instant;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use serde::{Deserialize, Serialize};

/// What a timer is for; also its place in [`TimersState`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timer {
    /// Interrupts are throttled until then (ITR).
    Throttle,
    /// Receive delay, restarted by each packet (RDTR).
    ReceiveDelay,
    /// Receive delay since the first packet (RADV).
    ReceiveAbsolute,
    /// Transmit delay, restarted by each write-back (TIDV).
    TransmitDelay,
    /// Transmit delay since the first write-back (TADV).
    TransmitAbsolute,
    /// End of the PHY's autonegotiation.
    Autonegotiation,
}

const TIMERS: [Timer; 6] = [
    Timer::Throttle,
    Timer::ReceiveDelay,
    Timer::ReceiveAbsolute,
    Timer::TransmitDelay,
    Timer::TransmitAbsolute,
    Timer::Autonegotiation,
];

/// Nanoseconds that each running timer still has, in the order of [`Timer`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimersState([Option<u64>; TIMERS.len()]);

#[derive(Debug)]
enum Clock {
    Monotonic(Instant),
    /// Stands still until it is moved: for tests that must not depend on the machine's speed.
    Manual(u64),
}

/// Nanoseconds in a unit of the delay registers (13.4.30, 13.4.31, 13.4.41, 13.4.44).
const DELAY_UNIT_NS: u64 = 1024;
/// Delays below this are none: they are over before the host can wake a thread for them, and waking
/// it costs more than the interrupt that they save.
const SHORTEST_DELAY_NS: u64 = 16 * DELAY_UNIT_NS;

/// Nanoseconds that a delay register asks for; `None` where the interrupt comes at once.
pub fn delay_ns(units: u32) -> Option<u64> {
    Some(u64::from(units) * DELAY_UNIT_NS).filter(|&ns| ns >= SHORTEST_DELAY_NS)
}

/// What the clock shows when a set is made, so that a moment before that can be told.
const EPOCH_NS: u64 = 1 << 32;

/// See the module's text. Times are nanoseconds, [`EPOCH_NS`] when the set was made.
#[derive(Debug)]
pub struct Timers {
    clock: Clock,
    deadlines: [Option<u64>; TIMERS.len()],
    fd: OwnedFd,
    armed_for: Option<u64>,
}

impl Timers {
    /// A set of timers none of which runs, on the machine's monotonic clock or on one that
    /// [`Timers::advance`] moves.
    pub fn new(manual_clock: bool) -> std::io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            clock: if manual_clock {
                Clock::Manual(EPOCH_NS)
            } else {
                Clock::Monotonic(Instant::now())
            },
            deadlines: Default::default(),
            fd: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            armed_for: None,
        })
    }

    /// Descriptor that is readable when [`Timers::due`] has something to give.
    pub fn fd(&self) -> RawFd {
        self.fd.as_fd().as_raw_fd()
    }

    /// Now.
    pub fn now(&self) -> u64 {
        match self.clock {
            Clock::Monotonic(origin) => {
                let passed = u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX);
                passed.saturating_add(EPOCH_NS)
            }
            Clock::Manual(now) => now,
        }
    }

    /// Moves a manual clock.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn advance(&mut self, ns: u64) {
        if let Clock::Manual(now) = &mut self.clock {
            *now = now.saturating_add(ns);
        }
    }

    /// Starts `timer` anew to end in `ns`.
    pub fn start(&mut self, timer: Timer, ns: u64) {
        let deadline = self.now().saturating_add(ns);
        self.deadlines[timer as usize] = Some(deadline);
        self.arm(deadline);
    }

    /// Starts `timer` unless it runs.
    pub fn start_if_idle(&mut self, timer: Timer, ns: u64) {
        if self.deadlines[timer as usize].is_none() {
            self.start(timer, ns);
        }
    }

    /// Stops `timer`; true when it was running.
    pub fn stop(&mut self, timer: Timer) -> bool {
        self.deadlines[timer as usize].take().is_some()
    }

    /// Whether no timer runs.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn is_idle(&self) -> bool {
        self.deadlines.iter().all(Option::is_none)
    }

    /// Stops all timers.
    pub fn stop_all(&mut self) {
        self.deadlines = Default::default();
    }

    /// Takes the next timer whose time has come; when there is none, arms the descriptor for the
    /// next one if it fired.
    pub fn due(&mut self) -> Option<Timer> {
        let now = self.now();
        for timer in TIMERS {
            if self.deadlines[timer as usize].is_some_and(|deadline| deadline <= now) {
                self.deadlines[timer as usize] = None;
                return Some(timer);
            }
        }
        let mut expirations = [0; 8];
        // The descriptor may be a little late: it is asked again when it is readable, or it would
        // stay so for ever.
        if self.armed_for.is_some_and(|armed| armed <= now)
            && rustix::io::read(&self.fd, &mut expirations).is_ok()
        {
            self.armed_for = None;
            if let Some(deadline) = self.deadlines.iter().flatten().min() {
                self.arm(*deadline);
            }
        }
        None
    }

    fn arm(&mut self, deadline: u64) {
        if matches!(self.clock, Clock::Manual(_))
            || self.armed_for.is_some_and(|armed| armed <= deadline)
        {
            return;
        }
        // 0 would disarm.
        let ns = deadline.saturating_sub(self.now()).max(1);
        let value = Timespec {
            tv_sec: i64::try_from(ns / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: (ns % 1_000_000_000) as _,
        };
        let once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let setting = Itimerspec {
            it_interval: once,
            it_value: value,
        };
        match timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &setting) {
            Ok(_) => self.armed_for = Some(deadline),
            Err(error) => tracing::error!("cannot arm the NIC's timer: {error}"),
        }
    }

    /// The running timers, for a checkpoint.
    pub fn save(&self) -> TimersState {
        let now = self.now();
        TimersState(
            self.deadlines
                .map(|deadline| deadline.map(|d| d.saturating_sub(now))),
        )
    }

    /// Runs exactly the timers of `state`.
    pub fn restore(&mut self, state: &TimersState) {
        self.stop_all();
        for (timer, left) in TIMERS.into_iter().zip(state.0) {
            if let Some(ns) = left {
                self.start(timer, ns);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_come_due_in_their_time_and_once() {
        let mut timers = Timers::new(true).unwrap();
        timers.start(Timer::Throttle, 100);
        timers.start(Timer::ReceiveDelay, 50);
        timers.advance(60);
        assert_eq!(timers.due(), Some(Timer::ReceiveDelay));
        assert_eq!(timers.due(), None);
        let saved = timers.save();
        let mut twin = Timers::new(true).unwrap();
        twin.restore(&saved);
        twin.advance(39);
        assert_eq!(twin.due(), None);
        twin.advance(1);
        assert_eq!(twin.due(), Some(Timer::Throttle));
    }

    #[test]
    fn a_descriptor_that_is_late_is_read_when_it_comes() {
        let mut timers = Timers::new(false).unwrap();
        timers.start(Timer::Throttle, 1_000_000);
        // As if its time had come before it.
        timers.deadlines[Timer::Throttle as usize] = Some(0);
        timers.armed_for = Some(0);
        assert_eq!(timers.due(), Some(Timer::Throttle));
        assert_eq!(timers.due(), None);
        let is_readable = |timers: &Timers, wait: bool| {
            let mut fds = [rustix::event::PollFd::new(
                &timers.fd,
                rustix::event::PollFlags::IN,
            )];
            let none = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let timeout = (!wait).then_some(none);
            rustix::event::poll(&mut fds, timeout.as_ref()).unwrap() > 0
        };
        assert!(is_readable(&timers, true));
        assert_eq!(timers.due(), None);
        assert!(!is_readable(&timers, false));
        // One that is started now is waited for.
        timers.start(Timer::ReceiveDelay, 1_000);
        assert!(is_readable(&timers, true));
    }

    #[test]
    fn the_descriptor_becomes_readable() {
        let mut timers = Timers::new(false).unwrap();
        timers.start(Timer::Throttle, 1_000_000);
        let mut fds = [rustix::event::PollFd::new(
            &timers.fd,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut fds, None).unwrap();
        assert_eq!(timers.due(), Some(Timer::Throttle));
    }
}
