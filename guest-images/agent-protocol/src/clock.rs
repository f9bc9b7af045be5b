//! What the agent's look at the clock (`/init clock FILE`) tells: one line of JSON.

use serde::{Deserialize, Serialize};

/// What was seen of `CLOCK_MONOTONIC`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockResult {
    /// Reads on each processor.
    pub reads: Vec<u64>,
    /// Reads that gave less than one that had ended before, on whatever processor.
    pub backwards: u64,
    /// By how much at most, in nanoseconds.
    pub worst_ns: u64,
    /// The first read, in nanoseconds.
    pub first_ns: u64,
    /// The highest.
    pub last_ns: u64,
}
