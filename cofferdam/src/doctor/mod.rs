//! `cofferdam doctor`: what this host can do, found by trying, and what to do about what is
//! missing.
//!
//! Nothing here is decided by CPU flags or by names of kernel modules: a VM is created and timed
//! ([`speed`]), a TAP interface is made and dropped. Nothing on the host is changed, and nothing is
//! left behind.
//!
//! Exit status: 0 when Linux guests run on this host's KVM at full speed, 1 when they do not. The
//! text then says what to do; with an emulated second stage that is the lab (`cargo xtask lab`).

mod host;
mod kvm;
mod report;
mod speed;
mod walls;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;

pub use report::{Check, Report, State, Where};
pub use speed::{SecondStage, Speed};

/// Options of `cofferdam doctor`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Args {
    /// Print the findings as one JSON document
    #[arg(long)]
    pub json: bool,
}

/// Looks at the host and prints what was found.
///
/// The exit status is 0 when Linux guests run here at full speed and 1 when they do not.
///
/// # Errors
/// When standard output cannot be written. What is missing on the host is no error: it is reported.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let report = examine();
    let text = if args.json {
        serde_json::to_string_pretty(&report).context("cannot write the findings as JSON")?
    } else {
        report.table()
    };
    writeln!(std::io::stdout().lock(), "{}", text.trim_end())
        .context("cannot write to standard output")?;
    Ok(ExitCode::from(u8::from(report.linux_guests != Where::Host)))
}

/// Looks at the host: takes a few tens of milliseconds, a second where guest kernel mode is
/// emulated.
pub fn examine() -> Report {
    let kvm = kvm::examine();
    let mut checks = kvm.checks;
    checks.extend([host::hugepages(), host::tap(), host::vfio(), host::memory()]);
    checks.extend([
        walls::seccomp(),
        walls::landlock(),
        walls::jail(),
        walls::control_group(),
        walls::ordinary_user(),
    ]);
    let (lab, lab_ready) = host::lab();
    checks.push(lab);
    let linux_guests = match &kvm.speed {
        Some(speed) if speed.second_stage != SecondStage::Emulated => Where::Host,
        _ if lab_ready => Where::Lab,
        _ => Where::Nowhere,
    };
    Report {
        schema: report::SCHEMA,
        linux_guests,
        second_stage: kvm
            .speed
            .as_ref()
            .map(|speed| host::second_stage_name(speed.second_stage)),
        cpu: host::cpu_name(),
        cpus: std::thread::available_parallelism().map_or(1, |n| n.get()),
        kernel: host::kernel_release(),
        speed: kvm.speed,
        checks,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_on_this_host_agree_with_themselves() {
        let report = examine();
        let check = |name: &str| report.checks.iter().find(|c| c.name == name).expect(name);
        for name in [
            "/dev/kvm",
            "second stage",
            "memory",
            "TAP",
            "VFIO",
            "hugepages",
            "seccomp",
            "landlock",
            "control group",
            "without root",
            "lab",
        ] {
            let check = check(name);
            assert!(!check.found.is_empty(), "{name} says nothing");
            assert_eq!(
                check.state == State::Good,
                check.advice.is_none(),
                "{name}: advice goes with a fault"
            );
        }
        assert_eq!(
            report.speed.is_some(),
            check("second stage").state != State::Missing
        );
        if let Some(speed) = &report.speed {
            assert!(speed.ns_per_instruction > 0.0);
            assert!(speed.exit_ns > 0.0);
            assert_eq!(
                report.linux_guests == Where::Host,
                speed.second_stage != SecondStage::Emulated
            );
        } else {
            assert_ne!(report.linux_guests, Where::Host);
        }
    }

    #[test]
    fn json_and_table_tell_the_same_checks() {
        let report = examine();
        let json: serde_json::Value = serde_json::to_value(&report).unwrap();
        let table = report.table();
        for check in json["checks"].as_array().unwrap() {
            let name = check["name"].as_str().unwrap();
            assert!(table.contains(name), "{name} is missing in\n{table}");
        }
        assert_eq!(json["schema"], 1);
    }
}
