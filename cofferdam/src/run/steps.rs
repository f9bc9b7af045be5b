//! How long the steps take until a guest runs, for the log (`-vv`).

use std::time::Duration;

use devices::clock::monotonic_ns;

/// The steps of a start.
pub struct Steps {
    last_ns: u64,
}

impl Steps {
    /// They began at `began_ns` of the host's monotonic clock.
    pub fn since(began_ns: u64) -> Self {
        Self { last_ns: began_ns }
    }

    /// Says how long it took since the step before it.
    pub fn done(&mut self, step: &str) {
        let now_ns = monotonic_ns();
        let took = Duration::from_nanos(now_ns.saturating_sub(self.last_ns));
        tracing::debug!(at_ns = now_ns, took_us = took.as_micros(), "{step}");
        self.last_ns = now_ns;
    }
}
