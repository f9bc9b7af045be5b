//! What isolation costs: traffic with functions of the driver in a domain, against the same traffic
//! without.

use isolation::status::EntryStatus;
use serde::{Deserialize, Serialize};

/// Traffic with sets of functions isolated.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Isolation {
    /// Each set in the order measured; the first one is empty.
    pub sets: Vec<IsolatedSet>,
    /// Exits to the isolator during the traffic of empty sets that follow others: gates that were
    /// left behind.
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
    /// Kernel functions that the guest called when the call had ended.
    #[serde(default)]
    pub handed_over_per_call: f64,
    /// System calls, `KVM_RUN` left out.
    pub ioctls_per_call: f64,
    /// Pages with a private copy.
    pub dirty_pages_per_call: f64,
    /// Bytes committed.
    pub committed_bytes_per_call: f64,
    /// Time from the gate until processors and devices were held.
    pub holding_us: f64,
    /// Time in the private VM: the driver, the kernel functions it called, the switches of roots
    /// and the exits.
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
                handed_over_per_call: each(entry.handed_over),
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
