//! Log lines that a guest can cause, without letting it flood the host's log.

use std::time::{Duration, Instant};

/// Lets a burst of events through per interval and counts what it held back.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    interval: Duration,
    window_start: Instant,
    in_window: u32,
    suppressed: u64,
}

impl Default for RateLimit {
    /// Five lines every ten seconds.
    fn default() -> Self {
        Self::new(5, Duration::from_secs(10))
    }
}

impl RateLimit {
    /// At most `burst` events in each `interval`.
    pub fn new(burst: u32, interval: Duration) -> Self {
        Self {
            burst,
            interval,
            window_start: Instant::now(),
            in_window: 0,
            suppressed: 0,
        }
    }

    /// Whether an event may be logged now; `Some(n)` tells that `n` were held back before it.
    pub fn permit(&mut self) -> Option<u64> {
        let now = Instant::now();
        if now.duration_since(self.window_start) >= self.interval {
            self.window_start = now;
            self.in_window = 0;
        }
        if self.in_window >= self.burst {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.in_window += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_beyond_the_burst_are_held_back_and_counted() {
        let mut limit = RateLimit::new(2, Duration::from_secs(3600));
        assert_eq!(limit.permit(), Some(0));
        assert_eq!(limit.permit(), Some(0));
        assert_eq!(limit.permit(), None);
        limit.interval = Duration::ZERO;
        assert_eq!(limit.permit(), Some(1));
    }
}
