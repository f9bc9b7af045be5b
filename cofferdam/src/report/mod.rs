//! What was measured, as data: the types of `report.json`, and how parts become one report.
//!
//! Every figure that a person sees (tables, plots, documentation) comes out of a [`Report`]. A part
//! that did not run is absent, never zero. Sections this version does not know are kept as they are
//! when parts are merged.

mod axis;
pub mod campaign;
mod canvas;
pub mod drivers;
pub mod environment;
pub mod html;
pub mod isolation;
pub mod merge;
mod plot;
pub mod ratio;
mod stat;
pub mod suspend;
pub mod svg;
pub mod switch;
pub mod traffic;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use stat::Stat;

use self::traffic::Traffic;

/// Version of the schema that [`Report`] writes.
pub const SCHEMA: u32 = 1;

/// A whole report, or one part of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of the schema, [`SCHEMA`].
    pub schema: u32,
    /// Commit the binary was built from; "unknown" outside a checkout.
    pub commit: String,
    /// Where it ran.
    pub host: Host,
    /// The guest it ran with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<Guest>,
    /// How a guest comes up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<Boot>,
    /// Other monitors booting the same kernel in the same place, for the ratio.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub boot_others: Vec<OtherBoot>,
    /// How long a network is gone, by way of recovery.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recovery: Vec<Recovery>,
    /// How much sooner rollbacks are over than the baselines.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recovery_ratios: Vec<ratio::Ratio>,
    /// How much sooner failed calls of each driver are over than a restart of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drivers: Vec<drivers::DriverRecovery>,
    /// What went through the NIC, and whether all of it arrived.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub traffic: Vec<Traffic>,
    /// What isolation costs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<isolation::Isolation>,
    /// Snapshots, restores and rewinds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub suspend: Vec<suspend::Suspend>,
    /// What a mark costs the guest's traffic.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub suspend_followed: Vec<suspend::Followed>,
    /// What guests cost that go on from one snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clones: Vec<suspend::Clones>,
    /// A NIC moved between running guests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub switch: Vec<switch::Switch>,
    /// Faults on purpose, and what became of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub campaigns: Vec<campaign::Campaign>,
    /// Sections that this version does not know.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// The host that the measurement ran on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// `host`, or `lab` inside the emulated server.
    #[serde(rename = "where")]
    pub place: String,
    /// `ept`, `npt` or `shadow`, as far as the host tells.
    pub second_stage: String,
    /// Release of the host's kernel.
    pub kernel: String,
    /// Model name of the host's processor.
    pub cpu: String,
}

/// The guest of the measurement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// Release of the guest's kernel.
    pub kernel: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub mem_mib: u64,
}

/// How a guest comes up under this monitor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Boot {
    /// Start of the process until the vCPUs run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_ready_us: Option<Stat>,
    /// Start of the process until the first line of `/init`.
    pub to_init_us: Stat,
    /// Resident memory of the process beyond guest memory, in KiB; largest of the runs.
    pub vmm_rss_kib: u64,
    /// Each run, in the order it was made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub runs: Vec<BootRun>,
}

/// One boot.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BootRun {
    /// Start of the process until the vCPUs run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_ready_us: Option<f64>,
    /// Start of the process until the first line of `/init`.
    pub to_init_us: f64,
    /// Resident memory of the process beyond guest memory, in KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_rss_kib: Option<u64>,
}

/// Another monitor booting the same kernel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OtherBoot {
    /// Which monitor, its version and its machine type.
    pub vmm: String,
    /// Start of the process until the first line of `/init`.
    pub to_init_us: Stat,
    /// Each run, in the order it was made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub runs: Vec<BootRun>,
}

/// One way of recovery, measured several times.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recovery {
    /// The guest's driver.
    pub driver: String,
    /// Entry point that failed; absent for a baseline, which has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<String>,
    /// How the guest got its network back.
    pub method: Method,
    /// Fault that was put in; absent for a baseline, which has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
    /// The calls had gone on in the guest, and were taken back by compensation.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub spilled: bool,
    /// How often the link came or went during all runs of the entry; absent for a baseline, which
    /// takes it down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_changes: Option<u64>,
    /// Number of runs that are in the numbers.
    pub n: u64,
    /// Each phase's duration: from the end of the phase before it in the same run to its own end,
    /// so that the phases of one run add up to its total.
    pub phases_us: BTreeMap<Phase, Stat>,
    /// From the start to the end of the last phase.
    pub total_us: Stat,
    /// What the steps of the method itself took (`remove`, `insert`, ...), by the guest's clock.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub steps_us: BTreeMap<String, Stat>,
    /// Each run, in the order it was made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub runs: Vec<RecoveryRun>,
}

/// How a guest gets its network back.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// The failed call is rolled back.
    Rollback,
    /// The driver is removed and inserted, and the interface brought up.
    Restart,
    /// The guest is reset and boots.
    Reboot,
}

impl Method {
    /// Its name in reports and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rollback => "rollback",
            Self::Restart => "restart",
            Self::Reboot => "reboot",
        }
    }
}

