//! How long things took: counts by bounds that never change, so that what several processes have
//! kept can be added up.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The bounds in nanoseconds, each inclusive: 1, 2, 5 in each decade from 10 us to 50 s, and 60 s.
pub const BOUNDS_NS: [u64; 22] = {
    let mut bounds = [60_000_000_000; 22];
    let (mut at, mut decade) = (0, 10_000);
    while at < 21 {
        bounds[at] = decade;
        bounds[at + 1] = 2 * decade;
        bounds[at + 2] = 5 * decade;
        decade *= 10;
        at += 3;
    }
    bounds
};

/// How many took how long.
///
/// As it travels, `counts` ends with the last one that is not zero.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// How many took as long as each of [`BOUNDS_NS`] and longer than the one before it; then
    /// those that took longer than all bounds.
    counts: Vec<u64>,
    /// All of them together, in nanoseconds.
    sum_ns: u64,
}

impl Histogram {
    /// Counts one.
    pub fn add(&mut self, took: Duration) {
        self.add_ns(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Counts one that took so many nanoseconds.
    pub fn add_ns(&mut self, ns: u64) {
        let at = BOUNDS_NS.partition_point(|&bound| bound < ns);
        if self.counts.len() <= at {
            self.counts.resize(at + 1, 0);
        }
        if let Some(count) = self.counts.get_mut(at) {
            *count = count.saturating_add(1);
        }
        self.sum_ns = self.sum_ns.saturating_add(ns);
    }

    /// Counts what another one has counted.
    pub fn join(&mut self, other: &Self) {
        let counts = other.counts();
        if self.counts.len() < counts.len() {
            self.counts.resize(counts.len(), 0);
        }
        for (count, more) in self.counts.iter_mut().zip(counts) {
            *count = count.saturating_add(more);
        }
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
    }

    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// How many there are in all.
    pub fn count(&self) -> u64 {
        self.counts.iter().fold(0, |sum, &n| sum.saturating_add(n))
    }

    /// All of them together, in nanoseconds.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// How many are within each of [`BOUNDS_NS`] and beyond the one before it, and then beyond all
    /// of them. What came from elsewhere with more counts than there are bounds is beyond them.
    pub fn counts(&self) -> [u64; BOUNDS_NS.len() + 1] {
        let mut counts = [0_u64; BOUNDS_NS.len() + 1];
        for (at, &count) in self.counts.iter().enumerate() {
            if let Some(sum) = counts.get_mut(at.min(BOUNDS_NS.len())) {
                *sum = sum.saturating_add(count);
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_counted_at_the_first_bound_that_it_does_not_exceed() {
        assert_eq!(BOUNDS_NS[..4], [10_000, 20_000, 50_000, 100_000]);
        assert_eq!(BOUNDS_NS[20..], [50_000_000_000, 60_000_000_000]);
        assert!(BOUNDS_NS.is_sorted());
        let mut histogram = Histogram::default();
        for (at, &bound) in BOUNDS_NS.iter().enumerate() {
            histogram.add_ns(bound);
            histogram.add(Duration::from_nanos(bound + 1));
            assert!(histogram.counts()[at] > 0 && histogram.counts()[at + 1] > 0);
        }
        let mut expected = [2; BOUNDS_NS.len() + 1];
        (expected[0], expected[BOUNDS_NS.len()]) = (1, 1);
        assert_eq!(histogram.counts(), expected);
        assert_eq!(histogram.count(), 2 * BOUNDS_NS.len() as u64);
        let sum: u64 = BOUNDS_NS.iter().map(|bound| 2 * bound + 1).sum();
        assert_eq!(histogram.sum_ns(), sum);
        histogram.add_ns(u64::MAX);
        assert_eq!((histogram.counts()[22], histogram.sum_ns()), (2, u64::MAX));
    }

    #[test]
    fn two_are_joined_whichever_has_seen_longer_times() {
        let of = |times: &[u64]| {
            let mut histogram = Histogram::default();
            times.iter().for_each(|&ns| histogram.add_ns(ns));
            histogram
        };
        let (short, long) = (of(&[1, 30_000]), of(&[2, 7_000_000]));
        for (first, second) in [(&short, &long), (&long, &short)] {
            let mut joined = first.clone();
            joined.join(second);
            let all = of(&[1, 30_000, 2, 7_000_000]);
            assert_eq!(
                (joined.counts(), joined.sum_ns()),
                (all.counts(), all.sum_ns())
            );
        }
    }

    #[test]
    fn more_counts_than_bounds_are_beyond_them() {
        let text = format!("{{\"counts\":[{}1],\"sum_ns\":5}}", "1,".repeat(29));
        let read: Histogram = serde_json::from_str(&text).unwrap();
        assert_eq!((read.counts()[21], read.counts()[22]), (1, 8));
        assert_eq!(read.count(), 30);
    }
}
