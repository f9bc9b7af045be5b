//! Moving a NIC from one running guest to another: the `switch` part of a report.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Stat;

/// One way of moving one kind of device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Switch {
    /// Which device: a model, or a function of the host with vendor and device.
    pub device: String,
    /// How it is moved.
    pub method: SwitchMethod,
    /// How often.
    pub n: u64,
    /// Memory of each guest, in MiB.
    pub mem_mib: u64,
    /// The parts of the switch, [`PHASES`], where the device host does it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub phases_us: BTreeMap<String, Stat>,
    /// From the last frame of the old guest to the first of the new one, as the other end of the
    /// cable sees it.
    pub outage_us: Stat,
    /// Frames of the old guest that came after the first of the new one: none may.
    pub late_frames: u64,
}

/// The parts of a switch, in the order in which they are done.
pub const PHASES: [&str; 7] = [
    "quiesce",
    "save",
    "unmap",
    "map",
    "load",
    "resume",
    "first_frame",
];

impl Switch {
    /// Its parts in their order.
    pub fn phases(&self) -> impl Iterator<Item = (&str, &Stat)> {
        let known = PHASES.into_iter();
        known.filter_map(|name| Some((name, self.phases_us.get(name)?)))
    }
}

/// How a NIC is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum SwitchMethod {
    /// A context of the device host gets the turn; the guests that have it not see their link down.
    Context,
    /// The same; the guests that have it not see their link up and wait.
    ContextStall,
    /// Taken out of the one guest and plugged into the other, where its driver probes it.
    Hotplug,
}

impl SwitchMethod {
    /// What it is, for people.
    pub fn words(self) -> &'static str {
        match self {
            Self::Context => "switch, parked link down",
            Self::ContextStall => "switch, parked link up",
            Self::Hotplug => "unplug and plug, driver probes",
        }
    }
}

/// How many times shorter the outage is than that of a hot-plug of the same run; `None` where there
/// is none.
pub fn than_hotplug(all: &[Switch], one: &Switch) -> Option<f64> {
    let hotplug = all
        .iter()
        .find(|other| other.method == SwitchMethod::Hotplug && other.mem_mib == one.mem_mib)?;
    Some(hotplug.outage_us.p50 / one.outage_us.p50)
}
