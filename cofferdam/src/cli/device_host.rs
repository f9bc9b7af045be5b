//! `device serve`, `list`, `status`, `stop`: NICs that guests share by turns.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure};

use super::{Ending, print_bytes, print_json};
use crate::control::client::{ANSWER_TIME, Connection};
use crate::control::listed::{self, host_status};
use crate::device::client;
use crate::device::protocol::{ContextStatus, DeviceProtocol, HostStatus, Reply, Request};
use crate::device::{CardConfig, HostConfig, OnExit, ParkedAs, StateBy, serve};
use crate::options::{NetSpec, NicModel, PciAddress, VmName};
use crate::process::Process;
use crate::runtime_dir::{RunningVm, RuntimeRoot};
use crate::sandbox::MachineSandbox;
use crate::table::{number, table};
use crate::words::{counted, switched};

/// How long a device host may take to be listed.
const LIST_TIME: Duration = Duration::from_secs(5);
/// How long it may take to end.
const END_TIME: Duration = Duration::from_secs(10);
/// Between two looks whether it has.
const END_POLL: Duration = Duration::from_millis(10);
/// Most contexts of a device host: each has a thread and some descriptors.
const MAX_SLOTS: u16 = 64;

/// `device serve`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The NIC stays here, whatever becomes of guests: each has a context of its own, and one of them has the turn at the wire.

Examples:
  cofferdam device serve nic0 --model e1000 --net tap=tap0
  cofferdam device serve nic0 --vfio 0000:00:02.0
  cofferdam run --name left  --kernel vmlinux --initrd initrd.cpio --nic device=nic0 --serial file=left.log &
  cofferdam run --name right --kernel vmlinux --initrd initrd.cpio --nic device=nic0 --serial file=right.log &
  cofferdam switch nic0 --to right")]
pub struct ServeOptions {
    /// Name of the device host
    name: VmName,
    /// Which NIC: e1000 or virtio
    #[arg(long, value_name = "MODEL", default_value_t = NicModel::default(), conflicts_with = "vfio")]
    model: NicModel,
    /// What it is plugged into: user (built-in gateway, needs no rights), tap=NAME or
    /// unix=PATH[,listen]
    #[arg(
        long,
        value_name = "WIRE",
        required_unless_present = "vfio",
        conflicts_with = "vfio"
    )]
    net: Option<NetSpec>,
    /// In place of a model: a PCI function of this host, which vfio-pci has, such as 0000:00:02.0
    #[arg(long, value_name = "ADDRESS")]
    vfio: Option<PciAddress>,
    /// How a function's state is taken from one guest and given to another: by its registers, which
    /// a description has to name, or by the suspend and resume functions of the guests' own
    /// drivers. By registers where there is a description, if not said
    #[arg(long, value_enum, requires = "vfio", value_name = "WAY")]
    state: Option<StateBy>,
    /// What guests without the turn see: a link that is down, or one that stays up for up to a
    /// second (a function's: three seconds) in which frames wait. Drivers that suspend the function
    /// say themselves
    #[arg(long, value_enum, default_value = "down")]
    parked: ParkedAs,
    /// What becomes of the turn of a VM that goes: the next VM gets it, or it is kept until the VM
    /// comes back
    #[arg(long, value_enum, default_value = "next")]
    on_exit: OnExit,
    /// How many VMs can have a context
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_SLOTS)))]
    slots: u16,
    #[command(flatten)]
    sandbox: MachineSandbox,
}

impl ServeOptions {
    /// `device serve`
    pub fn run(self) -> anyhow::Result<Ending> {
        let (card, wire) = match (self.vfio, self.net) {
            (Some(address), _) => {
                let state = self.state;
                let card = CardConfig::Function { address, state };
                (card, "its own wire".to_owned())
            }
            (None, Some(net)) => {
                let wire = net.to_string();
                let model = self.model;
                (CardConfig::Model { model, net }, wire)
            }
            (None, None) => bail!("give --net, or --vfio"),
        };
        let config = HostConfig {
            name: self.name,
            wire,
            parked: self.parked,
            on_exit: self.on_exit,
            slots: self.slots.into(),
        };
        serve(config, card, &self.sandbox)
    }
}

/// Asks the device host of this name for something.
pub(super) fn ask(name: &VmName, request: &Request) -> anyhow::Result<Reply> {
    client::ask(&RuntimeRoot::from_environment(), name, request)
}

fn find(name: &VmName) -> anyhow::Result<RunningVm> {
    RuntimeRoot::from_environment().devices().find(Some(name))
}

fn ask_at(host: &RunningVm, request: &Request, limit: Duration) -> anyhow::Result<Reply> {
    Connection::<DeviceProtocol>::to(host, limit)?.ask(request)
}

/// `device list`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cofferdam device list
  cofferdam device list --json | jq '.[].status.turn'")]
