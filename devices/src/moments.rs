//! When something happened lately, readable from any thread while the guest runs.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// Moments kept; the oldest goes when a new one comes.
const KEPT: usize = 4096;

/// Moments of one kind of event, in nanoseconds of `CLOCK_MONOTONIC`. Its lock is taken last and
/// nothing is called under it.
#[derive(Debug, Default)]
pub struct Moments(Mutex<VecDeque<u64>>);

impl Moments {
    /// It happened at `at_ns`, which is not before what was recorded last.
    pub fn record(&self, at_ns: u64) {
        let mut moments = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if moments.len() == KEPT {
            moments.pop_front();
        }
        moments.push_back(at_ns);
    }

    /// When it first happened at `since_ns` or later. `None` as well if that is longer ago than is
    /// remembered.
    pub fn first_since(&self, since_ns: u64) -> Option<u64> {
        let moments = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if moments.len() == KEPT && moments.front().is_some_and(|oldest| *oldest > since_ns) {
            return None;
        }
        let at = moments.partition_point(|moment| *moment < since_ns);
        moments.get(at).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_moment_after_another_is_found() {
        let moments = Moments::default();
        for at_ns in [10, 20, 30] {
            moments.record(at_ns);
        }
        assert_eq!(moments.first_since(0), Some(10));
        assert_eq!(moments.first_since(20), Some(20));
        assert_eq!(moments.first_since(21), Some(30));
        assert_eq!(moments.first_since(31), None);
    }

    #[test]
    fn what_is_forgotten_is_not_guessed() {
        let moments = Moments::default();
        for at_ns in 0..KEPT as u64 + 10 {
            moments.record(at_ns);
        }
        assert_eq!(moments.first_since(5), None);
        assert_eq!(moments.first_since(10), Some(10));
    }
}
