//! The guest's clock in the host's terms.
//!
//! A guest's `CLOCK_MONOTONIC` starts at zero when it boots. A question to the agent that is
//! answered quickly gives the difference to the host's clock, to within half of the time that the
//! question took beyond the agent's own: the guest's moment lies somewhere between the host's two.

use std::time::{Duration, Instant};

use agent_protocol::client::{Answer, Client, ClientError};
use devices::clock::monotonic_ns;

/// Questions that are asked; the quickest one counts.
const QUESTIONS: usize = 8;

/// How a guest's clock relates to the host's, for as long as the guest is not reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestClock {
    /// Host's monotonic time less the guest's, in nanoseconds.
    offset_ns: i64,
    /// How far off `offset_ns` can be, in nanoseconds.
    pub error_ns: u64,
}

impl GuestClock {
    /// Asks the agent.
    pub fn measure(agent: &mut Client) -> Result<Self, ClientError> {
        let mut best: Option<Self> = None;
        for _ in 0..QUESTIONS {
            let clock = Self::from_answer(&agent.ping()?);
            if best.is_none_or(|best| clock.error_ns < best.error_ns) {
                best = Some(clock);
            }
        }
        // The loop ran at least once.
        best.ok_or(ClientError::Restarted)
    }

    fn from_answer(answer: &Answer) -> Self {
        Self::from_times(
            (host_ns(answer.asked), host_ns(answer.answered)),
            (answer.received.mono_ns, answer.sent.mono_ns),
        )
    }

    /// From when the host asked and had the answer, and when the guest received and answered.
    fn from_times(host: (u64, u64), guest: (u64, u64)) -> Self {
        let middle = |(from, to): (u64, u64)| i128::from(from) + i128::from(to);
        let offset = (middle(host) - middle(guest)) / 2;
        let host_took = host.1.saturating_sub(host.0);
        let guest_took = guest.1.saturating_sub(guest.0);
        Self {
            // What a guest says need not fit.
            offset_ns: i64::try_from(offset).unwrap_or(if offset < 0 {
                i64::MIN
            } else {
                i64::MAX
            }),
            error_ns: host_took.saturating_sub(guest_took) / 2,
        }
    }

    /// The host's monotonic time at a moment of the guest's, in nanoseconds.
    pub fn host_ns(&self, guest_mono_ns: u64) -> u64 {
        guest_mono_ns.saturating_add_signed(self.offset_ns)
    }
}

/// An instant as nanoseconds of the host's `CLOCK_MONOTONIC`.
pub fn host_ns(at: Instant) -> u64 {
    let (now, now_ns) = (Instant::now(), monotonic_ns());
    let ns = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
    match now.checked_duration_since(at) {
        Some(ago) => now_ns.saturating_sub(ns(ago)),
        None => now_ns.saturating_add(ns(at.duration_since(now))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_moment_lies_in_the_middle_of_the_hosts() {
        let clock = GuestClock::from_times((1000, 1100), (20, 40));
        assert_eq!(clock.host_ns(30), 1050);
        assert_eq!(clock.error_ns, 40);
    }

    #[test]
    fn a_guest_that_lies_about_its_time_causes_no_panic() {
        let clock = GuestClock::from_times((1000, 1100), (u64::MAX, 0));
        let _ = clock.host_ns(u64::MAX);
        let clock = GuestClock::from_times((1000, 1100), (u64::MAX, u64::MAX));
        assert_eq!(clock.host_ns(0), 0);
    }

    #[test]
    fn instants_and_nanoseconds_are_the_same_clock() {
        let before = monotonic_ns();
        let at = Instant::now();
        let after = monotonic_ns();
        let ns = host_ns(at);
        // Between the two readings inside there may be a pause of any length, in one direction.
        assert!(
            ns >= before && ns.saturating_sub(1_000_000_000) < after,
            "{before} {ns} {after}"
        );
    }
}
