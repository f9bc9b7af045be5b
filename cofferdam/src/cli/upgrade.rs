//! `upgrade`: another build of a driver in the place of the one that runs.

use std::path::PathBuf;
use std::process::ExitCode;

use agent_protocol::message::Bytes;
use anyhow::bail;
use recovery::upgrade::{UpgradeOutcome, UpgradeReport};

use super::{Ending, print_bytes, print_json};
use crate::control::client::{ANSWER_TIME, ControlClient};
use crate::control::protocol::{Reply, Request};
use crate::module_file::read;
use crate::options::VmName;
use crate::runtime_dir::RuntimeRoot;
use crate::words::counted;

/// `upgrade`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The configuration of the driver's interfaces is put back, the port at the other end of the wire sees no link loss, and \
functions that are isolated are isolated again. If the new driver fails, the old one is put back and the command ends \
with status 1.

Examples:
  cofferdam upgrade web e1000 ./e1000.ko
  cofferdam upgrade web e1000 ./e1000.ko --limit 10 --json")]
pub struct UpgradeOptions {
    /// Name of the VM
    vm: VmName,
    /// Name of the module, as lsmod shows it in the guest
    module: String,
    /// The new module, built for the guest's kernel; not compressed
    file: PathBuf,
    /// How long the new driver may take until its interfaces are as they were, in seconds
    #[arg(
        long,
        value_name = "S",
        default_value_t = 30,
        value_parser = clap::value_parser!(u64).range(1..=60)
    )]
    limit: u64,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl UpgradeOptions {
    /// `upgrade`
    pub fn run(self) -> anyhow::Result<Ending> {
        let file = read(&self.file, &self.module)?;
        let request = Request::Upgrade {
            module: self.module,
            file: Bytes(file),
            limit_ms: self.limit * 1000,
        };
        let vm = RuntimeRoot::from_environment().find(Some(&self.vm))?;
        let mut control = ControlClient::to(&vm, ANSWER_TIME)?;
        let reply = control.ask_and_watch(&request, &mut |what| eprintln!("{what}"))?;
        let Reply::Upgraded(report) = reply else {
            bail!("the VM answered something else");
        };
        if self.json {
            print_json(&report)?;
        } else {
            print_bytes(text(&report).as_bytes())?;
        }
        let well = report.outcome == UpgradeOutcome::New && report.problems.is_empty();
        Ok(Ending::Status(ExitCode::from(u8::from(!well))))
    }
}

/// How it ended, for a person.
fn text(report: &UpgradeReport) -> String {
    let module = &report.module;
    let mut text: String = report
        .problems
        .iter()
        .map(|problem| format!("{problem}\n"))
        .collect();
    text.push_str(&match report.outcome {
        UpgradeOutcome::New => format!("{module} was upgraded"),
        UpgradeOutcome::Old => format!("the old {module} is back"),
        UpgradeOutcome::Neither => {
            format!("{module} does not work: `cofferdam reset` boots the guest anew")
        }
    });
    text.push_str(&format!(
        "; {} without a driver for {:.1} ms; {} isolated\n",
        match report.interfaces.as_slice() {
            [] => "no interface was".to_owned(),
            names => names.join(", "),
        },
        report.outage_us as f64 / 1000.0,
        counted(report.isolated as u64, "function", "functions")
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(outcome: UpgradeOutcome, problems: &[&str]) -> UpgradeReport {
        UpgradeReport {
            module: "e1000".to_owned(),
            outcome,
            old_build: "01".to_owned(),
            new_build: "02".to_owned(),
            interfaces: vec!["eth0".to_owned()],
            isolated: 2,
            outage_us: 1500,
            problems: problems
                .iter()
                .map(|problem| (*problem).to_owned())
                .collect(),
        }
    }

    #[test]
    fn a_person_is_told_which_driver_runs() {
        assert_eq!(
            text(&report(UpgradeOutcome::New, &[])),
            "e1000 was upgraded; eth0 without a driver for 1.5 ms; 2 functions isolated\n"
        );
        let failed = text(&report(UpgradeOutcome::Old, &["the new e1000 failed: x"]));
        assert!(failed.starts_with("the new e1000 failed: x\nthe old e1000 is back;"));
        assert!(text(&report(UpgradeOutcome::Neither, &[])).contains("cofferdam reset"));
    }
}
