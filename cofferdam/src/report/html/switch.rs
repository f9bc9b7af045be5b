//! A NIC that moves between running guests, as a part of the page.

use maud::{Markup, html};

use super::table::table;
use crate::report::switch::{PHASES, Switch, than_hotplug};

/// The part.
pub fn section(all: &[Switch]) -> Markup {
    let heads = [
        "",
        "device",
        "n",
        "outage, ms (median)",
        "p99",
        "largest",
        "times shorter than unplug and plug",
        "its wait for the link left out",
        "late frames",
    ];
    let ms = |us: f64| format!("{:.2}", us / 1e3);
    let times = |times: Option<f64>| times.map_or_else(String::new, |times| format!("{times:.0}"));
    let rows = all.iter().map(|row| {
        let shorter = than_hotplug(all, row);
        vec![
            row.way.to_string(),
            row.device.clone(),
            row.n.to_string(),
            ms(row.outage_us.p50),
            ms(row.outage_us.p99),
            ms(row.outage_us.max),
            times(shorter.map(|shorter| shorter.times)),
            times(shorter.and_then(|shorter| shorter.times_without_link)),
            row.late_frames.to_string(),
        ]
    });
    let phases = std::iter::once("its parts, us (median)").chain(PHASES);
    let parts = all.iter().filter(|row| !row.phases_us.is_empty());
    let parts = parts.map(|row| {
        let of = |name| {
            let stat = row.phases_us.get(name);
            stat.map_or_else(String::new, |stat| format!("{:.0}", stat.p50))
        };
        let name = row.way.to_string();
        std::iter::once(name).chain(PHASES.map(of)).collect()
    });
    html! {
        h2 { "Switch: one NIC, two running guests" }
        (table(&heads, rows))
        (table(&phases.collect::<Vec<_>>(), parts))
        p.note {
            "Both guests ping all the time. The outage is from the last frame of the one guest to the first of the other, as \
             the far end of the cable sees them. With unplug and plug the driver is removed and probes anew."
        }
    }
}
