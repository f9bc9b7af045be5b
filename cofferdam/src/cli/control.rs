//! Commands to VMs that run: `list`, `status`, `pause`, `resume`, `reset`, `wake`, `stop`.

use std::time::Duration;

use anyhow::ensure;

use super::{Ending, print_bytes, print_json};
use crate::control::client::{ANSWER_TIME, ControlClient};
use crate::control::ending::{self, Forced};
use crate::control::listed;
use crate::control::protocol::{NetSummary, NicStatus, Request, Status, VmState};
use crate::options::VmName;
use crate::runtime_dir::{RunningVm, RuntimeRoot};
use crate::table::{number, table};
use crate::words::duration;

/// How long a VM may take to be listed.
const LIST_TIME: Duration = Duration::from_secs(5);

/// Which VM.
#[derive(Debug, clap::Args)]
pub struct VmOptions {
    /// Name of the VM; may be left out while only one runs
    #[arg(value_name = "VM")]
    vm: Option<VmName>,
}

impl VmOptions {
    pub(super) fn find(&self) -> anyhow::Result<RunningVm> {
        RuntimeRoot::from_environment().find(self.vm.as_ref())
    }

    fn connect(&self) -> anyhow::Result<(RunningVm, ControlClient)> {
        let vm = self.find()?;
        let client = ControlClient::to(&vm, ANSWER_TIME)?;
        Ok((vm, client))
    }

    /// `pause`
    pub fn pause(&self) -> anyhow::Result<Ending> {
        self.tell(&Request::Pause {})
    }

    /// `resume`
    pub fn resume(&self) -> anyhow::Result<Ending> {
        self.tell(&Request::Resume {})
    }

    /// `reset`
    pub fn reset(&self) -> anyhow::Result<Ending> {
        self.tell(&Request::Reset {})
    }

    /// `wake`
    pub fn wake(&self) -> anyhow::Result<Ending> {
        self.tell(&Request::Wake {})
    }

    fn tell(&self, request: &Request) -> anyhow::Result<Ending> {
        self.connect()?.1.tell(request)?;
        Ok(Ending::SUCCESS)
    }
}

/// `list`
#[derive(Debug, clap::Args)]
pub struct ListOptions {
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl ListOptions {
    /// `list`
    pub fn run(&self) -> anyhow::Result<Ending> {
        let listed = listed::vms(&RuntimeRoot::from_environment(), LIST_TIME)?;
        if self.json {
            print_json(&listed)?;
            return Ok(Ending::SUCCESS);
        }
        let mut rows = table(&["VM", "process", "state", "up", "vCPUs", "memory", "NIC"]);
        for vm in listed {
            let pid = vm.pid_text();
            let Some(status) = vm.status else {
                rows.add_row(vec![vm.name.into(), number(pid), "does not answer".into()]);
                continue;
            };
            rows.add_row(vec![
                vm.name.into(),
                number(pid),
                state(&status).into(),
                number(duration(status.uptime_ms)),
                number(status.config.vcpus),
                number(format!("{} MiB", status.config.memory_mib)),
                status
                    .nics
                    .iter()
                    .map(|nic| nic.net.nic.as_str())
                    .collect::<Vec<_>>()
                    .join(", ")
                    .into(),
            ]);
        }
        print_bytes(format!("{rows}\n").as_bytes())?;
        Ok(Ending::SUCCESS)
    }
}

/// `status`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cofferdam status
  cofferdam status web --json | jq .exits")]
pub struct StatusOptions {
    #[command(flatten)]
    vm: VmOptions,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl StatusOptions {
    /// `status`
    pub fn run(&self) -> anyhow::Result<Ending> {
        let status = self.vm.connect()?.1.status()?;
        if self.json {
            print_json(&status)?;
        } else {
            print_bytes(status_text(&status).as_bytes())?;
        }
        Ok(Ending::SUCCESS)
    }
}

/// What a VM does, in a word.
fn state(status: &Status) -> &'static str {
    match (status.state, &status.guest_panic) {
        (VmState::Running, Some(_)) => "panicked",
        (state, _) => state.name(),
    }
}

/// A VM's status as tables.
fn status_text(status: &Status) -> String {
    let mut facts = table(&["VM", &status.name]);
    let config = &status.config;
    facts.add_row(vec!["state", state(status)]);
    if let Some(line) = &status.guest_panic {
        facts.add_row(vec!["guest", &format!("has panicked: {line}")]);
    }
    facts.add_row(vec!["process", &status.pid.to_string()]);
    facts.add_row(vec!["up", &duration(status.uptime_ms)]);
    facts.add_row(vec!["kernel", &config.kernel]);
    facts.add_row(vec!["vCPUs", &config.vcpus.to_string()]);
    facts.add_row(vec!["memory", &format!("{} MiB", config.memory_mib)]);
    facts.add_row(vec![
        "  of it resident",
        &format!("{} KiB", status.guest_rss_kib),
    ]);
    facts.add_row(vec![
        "resident beyond it",
        &format!("{} KiB", status.vmm_rss_kib),
    ]);
    facts.add_row(vec!["resets", &status.resets.to_string()]);
    facts.add_row(vec!["serial", &config.serial]);
    for disk in &config.disks {
        facts.add_row(vec!["disk", disk]);
    }
    for NicStatus { address, net, .. } in &status.nics {
        let NetSummary { nic, mac, wire } = net;
        let mac = mac.as_deref().unwrap_or("with its own address");
        facts.add_row(vec!["NIC", &format!("{nic} {mac} on {wire}, {address}")]);
    }
    let mut text = format!("{facts}\n");
    let mut all = vec![("exits by reason".to_owned(), &status.exits)];
    let several = status.nics.len() > 1;
    all.extend(status.nics.iter().map(|nic| match several {
        true => (format!("NIC {}", nic.address), &nic.counters),
        false => ("NIC".to_owned(), &nic.counters),
    }));
    for (head, counters) in all {
        if counters.is_empty() {
            continue;
        }
        let mut rows = table(&[&head, "count"]);
        for (name, count) in counters {
            rows.add_row(vec![name.into(), number(count)]);
        }
        text.push_str(&format!("\n{rows}\n"));
    }
    for module in &status.isolation {
        text.push_str(&format!("\n{}", super::isolation::status_text(module)));
        if let Some(recovery) = status.recovery.get(&module.module) {
            text.push_str(&super::isolation::recovery_text(&module.module, recovery));
        }
    }
    text
}

/// `stop`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cofferdam stop web
  cofferdam stop web --force")]
pub struct StopOptions {
    #[command(flatten)]
    vm: VmOptions,
    /// End it at once, as if the power cord was pulled
    #[arg(long)]
    force: bool,
    /// How long to wait for the end, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

impl StopOptions {
    /// `stop`
    pub fn run(&self) -> anyhow::Result<Ending> {
        let root = RuntimeRoot::from_environment();
        let vm = self.vm.find()?;
        if self.force {
            if let Forced::Killed(why) = ending::force(&root, &vm)? {
                eprintln!("{why}: it was killed");
            }
            return Ok(Ending::SUCCESS);
        }
        ending::ask(&vm)?;
        ensure!(
            ending::ended(&root, &vm, Duration::from_secs(self.timeout))?,
            "{0} still runs after {1} s: end it with `cofferdam stop --force {0}`",
            vm.name,
            self.timeout
        );
        Ok(Ending::SUCCESS)
    }
}
