//! What many modules together come to: how many could be isolated, how many suspend and resume, and
//! what stands in the way.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Report;
use super::entries::Isolation;
use super::findings::FindingKind;

/// Kinds of drivers, by folders of the kernel's source that modules are installed by
/// (`lib/modules/RELEASE/kernel/...`).
pub const FAMILIES: &[(&str, &[&str])] = &[
    ("network", &["drivers/net/"]),
    (
        "block",
        &[
            "drivers/block/",
            "drivers/nvme/",
            "drivers/ata/",
            "drivers/scsi/",
        ],
    ),
    ("sound", &["sound/"]),
    ("usb", &["drivers/usb/"]),
    ("input", &["drivers/input/"]),
];

/// The 82540EM, the device whose state is put back (`devices::e1000`), as an alias of a driver's.
const RESTORABLE: &str = "pci:v00008086d0000100E";

/// The kind of a module by its path behind `kernel/`.
pub fn family_of(path: &str) -> Option<&'static str> {
    let of =
        |(_, folders): &&(&str, &[&str])| folders.iter().any(|folder| path.starts_with(folder));
    FAMILIES.iter().find(of).map(|(name, _)| *name)
}

/// What keeps a module from being isolated, or its failed calls from being taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Obstacle {
    /// The kernel enters it only to load and to remove it, as far as can be seen.
    NoEntry,
    /// No function that the kernel enters can be gated and answered for.
    NoGate,
    /// It drives a device whose state cannot be put back.
    Device,
    /// Calls that go on in the guest may have done what has no opposite, or what the model does not
    /// know.
    KernelFunctions,
}

/// What of a module's entries could be isolated.
pub fn obstacles(report: &Report) -> Vec<Obstacle> {
    let again = || report.entries.iter().filter(|entry| !entry.runs_once());
    let gated = again().filter(|entry| !matches!(entry.isolation, Isolation::Refused { .. }));
    let lacking = again().any(|entry| matches!(entry.isolation, Isolation::Irrevocable { .. }));
    let drives = report.registers || !report.drivers.is_empty();
    let restorable = report
        .aliases
        .iter()
        .any(|alias| alias.starts_with(RESTORABLE));
    let mut found = Vec::new();
    if again().next().is_none() {
        found.push(Obstacle::NoEntry);
    } else if gated.count() == 0 {
        found.push(Obstacle::NoGate);
    }
    if drives && !restorable {
        found.push(Obstacle::Device);
    }
    if lacking {
        found.push(Obstacle::KernelFunctions);
    }
    found
}

/// Sums over the modules of a kind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Family {
    /// Modules read.
    pub modules: usize,
    /// Modules that register a driver of devices.
    pub drivers: usize,
    /// Of those, how many have a suspend and a resume function in each driver.
    pub suspend_and_resume: usize,
    /// Modules in which nothing stands in the way of isolating at least one entry: a gate fits, a
    /// failed call has an answer, and it has no device or one that is put back.
    pub isolated_today: usize,
    /// Modules where only the device's state stands in the way: gates fit and failed calls have
    /// answers.
    pub but_for_device: usize,
    /// Modules with each obstacle.
    pub obstacles: BTreeMap<Obstacle, usize>,
    /// Entries that run again and again.
    pub entries: usize,
    /// Of those, how many can be gated and answered for.
    pub gated: usize,
    /// Of those, how many are taken back as a whole.
    pub whole: usize,
    /// And by opposites.
    pub compensated: usize,
    /// Findings of each kind.
    pub findings: BTreeMap<FindingKind, usize>,
}

impl Family {
    /// Adds a module.
    pub fn add(&mut self, report: &Report) {
        self.modules += 1;
        self.drivers += usize::from(!report.drivers.is_empty());
        self.suspend_and_resume += usize::from(report.suspends_and_resumes() == Some(true));
        let obstacles = obstacles(report);
        let has = |obstacle| obstacles.contains(&obstacle);
        let enters = !has(Obstacle::NoEntry) && !has(Obstacle::NoGate);
        self.isolated_today += usize::from(enters && !has(Obstacle::Device));
        self.but_for_device += usize::from(enters && has(Obstacle::Device));
        for obstacle in obstacles {
            *self.obstacles.entry(obstacle).or_default() += 1;
        }
        for entry in report.entries.iter().filter(|entry| !entry.runs_once()) {
            self.entries += 1;
            self.gated += usize::from(!matches!(entry.isolation, Isolation::Refused { .. }));
            self.whole += usize::from(entry.isolation == Isolation::Whole);
            self.compensated += usize::from(entry.isolation == Isolation::Compensated);
        }
        for finding in &report.findings {
            *self.findings.entry(finding.kind).or_default() += 1;
        }
    }

    /// Adds what another one counted.
    pub fn merge(&mut self, other: &Self) {
        self.modules += other.modules;
        self.drivers += other.drivers;
        self.suspend_and_resume += other.suspend_and_resume;
        self.isolated_today += other.isolated_today;
        self.but_for_device += other.but_for_device;
        self.entries += other.entries;
        self.gated += other.gated;
        self.whole += other.whole;
        self.compensated += other.compensated;
        for (obstacle, count) in &other.obstacles {
            *self.obstacles.entry(*obstacle).or_default() += count;
        }
        for (kind, count) in &other.findings {
            *self.findings.entry(*kind).or_default() += count;
        }
    }
}
