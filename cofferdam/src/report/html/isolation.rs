//! What isolation costs, as a part of the page.

use maud::{Markup, html};

use super::table::table;
use crate::report::isolation::Isolation;

/// The part.
pub fn section(isolation: &Isolation) -> Markup {
    let bar = |fraction: f64| {
        let percent = (fraction * 100.0).clamp(0.0, 100.0);
        html! { div.bar style=(format!("width:{percent:.0}px")) {} }
    };
    let functions = isolation.sets.iter().flat_map(|set| {
        set.functions.iter().map(|function| {
            vec![
                format!("{} ({})", function.name, set.name()),
                function.calls.to_string(),
                format!("{:.2}", function.exits_per_call),
                format!("{:.1}", function.crossings_per_call),
                format!("{:.1}", function.ioctls_per_call),
                format!("{:.1}", function.dirty_pages_per_call),
                format!("{:.0}", function.committed_bytes_per_call),
                format!("{:.1}", function.holding_us),
                format!("{:.1}", function.private_us),
                format!("{:.1}", function.host_us),
            ]
        })
    });
    let heads = [
        "function (in set)",
        "calls",
        "exits",
        "crossings",
        "system calls",
        "pages",
        "bytes",
        "hold, us",
        "private VM, us",
        "host, us",
    ];
    html! {
        h2 { "Traffic through an isolated driver" }
        table {
            tr {
                th { "isolated" } th { "pings/s" } th { "of none" } th {}
                th { "TCP MiB/s" } th { "of none" } th {}
            }
            @for set in &isolation.sets {
                tr {
                    td { (set.name()) }
                    td { (format!("{:.1}", set.pings_per_s)) }
                    td { (format!("{:.2}", set.pings_fraction)) }
                    td { (bar(set.pings_fraction)) }
                    td { (format!("{:.3}", set.tcp_mib_per_s)) }
                    td { (format!("{:.2}", set.tcp_fraction)) }
                    td { (bar(set.tcp_fraction)) }
                }
            }
        }
        (table(&heads, functions))
        p.note {
            "Averages of one call. Exits to the isolator after release: " (isolation.exits_when_off) "."
        }
    }
}
