//! Commands to VMs that run: `list`, `status`, `pause`, `resume`, `reset`, `stop`.

use std::time::{Duration, Instant};

use agent_protocol::Client;
use anyhow::{Context, ensure};

use super::listed::Listed;
use super::table::{number, table};
use super::{Ending, one_line, print_bytes, print_json};
use crate::control::client::{ANSWER_TIME, ControlClient};
use crate::control::protocol::{NetSummary, NicStatus, Request, Status, VmState};
use crate::options::VmName;
use crate::process::Process;
use crate::runtime_dir::{RunningVm, RuntimeRoot};

/// How long a VM may take to be listed.
const LIST_TIME: Duration = Duration::from_secs(5);

/// How long a VM has to end by itself when it is to end at once.
const FORCE_TIME: Duration = Duration::from_secs(5);

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
        let running = RuntimeRoot::from_environment().running()?;
        // All at once: one that does not answer must not hold up the others. One that is just coming or going does not
        // answer, and is listed all the same.
        let ask = |vm: &RunningVm| {
            let status = ControlClient::to(vm, LIST_TIME).and_then(|mut client| client.status());
            Listed::new(vm, status)
        };
        let listed: Vec<Listed<Status>> = std::thread::scope(|scope| {
            let asked: Vec<_> = running.iter().map(|vm| scope.spawn(|| ask(vm))).collect();
            asked
                .into_iter()
                .filter_map(|listed| listed.join().ok())
                .collect()
        });
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

/// A time as a person says it.
pub(crate) fn duration(ms: u64) -> String {
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
        let vm = self.vm.find()?;
        if self.force {
            return force(&vm);
        }
        let mut control = ControlClient::to(&vm, ANSWER_TIME)?;
        // A process that is stopped would have the agent waited for in vain.
        control.status()?;
        let mut agent = Client::unix(vm.paths.agent_socket());
        let asked = agent.hello(STOP_AGENT_TIME).and_then(|_| agent.power_off());
        if let Err(error) = asked {
            tracing::info!("no agent ({error}): pressing the power button");
            control.tell(&Request::PowerButton {})?;
        }
        ensure!(
            ended(&vm, Duration::from_secs(self.timeout))?,
            "{0} still runs after {1} s: end it with `cofferdam stop --force {0}`",
            vm.name,
            self.timeout
        );
        Ok(Ending::SUCCESS)
    }
}

/// Ends a VM at once: by its own hand if it answers, otherwise by `SIGKILL`.
fn force(vm: &RunningVm) -> anyhow::Result<Ending> {
    // Held from before it is asked, so that nobody else with its number is killed.
    let process = vm.pid.map(Process::open).transpose();
    let asked =
        ControlClient::to(vm, FORCE_TIME).and_then(|mut client| client.tell(&Request::Quit {}));
    let why = match asked {
        Ok(()) if ended(vm, FORCE_TIME)? => return Ok(Ending::SUCCESS),
        Ok(()) => format!("{} does not end", vm.name),
        Err(error) => one_line(&error),
    };
    if !still_runs(vm)? {
        return Ok(Ending::SUCCESS);
    }
    let process = process?.with_context(|| format!("{why}, and its process is not known"))?;
    process
        .kill()
        .with_context(|| format!("{why}, and its process cannot be killed"))?;
    ensure!(
        ended(vm, ANSWER_TIME)?,
        "{why}, and its process was killed but is still there"
    );
    eprintln!("{why}: it was killed");
    // Its folder, which it could not remove any more.
    RuntimeRoot::from_environment().clear()?;
    Ok(Ending::SUCCESS)
}

/// Waits for the end of a VM; whether it came in time.
fn ended(vm: &RunningVm, limit: Duration) -> anyhow::Result<bool> {
    let deadline = Instant::now() + limit;
    while still_runs(vm)? {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(END_POLL);
    }
    Ok(true)
}

/// Whether the same process still has the VM's name.
fn still_runs(vm: &RunningVm) -> anyhow::Result<bool> {
    let running = RuntimeRoot::from_environment().running()?;
    Ok(running
        .iter()
        .any(|other| other.name == vm.name && other.pid == vm.pid))
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
