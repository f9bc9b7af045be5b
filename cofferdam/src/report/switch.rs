//! Moving a NIC from one running guest to another: the `switch` part of a report.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Stat;

/// What came of one way of moving one kind of device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Switch {
    /// Which device: a model, or a function of the host with its driver.
    pub device: String,
    /// Which way.
    #[serde(flatten)]
    pub way: Way,
    /// How often.
    pub n: u64,
    /// The parts of the switch, [`PHASES`], where the device host does it, and [`LINK`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub phases_us: BTreeMap<String, Stat>,
    /// From the last frame of the old guest to the first of the new one, as the other end of the
    /// cable sees it.
    pub outage_us: Stat,
    /// Frames of the old guest that came after the first of the new one: none may.
    pub late_frames: u64,
}

/// How a NIC is moved between which guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// How it is moved.
    pub method: SwitchMethod,
    /// Memory of each guest, in MiB.
    pub mem_mib: u64,
    /// Whether that memory is of large pages.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub large_pages: bool,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.mem_mib)?;
        if self.large_pages {
            f.write_str(" of large pages")?;
        }
        write!(f, ", {}", self.method.words())
    }
}

/// The parts of a switch, in the order in which they are done. The device works during the first
/// and from *resume* on.
pub const PHASES: [&str; 9] = [
    "prepare",
    "quiesce",
    "save",
    "unmap",
    "map",
    "load",
    "resume",
    "complete",
    "first_frame",
];

/// The part of a hot-plug in which the driver waits for its link: from bringing its interface up to
/// the carrier.
pub const LINK: &str = "link";

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

/// How many times shorter an outage is than that of a hot-plug of the same run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shorter {
    /// Than all of it.
    pub times: f64,
    /// Than it without the wait for the link, where that was measured.
    pub times_without_link: Option<f64>,
}

/// How `one` compares with a hot-plug of the same device between guests alike; `None` where there
/// is none.
pub fn than_hotplug(all: &[Switch], one: &Switch) -> Option<Shorter> {
    let alike = Way {
        method: SwitchMethod::Hotplug,
        ..one.way
    };
    let is_alike = |other: &&Switch| other.device == one.device && other.way == alike;
    let hotplug = all.iter().find(is_alike)?;
    let of = |us: f64| us / one.outage_us.p50;
    let link = hotplug.phases_us.get(LINK);
    Some(Shorter {
        times: of(hotplug.outage_us.p50),
        times_without_link: link.map(|link| of(hotplug.outage_us.p50 - link.p50)),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    fn row(method: SwitchMethod, large_pages: bool, outage_us: f64) -> Switch {
        Switch {
            device: "card".to_owned(),
            way: Way {
                method,
                mem_mib: 256,
                large_pages,
            },
            n: 1,
            phases_us: BTreeMap::new(),
            outage_us: Stat::from_samples(&[outage_us]).unwrap(),
            late_frames: 0,
        }
    }

    #[test]
    fn outages_are_compared_with_a_hotplug_between_guests_alike() {
        let mut plug = row(SwitchMethod::Hotplug, true, 9000.0);
        let link = Stat::from_samples(&[4000.0]).unwrap();
        plug.phases_us.insert(LINK.to_owned(), link);
        let switch = row(SwitchMethod::Context, true, 100.0);
        let other = row(SwitchMethod::Context, false, 100.0);
        let all = [
            row(SwitchMethod::Hotplug, false, 500.0),
            plug,
            switch,
            other,
        ];
        let shorter = Shorter {
            times: 90.0,
            times_without_link: Some(50.0),
        };
        assert_eq!(than_hotplug(&all, &all[2]), Some(shorter));
        let shorter = Shorter {
            times: 5.0,
            times_without_link: None,
        };
        assert_eq!(than_hotplug(&all, &all[3]), Some(shorter));
        assert_eq!(than_hotplug(&all[2..], &all[2]), None);
    }

    #[test]
    fn a_row_is_read_back_and_ones_without_large_pages_do_not_name_them() {
        let all = [
            row(SwitchMethod::Hotplug, false, 1.0),
            row(SwitchMethod::ContextStall, true, 2.0),
        ];
        let text = serde_json::to_string(&all).unwrap();
        assert_eq!(text.matches("large_pages").count(), 1, "{text}");
        let read: Vec<Switch> = serde_json::from_str(&text).unwrap();
        assert_eq!(read, all);
    }
}
