//! Counters of two readings, and what went by per second between them.

use std::collections::BTreeMap;

const SECOND_NS: u128 = 1_000_000_000;

/// How often per second a counter went up between two readings that are `elapsed_ns` apart. `None`
/// where it went back, as it does when what counts begins anew, or no time went by.
pub fn per_second(before: u64, now: u64, elapsed_ns: u64) -> Option<u64> {
    let more = u128::from(now.checked_sub(before)?);
    let per_second = (more * SECOND_NS).checked_div(u128::from(elapsed_ns))?;
    Some(u64::try_from(per_second).unwrap_or(u64::MAX))
}

/// The same for all counters of one kind together. Those that went back, or are in one reading
/// only, are left out; `None` where that is all of them.
pub fn all_per_second(
    before: &BTreeMap<String, u64>,
    now: &BTreeMap<String, u64>,
    elapsed_ns: u64,
) -> Option<u64> {
    let mut more = None;
    for (name, count) in now {
        let went_up = before.get(name).and_then(|old| count.checked_sub(*old));
        if let Some(went_up) = went_up {
            more = Some(more.unwrap_or(0u64).saturating_add(went_up));
        }
    }
    per_second(0, more?, elapsed_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_per_second_however_long_lies_between() {
        assert_eq!(per_second(10, 110, 1_000_000_000), Some(100));
        assert_eq!(per_second(10, 110, 500_000_000), Some(200));
        assert_eq!(per_second(0, u64::MAX, 1), Some(u64::MAX));
        assert_eq!(per_second(5, 5, 1_000_000_000), Some(0));
    }

    #[test]
    fn a_counter_that_went_back_has_no_rate() {
        assert_eq!(per_second(110, 10, 1_000_000_000), None);
        assert_eq!(per_second(10, 110, 0), None);
    }

    #[test]
    fn counters_that_went_back_or_are_new_do_not_spoil_the_others() {
        let counters = |all: &[(&str, u64)]| -> BTreeMap<String, u64> {
            all.iter()
                .map(|(name, n)| ((*name).to_owned(), *n))
                .collect()
        };
        let before = counters(&[("a", 100), ("b", 50), ("gone", 7)]);
        let now = counters(&[("a", 130), ("b", 2), ("new", 1000)]);
        assert_eq!(all_per_second(&before, &now, 1_000_000_000), Some(30));
        let back = counters(&[("a", 1)]);
        assert_eq!(all_per_second(&before, &back, 1_000_000_000), None);
    }
}