/// A phase of recovery, always reported apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Fault to trap.
    Detect,
    /// Memory discarded or undone.
    Memory,
    /// Kernel calls compensated.
    Compensate,
    /// Device checkpoint restored.
    Device,
    /// The caller runs again: the failed call returned; in a restart the driver is in and its
    /// interface is up with its address; in a reboot the guest's agent answers.
    Returned,
    /// Interrupts are delivered again.
    IrqLive,
    /// The driver reports its link up.
    LinkUp,
    /// First frame from the guest.
    FirstTx,
    /// First reply of the guest to the host: both directions work.
    FirstRx,
}

impl Phase {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Detect => "detect",
            Self::Memory => "memory",
            Self::Compensate => "compensate",
            Self::Device => "device",
            Self::Returned => "returned",
            Self::IrqLive => "irq_live",
            Self::LinkUp => "link_up",
            Self::FirstTx => "first_tx",
            Self::FirstRx => "first_rx",
        }
    }
}

/// One recovery: when each phase ended, in microseconds since the start of the recovery.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RecoveryRun {
    /// End of each phase that was seen.
    pub at_us: BTreeMap<Phase, f64>,
    /// Steps of the method itself, in microseconds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub steps_us: BTreeMap<String, f64>,
}

impl RecoveryRun {
    /// Phases in the order in which they ended, each with the time since the one before it ended.
    pub fn durations_us(&self) -> Vec<(Phase, f64)> {
        let mut ends: Vec<(Phase, f64)> = self.at_us.iter().map(|(p, t)| (*p, *t)).collect();
        ends.sort_by(|a, b| a.1.total_cmp(&b.1));
        let mut before = 0.0;
        ends.into_iter()
            .map(|(phase, at)| {
                let took = at - before;
                before = at;
                (phase, took)
            })
            .collect()
    }

    /// End of the last phase, in microseconds since the start.
    pub fn total_us(&self) -> Option<f64> {
        self.at_us.values().copied().max_by(f64::total_cmp)
    }
}

impl Recovery {
    /// What was recovered from, and how.
    pub fn name(&self) -> String {
        let method = self.method.name();
        match (&self.entry, &self.fault) {
            (Some(entry), Some(fault)) => format!("{method} ({entry}, {fault})"),
            (Some(entry), None) => format!("{method} ({entry})"),
            (None, _) => format!("{method} ({})", self.driver),
        }
    }

    /// When a phase ended in each run that had it, in microseconds since the start.
    pub fn ends_us(&self, phase: Phase) -> Vec<f64> {
        let ends = self.runs.iter().filter_map(|run| run.at_us.get(&phase));
        ends.copied().collect()
    }

    /// The numbers of `runs`; `None` where there is none.
    pub fn from_runs(driver: &str, method: Method, runs: Vec<RecoveryRun>) -> Option<Self> {
        let totals: Vec<f64> = runs.iter().filter_map(RecoveryRun::total_us).collect();
        let mut phases: BTreeMap<Phase, Vec<f64>> = BTreeMap::new();
        let mut steps: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for run in &runs {
            for (phase, took) in run.durations_us() {
                phases.entry(phase).or_default().push(took);
            }
            for (step, took) in &run.steps_us {
                steps.entry(step.clone()).or_default().push(*took);
            }
        }
        Some(Self {
            driver: driver.to_owned(),
            entry: None,
            method,
            fault: None,
            spilled: false,
            link_changes: None,
            n: u64::try_from(totals.len()).ok()?,
            phases_us: stats(phases),
            total_us: Stat::from_samples(&totals)?,
            steps_us: stats(steps),
            runs,
        })
    }
}

/// The numbers of each set of samples that has any.
fn stats<K: Ord>(samples: BTreeMap<K, Vec<f64>>) -> BTreeMap<K, Stat> {
    samples
        .into_iter()
        .filter_map(|(key, samples)| Some((key, Stat::from_samples(&samples)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(ends: &[(Phase, f64)]) -> RecoveryRun {
        RecoveryRun {
            at_us: ends.iter().copied().collect(),
            ..Default::default()
        }
    }

    #[test]
    fn phases_of_a_run_add_up_to_its_total_in_whatever_order_they_ended() {
        let reboot = run(&[
            (Phase::Returned, 9.0),
            (Phase::LinkUp, 4.0),
            (Phase::FirstRx, 7.0),
        ]);
        assert_eq!(
            reboot.durations_us(),
            vec![
                (Phase::LinkUp, 4.0),
                (Phase::FirstRx, 3.0),
                (Phase::Returned, 2.0)
            ]
        );
        let sum: f64 = reboot.durations_us().iter().map(|(_, d)| d).sum();
        assert_eq!(Some(sum), reboot.total_us());
    }

    #[test]
    fn a_phase_that_did_not_run_is_absent() {
        let recovery = Recovery::from_runs(
            "e1000",
            Method::Restart,
            vec![run(&[(Phase::LinkUp, 2.0)]), run(&[(Phase::LinkUp, 4.0)])],
        )
        .unwrap();
        let json = serde_json::to_value(&recovery).unwrap();
        assert_eq!(json["phases_us"]["link_up"]["n"], 2);
        assert!(json["phases_us"].get("first_rx").is_none());
        assert!(json.get("fault").is_none());
    }

    #[test]
    fn no_runs_give_no_numbers() {
        assert_eq!(
            Recovery::from_runs("e1000", Method::Restart, Vec::new()),
            None
        );
    }
}
