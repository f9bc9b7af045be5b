//! Five numbers that stand for a set of samples: `S` of the report's schema.

use serde::{Deserialize, Serialize};

/// Count, smallest, median, 99th percentile and largest of a set of samples, in microseconds unless
/// the field's name says otherwise. Percentiles are nearest-rank: always a sample that was
/// measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Stat {
    /// Number of samples, at least 1.
    pub n: u64,
    /// Smallest sample.
    pub min: f64,
    /// Median.
    pub p50: f64,
    /// 99th percentile; the largest sample where there are fewer than 100.
    pub p99: f64,
    /// Largest sample.
    pub max: f64,
}

impl Stat {
    /// The numbers of `samples`; `None` where there is none (a part that did not run is absent,
    /// never zero) or where a sample is not a number.
    pub fn from_samples(samples: &[f64]) -> Option<Self> {
        if samples.iter().any(|s| !s.is_finite()) {
            return None;
        }
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            n: u64::try_from(sorted.len()).ok()?,
            min: *sorted.first()?,
            p50: nearest_rank(&sorted, 50)?,
            p99: nearest_rank(&sorted, 99)?,
            max: *sorted.last()?,
        })
    }
}

/// Smallest sample that at least `percent` of the samples do not exceed.
fn nearest_rank(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_samples_give_no_numbers() {
        assert_eq!(Stat::from_samples(&[]), None);
        assert_eq!(Stat::from_samples(&[1.0, f64::NAN]), None);
    }

    #[test]
    fn percentiles_are_samples_that_were_measured() {
        let stat = Stat::from_samples(&[5.0, 1.0, 4.0, 2.0, 3.0]).unwrap();
        assert_eq!(
            stat,
            Stat {
                n: 5,
                min: 1.0,
                p50: 3.0,
                p99: 5.0,
                max: 5.0
            }
        );
        let even = Stat::from_samples(&[1.0, 2.0, 3.0, 4.0]).unwrap();
        assert_eq!(even.p50, 2.0);
        let many: Vec<f64> = (1..=200).map(f64::from).collect();
        let stat = Stat::from_samples(&many).unwrap();
        assert_eq!((stat.p50, stat.p99, stat.max), (100.0, 198.0, 200.0));
    }
}
