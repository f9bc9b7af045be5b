//! Snapshots, restores and rewinds, as a part of the page.

use maud::{Markup, html};

use super::table::table;
use crate::report::suspend::{Clones, Followed, Suspend, of_boot};

/// The part.
pub fn section(all: &[Suspend], followed: &[Followed], clones: &[Clones]) -> Markup {
    let heads = [
        "",
        "memory, MiB",
        "n",
        "pages",
        "ms (median)",
        "p99",
        "largest",
        "of the boot",
        "guest at rest, ms",
    ];
    let ms = |us: f64| format!("{:.2}", us / 1e3);
    let rows = all.iter().map(|row| {
        vec![
            row.method.words().to_owned(),
            row.mem_mib.to_string(),
            row.us.n.to_string(),
            row.dirty_pages
                .map_or_else(String::new, |pages| pages.to_string()),
            ms(row.us.p50),
            ms(row.us.p99),
            ms(row.us.max),
            of_boot(all, row).map_or_else(String::new, |part| format!("{part:.5}")),
            row.rest_us.map_or_else(String::new, |rest| ms(rest.p50)),
        ]
    });
    html! {
        h2 { "Suspend: putting a guest away and having it back" }
        (table(&heads, rows))
        p.note {
            "Of one guest in one run. A rewind's time is that of finding what changed and of putting back memory, processors, \
             devices and what is isolated; its rest has the time to bring the guest to rest as well."
        }
        @for one in followed {
            p {
                "With a mark set, " (one.mem_mib) " MiB: pings " (format!("{:.2}", one.pings_fraction))
                ", TCP " (format!("{:.2}", one.tcp_fraction)) " of those without."
            }
        }
        @for one in clones {
            p { (one.sentence()) }
        }
    }
}
