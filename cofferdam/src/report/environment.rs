//! Where a measurement ran: host, processor, second-stage paging, commit.
//!
//! Everything here is for the reader of a report. Nothing is decided by it.

use std::fs;

use super::{Host, Report, SCHEMA};

/// An empty report about this host.
pub fn report_here() -> Report {
    Report {
        schema: SCHEMA,
        commit: commit(),
        host: host(),
        guest: None,
        boot: None,
        boot_others: Vec::new(),
        recovery: Vec::new(),
        recovery_ratios: Vec::new(),
        drivers: Vec::new(),
        traffic: Vec::new(),
        suspend: Vec::new(),
        suspend_followed: Vec::new(),
        clones: Vec::new(),
        switch: Vec::new(),
        campaigns: Vec::new(),
        isolation: None,
        other: Default::default(),
    }
}

/// The commit this binary was built from.
fn commit() -> String {
    option_env!("COFFERDAM_COMMIT")
        .unwrap_or("unknown")
        .to_owned()
}

/// This host.
fn host() -> Host {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    Host {
        place: std::env::var("COFFERDAM_WHERE").unwrap_or_else(|_| "host".to_owned()),
        second_stage: second_stage().to_owned(),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
            .map_or_else(|_| "unknown".to_owned(), |s| s.trim().to_owned()),
        cpu: cpu_model(&cpuinfo).to_owned(),
    }
}

/// The processor's name in `/proc/cpuinfo`.
fn cpu_model(cpuinfo: &str) -> &str {
    cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .and_then(|rest| rest.trim_start().strip_prefix(':'))
        .map_or("unknown", str::trim)
}

/// What KVM's module says it uses; `shadow` where neither is on or nobody says.
fn second_stage() -> &'static str {
    let on =
        |path: &str| fs::read_to_string(path).is_ok_and(|value| matches!(value.trim(), "Y" | "1"));
    if on("/sys/module/kvm_intel/parameters/ept") {
        "ept"
    } else if on("/sys/module/kvm_amd/parameters/npt") {
        "npt"
    } else {
        "shadow"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_name_is_found_or_unknown() {
        assert_eq!(
            cpu_model("vendor_id\t: x\nmodel name\t: AMD EPYC-Milan\n"),
            "AMD EPYC-Milan"
        );
        assert_eq!(cpu_model(""), "unknown");
    }
}
