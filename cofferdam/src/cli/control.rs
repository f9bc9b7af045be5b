//! Commands to VMs that run: `list`, `status`, `pause`, `resume`, `reset`, `stop`, `exec`.

use std::io::Write;
use std::time::{Duration, Instant};

use agent_protocol::Client;
use agent_protocol::message::{Bytes, Exec, ExecEnd};
use anyhow::{Context, bail};
use serde::Serialize;

use super::table::{number, table};
use super::{Ending, print_bytes, print_json};
use crate::control::client::ControlClient;
use crate::control::protocol::{NetSummary, NicStatus, Request, Status};
use crate::options::VmName;
use crate::runtime_dir::{RunningVm, RuntimeRoot};

/// How long to wait for a guest's agent when its VM runs.
const AGENT_TIME: Duration = Duration::from_secs(20);

/// How long to wait for it before the power button is pressed instead.
const STOP_AGENT_TIME: Duration = Duration::from_secs(3);

/// How often to look whether a VM has ended.
const END_POLL: Duration = Duration::from_millis(20);

/// Which VM.
#[derive(Debug, clap::Args)]
pub struct VmOptions {
    /// Name of the VM; may be left out while only one runs
    #[arg(value_name = "VM")]
    vm: Option<VmName>,
}

impl VmOptions {
    fn find(&self) -> anyhow::Result<RunningVm> {
        RuntimeRoot::from_environment().find(self.vm.as_ref())
    }

    fn connect(&self) -> anyhow::Result<(RunningVm, ControlClient)> {
        let vm = self.find()?;
        let client = ControlClient::connect(&vm.paths.control_socket())?;
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

/// One line of `list`.
#[derive(Debug, Serialize)]
struct Listed {
    name: String,
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
}

impl ListOptions {
    /// `list`
    pub fn run(&self) -> anyhow::Result<Ending> {
        let listed: Vec<Listed> = RuntimeRoot::from_environment()
            .running()?
            .into_iter()
            .map(|vm| Listed {
                name: vm.name.to_string(),
                pid: vm.pid,
                // A VM that is just coming or going does not answer, and is listed all the same.
                status: ControlClient::connect(&vm.paths.control_socket())
                    .and_then(|mut client| client.status())
                    .ok(),
            })
            .collect();
        if self.json {
            print_json(&listed)?;
            return Ok(Ending::SUCCESS);
        }
        let mut rows = table(&["VM", "process", "state", "up", "vCPUs", "memory", "NIC"]);
        for vm in listed {
            let pid = vm.pid.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
            let Some(status) = vm.status else {
                rows.add_row(vec![vm.name.into(), number(pid), "no answer".into()]);
                continue;
            };
            rows.add_row(vec![
                vm.name.into(),
                number(pid),
                status.state.name().into(),
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

/// A VM's status as tables.
fn status_text(status: &Status) -> String {
    let mut facts = table(&["VM", &status.name]);
    let config = &status.config;
    facts.add_row(vec!["state", status.state.name()]);
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

/// A time as a person says it.
fn duration(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..60 => format!("{}.{} s", s, ms % 1000 / 100),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        _ => format!("{} h {} min", s / 3600, s / 60 % 60),
    }
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
        let (vm, mut control) = self.vm.connect()?;
        if self.force {
            control.tell(&Request::Quit {})?;
        } else {
            let mut agent = Client::unix(vm.paths.agent_socket());
            let asked = agent.hello(STOP_AGENT_TIME).and_then(|_| agent.power_off());
            if let Err(error) = asked {
                tracing::info!("no agent ({error}): pressing the power button");
                control.tell(&Request::PowerButton {})?;
            }
        }
        let deadline = Instant::now() + Duration::from_secs(self.timeout);
        while still_runs(&vm)? {
            if Instant::now() >= deadline {
                bail!(
                    "{0} still runs after {1} s: end it with `cofferdam stop --force {0}`",
                    vm.name,
                    self.timeout
                );
            }
            std::thread::sleep(END_POLL);
        }
        Ok(Ending::SUCCESS)
    }
}

/// Whether the same process still has the VM's name.
fn still_runs(vm: &RunningVm) -> anyhow::Result<bool> {
    let running = RuntimeRoot::from_environment().running()?;
    Ok(running
        .iter()
        .any(|other| other.name == vm.name && other.pid == vm.pid))
}

/// `exec`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The command's output and exit status become this command's own.

Examples:
  cofferdam exec -- ip addr
  cofferdam exec web -- sh -c 'dmesg | tail'
  cofferdam exec web --stdin -- sh -c 'cat > /tmp/file' < file")]
pub struct ExecOptions {
    #[command(flatten)]
    vm: VmOptions,
    /// Command and its arguments, after --
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
    /// Give the command what is on standard input, up to 32 KiB
    #[arg(long)]
    stdin: bool,
    /// Kill the command after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,
}

/// Longest standard input that is passed on, in bytes.
const MAX_STDIN_BYTES: u64 = 32 << 10;

impl ExecOptions {
    /// `exec`
    pub fn run(&self) -> anyhow::Result<Ending> {
        let vm = self.vm.find()?;
        let mut agent = Client::unix(vm.paths.agent_socket());
        agent.hello(AGENT_TIME).with_context(|| {
            format!(
                "the agent of {} does not answer: does its initramfs have one?",
                vm.name
            )
        })?;
        let exec = Exec {
            argv: self.command.clone(),
            stdin: Bytes(if self.stdin {
                read_stdin()?
            } else {
                Vec::new()
            }),
            limit_ms: Some(self.timeout.saturating_mul(1000)),
            ..Exec::default()
        };
        let (end, _) = agent.exec_streaming(exec, &mut |is_stderr, bytes| {
            let written = if is_stderr {
                std::io::stderr().write_all(&bytes)
            } else {
                let mut out = std::io::stdout();
                out.write_all(&bytes).and_then(|()| out.flush())
            };
            written.map_err(agent_protocol::ClientError::Channel)
        })?;
        match end {
            ExecEnd::Exited(status) => Ok(exit_status(status)),
            // As a shell says it.
            ExecEnd::Signaled(signal) => Ok(exit_status(signal.saturating_add(128))),
            ExecEnd::TimeLimit => bail!("the command was killed after {} s", self.timeout),
        }
    }
}

/// The guest's exit status as ours.
fn exit_status(status: i32) -> Ending {
    Ending::Status(u8::try_from(status).unwrap_or(u8::MAX).into())
}

/// All of standard input.
fn read_stdin() -> anyhow::Result<Vec<u8>> {
    use std::io::Read;
    let mut input = Vec::new();
    std::io::stdin()
        .take(MAX_STDIN_BYTES + 1)
        .read_to_end(&mut input)
        .context("cannot read standard input")?;
    if input.len() as u64 > MAX_STDIN_BYTES {
        bail!("standard input has more than {MAX_STDIN_BYTES} bytes: pass it another way");
    }
    Ok(input)
}

#[cfg(test)]
mod tests {
    use super::duration;

    #[test]
    fn times_are_said_as_people_say_them() {
        assert_eq!(duration(1_250), "1.2 s");
        assert_eq!(duration(125_000), "2 min 5 s");
        assert_eq!(duration(7_500_000), "2 h 5 min");
    }
}
