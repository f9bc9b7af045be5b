//! What isolation costs: traffic with functions of the driver in a domain, against the same traffic without.

use std::fmt::Write as _;

use isolation::status::EntryStatus;
use serde::{Deserialize, Serialize};

use super::Report;

/// Traffic with sets of functions isolated.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Isolation {
    /// Each set in the order measured; the first one is empty.
    pub sets: Vec<IsolatedSet>,
    /// Exits to the isolator during the traffic of empty sets that follow others: gates that were left
    /// behind.
    pub exits_when_off: u64,
}

/// Traffic with one set of functions isolated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IsolatedSet {
    /// The isolated functions; none for the baseline.
    pub entries: Vec<String>,
    /// Pings answered, a second.
    pub pings_per_s: f64,
    /// The same as a fraction of the baseline.
    pub pings_fraction: f64,
    /// MiB of a TCP stream to the gateway and back, a second, both directions together.
    pub tcp_mib_per_s: f64,
    /// The same as a fraction of the baseline.
    pub tcp_fraction: f64,
    /// What calls of the functions cost, on average.
    pub functions: Vec<FunctionCost>,
}

/// Calls of one isolated function, on average.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FunctionCost {
    /// Its name.
    pub name: String,
    /// Calls.
    pub calls: u64,
    /// Exits of the private VM; the gate's own comes on top.
    pub exits_per_call: f64,
    /// Kernel functions called without an exit.
    pub crossings_per_call: f64,
    /// System calls, `KVM_RUN` left out.
    pub ioctls_per_call: f64,
    /// Pages with a private copy.
    pub dirty_pages_per_call: f64,
    /// Bytes committed.
    pub committed_bytes_per_call: f64,
    /// Time from the gate until processors and devices were held.
    pub holding_us: f64,
    /// Time in the private VM: the driver, the kernel functions it called, the switches of roots and the exits.
    pub private_us: f64,
    /// Time of the host's own work: page copies, comparison, policy, commit.
    pub host_us: f64,
}

impl FunctionCost {
    /// From a function's counters; `None` if it was not called.
    pub fn new(entry: &EntryStatus) -> Option<Self> {
        (entry.calls > 0).then(|| {
            let calls = entry.calls as f64;
            let each = |count: u64| count as f64 / calls;
            let us = |ns: u64| ns as f64 / 1e3 / calls;
            Self {
                name: entry.name.clone(),
                calls: entry.calls,
                exits_per_call: each(entry.private_exits),
                crossings_per_call: each(entry.crossings),
                ioctls_per_call: each(entry.other_syscalls),
                dirty_pages_per_call: each(entry.dirty_pages),
                committed_bytes_per_call: each(entry.committed_bytes),
                holding_us: us(entry.holding_ns),
                private_us: us(entry.private_ns),
                host_us: us(entry.total_ns.saturating_sub(entry.private_ns)),
            }
        })
    }
}

impl IsolatedSet {
    /// What the set is called in tables.
    pub fn name(&self) -> String {
        match self.entries.as_slice() {
            [] => "none".into(),
            [one] => one.clone(),
            all => format!("{} functions", all.len()),
        }
    }
}

/// The part as HTML.
pub(super) fn section(body: &mut String, report: &Report) {
    let Some(isolation) = &report.isolation else {
        return;
    };
    body.push_str(
        "<h2>Traffic through an isolated driver</h2>\n<table>\n<tr><th>isolated</th><th>pings/s</th><th>of none</th><th></th>\
         <th>TCP MiB/s</th><th>of none</th><th></th></tr>\n",
    );
    let bar = |fraction: f64| {
        let percent = (fraction * 100.0).clamp(0.0, 100.0);
        format!("<div class=\"bar\" style=\"width:{percent:.0}px\"></div>")
    };
    for set in &isolation.sets {
        let _ = writeln!(
            body,
            "<tr><td>{}</td><td>{:.1}</td><td>{:.2}</td><td>{}</td><td>{:.3}</td><td>{:.2}</td><td>{}</td></tr>",
            super::html::escape(&set.name()),
            set.pings_per_s,
            set.pings_fraction,
            bar(set.pings_fraction),
            set.tcp_mib_per_s,
            set.tcp_fraction,
            bar(set.tcp_fraction),
        );
    }
    body.push_str("</table>\n<table>\n<tr>");
    for head in [
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
    ] {
        let _ = write!(body, "<th>{head}</th>");
    }
    body.push_str("</tr>\n");
    for set in &isolation.sets {
        for function in &set.functions {
            let _ = writeln!(
                body,
                "<tr><td>{} ({})</td><td>{}</td><td>{:.2}</td><td>{:.1}</td><td>{:.1}</td><td>{:.1}</td><td>{:.0}</td>\
                 <td>{:.1}</td><td>{:.1}</td><td>{:.1}</td></tr>",
                super::html::escape(&function.name),
                super::html::escape(&set.name()),
                function.calls,
                function.exits_per_call,
                function.crossings_per_call,
                function.ioctls_per_call,
                function.dirty_pages_per_call,
                function.committed_bytes_per_call,
                function.holding_us,
                function.private_us,
                function.host_us,
            );
        }
    }
    let _ = writeln!(
        body,
        "</table>\n<p class=\"note\">Averages of one call. Exits to the isolator after release: {}.</p>",
        isolation.exits_when_off
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_averages_of_the_calls_made() {
        let mut entry = EntryStatus::new("f");
        assert_eq!(FunctionCost::new(&entry), None);
        entry.calls = 4;
        entry.private_exits = 6;
        entry.total_ns = 40_000;
        entry.private_ns = 30_000;
        let cost = FunctionCost::new(&entry).unwrap();
        assert_eq!(cost.exits_per_call, 1.5);
        assert_eq!((cost.private_us, cost.host_us), (7.5, 2.5));
    }
}
