//! How much sooner a rollback is over than a restart or a reboot of the same run: the headline.

use serde::{Deserialize, Serialize};

use super::{Method, Phase, Recovery, Stat};

/// What Kadav, Renzelmann and Swift published of FGFT (ASPLOS 2013, abstract): recovery by device
/// checkpoints made failures shorter than a restart of the driver did by this part. Theirs, on
/// their hardware and six drivers.
pub const FGFT_SHORTER_BY: f64 = 0.79;

/// Rollbacks of one entry point against a baseline of the same report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Entry point; absent for all of them together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<String>,
    /// Calls that had gone on in the guest, which are never put together with others.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub spilled: bool,
    /// The baseline.
    pub against: Method,
    /// Number of rollbacks.
    pub n: u64,
    /// Fault to the caller running again, of the rollbacks.
    pub returned_us: Stat,
    /// Median of the baseline's `returned` over theirs.
    pub returned: f64,
    /// Fault to the first ping answered that was sent after it, of the rollbacks; absent where the
    /// failed call leaves the interface down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_rx_us: Option<Stat>,
    /// Median of the baseline's `first_rx` over theirs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_rx: Option<f64>,
    /// What the slowest return was spent on.
    pub slowest: String,
}

/// The ratios of all rollbacks in `recoveries` to all baselines in it.
pub fn ratios(recoveries: &[Recovery]) -> Vec<Ratio> {
    let of = |method| {
        recoveries
            .iter()
            .filter(move |r: &&Recovery| r.method == method)
    };
    let mut rows: Vec<(bool, Option<&str>)> = Vec::new();
    for spilled in [false, true] {
        rows.push((spilled, None));
        for recovery in of(Method::Rollback).filter(|r| r.spilled == spilled) {
            let row = (spilled, recovery.entry.as_deref());
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
    }
    let mut all = Vec::new();
    for against in [Method::Restart, Method::Reboot] {
        let baseline: Vec<&Recovery> = of(against).collect();
        for (spilled, entry) in &rows {
            let wanted = |r: &&Recovery| {
                r.spilled == *spilled && (entry.is_none() || r.entry.as_deref() == *entry)
            };
            let rollbacks: Vec<&Recovery> = of(Method::Rollback).filter(wanted).collect();
            let ratio = ratio(*entry, against, &rollbacks, &baseline);
            all.extend(ratio.map(|ratio| Ratio {
                spilled: *spilled,
                ..ratio
            }));
        }
    }
    all
}

impl Ratio {
    /// What was rolled back.
    pub fn name(&self) -> String {
        match (self.entry.as_deref(), self.spilled) {
            (Some(entry), false) => entry.to_owned(),
            (Some(entry), true) => format!("{entry}, spilled"),
            (None, false) => "all atomic".to_owned(),
            (None, true) => "all spilled".to_owned(),
        }
    }

    /// How many times sooner the first packet comes, for tables.
    pub fn first_rx_text(&self) -> String {
        self.first_rx
            .map_or_else(String::new, |times| format!("{times:.0} times"))
    }
}

fn ratio(
    entry: Option<&str>,
    against: Method,
    rollbacks: &[&Recovery],
    baseline: &[&Recovery],
) -> Option<Ratio> {
    let stat = |recoveries: &[&Recovery], phase| {
        let ends: Vec<f64> = recoveries.iter().flat_map(|r| r.ends_us(phase)).collect();
        Stat::from_samples(&ends)
    };
    let returned_us = stat(rollbacks, Phase::Returned)?;
    let first_rx_us = stat(rollbacks, Phase::FirstRx);
    let baseline_rx = stat(baseline, Phase::FirstRx);
    Some(Ratio {
        spilled: false,
        entry: entry.map(str::to_owned),
        against,
        n: returned_us.n,
        returned: stat(baseline, Phase::Returned)?.p50 / returned_us.p50,
        first_rx: baseline_rx
            .zip(first_rx_us)
            .map(|(theirs, ours)| theirs.p50 / ours.p50),
        slowest: slowest(rollbacks).unwrap_or_default(),
        returned_us,
        first_rx_us,
    })
}

/// The phases of the rollback that took longest to return.
fn slowest(rollbacks: &[&Recovery]) -> Option<String> {
    let end = |run: &super::RecoveryRun| run.at_us.get(&Phase::Returned).copied();
    let runs = rollbacks
        .iter()
        .flat_map(|recovery| recovery.runs.iter().map(move |run| (recovery, run)));
    let (recovery, run) = runs
        .filter(|(_, run)| end(run).is_some())
        .max_by(|a, b| end(a.1).unwrap_or(0.0).total_cmp(&end(b.1).unwrap_or(0.0)))?;
    let phases: Vec<String> = run
        .durations_us()
        .into_iter()
        .take_while(|(phase, _)| *phase <= Phase::Returned)
        .map(|(phase, us)| format!("{} {us:.0} us", phase.name()))
        .collect();
    let fault = recovery.fault.as_deref().unwrap_or_default();
    let entry = recovery.entry.as_deref().unwrap_or_default();
    Some(format!("{entry}, {fault}: {}", phases.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::RecoveryRun;

    fn recovery(method: Method, entry: Option<&str>, ends: &[(f64, f64)]) -> Recovery {
        let run = |(returned, rx): &(f64, f64)| RecoveryRun {
            at_us: [
                (Phase::Memory, returned / 2.0),
                (Phase::Returned, *returned),
                (Phase::FirstRx, *rx),
            ]
            .into(),
            ..RecoveryRun::default()
        };
        let recovery = Recovery::from_runs("e1000", method, ends.iter().map(run).collect());
        Recovery {
            entry: entry.map(str::to_owned),
            ..recovery.unwrap()
        }
    }

    #[test]
    fn medians_of_one_report_are_compared() {
        let all = [
            recovery(Method::Restart, None, &[(1e6, 2e6), (3e6, 4e6), (2e6, 3e6)]),
            recovery(
                Method::Rollback,
                Some("a"),
                &[(500.0, 3000.0), (1000.0, 2000.0)],
            ),
            recovery(Method::Rollback, Some("b"), &[(2000.0, 5000.0)]),
        ];
        let ratios = ratios(&all);
        let find = |entry: Option<&str>| {
            let found = ratios.iter().find(|r| r.entry.as_deref() == entry);
            found.unwrap()
        };
        assert_eq!(ratios.len(), 3);
        assert_eq!((find(None).n, find(None).returned), (3, 2000.0));
        assert_eq!(find(Some("b")).returned, 1000.0);
        assert_eq!(find(Some("b")).first_rx, Some(600.0));
        assert_eq!(find(None).slowest, "b, : memory 1000 us, returned 1000 us");
    }

    #[test]
    fn calls_that_spilled_are_apart() {
        let spilled = Recovery {
            spilled: true,
            ..recovery(Method::Rollback, Some("b"), &[(5000.0, 9000.0)])
        };
        let all = [
            recovery(Method::Restart, None, &[(1e6, 2e6)]),
            recovery(Method::Rollback, Some("b"), &[(500.0, 900.0)]),
            spilled,
        ];
        let rows: Vec<(String, f64)> = ratios(&all)
            .iter()
            .map(|ratio| (ratio.name(), ratio.returned))
            .collect();
        let expected = [
            ("all atomic", 2000.0),
            ("b", 2000.0),
            ("all spilled", 200.0),
            ("b, spilled", 200.0),
        ];
        assert_eq!(rows, expected.map(|(name, times)| (name.to_owned(), times)));
    }

    #[test]
    fn without_a_baseline_nothing_is_compared() {
        assert!(ratios(&[recovery(Method::Rollback, Some("a"), &[(1.0, 2.0)])]).is_empty());
        assert!(ratios(&[recovery(Method::Restart, None, &[(1.0, 2.0)])]).is_empty());
    }
}