pub struct ListOptions {
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl ListOptions {
    /// `device list`
    pub fn run(self) -> anyhow::Result<Ending> {
        let listed = listed::devices(&RuntimeRoot::from_environment(), LIST_TIME)?;
        if self.json {
            print_json(&listed)?;
            return Ok(Ending::SUCCESS);
        }
        let mut rows = table(&["device", "process", "NIC", "wire", "turn", "attached"]);
        for host in listed {
            let pid = host.pid_text();
            let Some(status) = host.status else {
                rows.add_row(vec![
                    host.name.into(),
                    number(pid),
                    "does not answer".into(),
                ]);
                continue;
            };
            let connected = status.contexts.iter().filter(|context| context.connected);
            rows.add_row(vec![
                host.name.into(),
                number(pid),
                status.model.into(),
                status.net.into(),
                status.turn.unwrap_or_else(|| "nobody".to_owned()).into(),
                number(connected.count()),
            ]);
        }
        print_bytes(format!("{rows}\n").as_bytes())?;
        Ok(Ending::SUCCESS)
    }
}

/// `device status`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cofferdam device status nic0
  cofferdam device status nic0 --json | jq '.switches[-1].phases'")]
pub struct StatusOptions {
    /// Name of the device host
    name: VmName,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl StatusOptions {
    /// `device status`
    pub fn run(self) -> anyhow::Result<Ending> {
        let status = host_status(&find(&self.name)?, ANSWER_TIME)?;
        match self.json {
            true => print_json(&status)?,
            false => print_bytes(status_text(&status).as_bytes())?,
        }
        Ok(Ending::SUCCESS)
    }
}

/// `device stop`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Guests that are attached see a card that does not answer any more; serve a device of the same name, and they attach again.

Examples:
  cofferdam device stop nic0
  cofferdam device stop nic0 --force")]
pub struct StopOptions {
    /// Name of the device host
    name: VmName,
    /// End its process at once, also if it does not answer
    #[arg(long)]
    force: bool,
}

impl StopOptions {
    /// `device stop`
    pub fn run(self) -> anyhow::Result<Ending> {
        let root = RuntimeRoot::from_environment().devices();
        let host = root.find(Some(&self.name))?;
        if self.force {
            let Some(pid) = host.pid else {
                bail!("{} is only just beginning; try again", self.name);
            };
            Process::open(pid)?.kill()?;
        } else {
            ask_at(&host, &Request::Quit {}, ANSWER_TIME)?;
        }
        let deadline = Instant::now() + END_TIME;
        while root.running_as(&self.name)?.is_some() {
            ensure!(
                Instant::now() < deadline,
                "{} does not end within {} s: use --force",
                self.name,
                END_TIME.as_secs()
            );
            std::thread::sleep(END_POLL);
        }
        if self.force {
            root.clear()?;
        }
        Ok(Ending::SUCCESS)
    }
}

/// A device host's status as tables.
fn status_text(status: &HostStatus) -> String {
    let mut facts = table(&["device", &status.name]);
    let turn = status.turn.as_deref().unwrap_or("nobody");
    let passed_on = status
        .every_ms
        .map_or_else(String::new, |ms| format!(", passed on every {ms} ms"));
    for (what, value) in [
        ("turn", format!("{turn}{passed_on}")),
        ("process", status.pid.to_string()),
        (
            "NIC",
            match &status.function {
                Some(address) => format!("{} at {address}", status.model),
                None => format!("{} on {}", status.model, status.net),
            },
        ),
        ("parked guests see", format!("link {}", status.parked)),
        ("turn of a VM that goes", status.on_exit.clone()),
        (
            "contexts",
            format!("{} of {}", status.contexts.len(), status.slots),
        ),
        (
            "switches",
            format!("{}, {} failed", status.switch_count, status.failed_switches),
        ),
        (
            "lost while nobody had it",
            counted(status.lost_without_turn, "frame", "frames"),
        ),
    ] {
        facts.add_row(vec![what, &value]);
    }
    let mut text = format!("{facts}\n");
    if !status.contexts.is_empty() {
        text += &format!("\n{}\n", contexts_text(&status.contexts));
    }
    if !status.switches.is_empty() {
        text.push_str("\nlast switches\n");
    }
    for record in status.switches.iter().rev().take(8).rev() {
        text += &format!("  {}\n", switched(record));
    }
    text
}

fn contexts_text(contexts: &[ContextStatus]) -> String {
    let mut rows = table(&[
        "VM", "address", "state", "link", "in", "out", "lost", "waited", "others'", "DMA",
    ]);
    for context in contexts {
        let state = match (context.connected, context.away, context.turn) {
            (false, _, true) => "gone, has the turn",
            (false, _, false) => "gone",
            (true, true, _) => "at rest",
            (true, false, true) => "has the turn",
            (true, false, false) => "parked",
        };
        let frames = &context.frames;
        let missed = context.passed.map_or(0, |passed| passed.missed);
        let lost = frames.lost_while_parked
            + frames.lost_after_wait
            + frames.sent_without_carrier
            + missed;
        rows.add_row(vec![
            context.vm.as_str().into(),
            context.mac.as_str().into(),
            state.into(),
            if context.carrier { "up" } else { "down" }.into(),
            number(frames.received),
            number(frames.sent),
            number(lost),
            number(frames.waited),
            number(frames.refused_as_anothers),
            number(format!("{} MiB", context.dma_bytes >> 20)),
        ]);
    }
    rows.to_string()
}
