//! What is kept of a process's status: bounded, and with clean texts.

use std::collections::BTreeMap;

use isolation::status::ModuleStatus;
use recovery::ladder::LadderStatus;
use recovery::violations::Violations;

use super::text::clean;
use crate::control::protocol::{NicStatus, Status, VmState};
use crate::device::protocol::{ContextStatus, HostStatus};
use crate::words::switched;

/// Most things of one kind that are kept of a process: exits by reason, NICs, modules, functions,
/// contexts.
const MOST: usize = 256;
/// Last switches of a device host that are kept.
const MOST_SWITCHES: usize = 8;

/// A guest at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// When it was read (`CLOCK_MONOTONIC`).
    pub at_ns: u64,
    /// What its vCPUs do.
    pub state: VmState,
    /// What its kernel said when it panicked.
    pub panic: Option<String>,
    /// Time since its process began, in milliseconds.
    pub uptime_ms: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Of it resident, in KiB.
    pub guest_rss_kib: u64,
    /// Resident beyond it, in KiB.
    pub vmm_rss_kib: u64,
    /// How often it was reset.
    pub resets: u64,
    /// Path of its kernel.
    pub kernel: String,
    /// Exits by reason.
    pub exits: BTreeMap<String, u64>,
    /// NICs.
    pub nics: Vec<Nic>,
    /// Isolated modules by name.
    pub modules: BTreeMap<String, Module>,
}

/// A NIC of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Its address, model and wire, for people.
    pub name: String,
    /// Frames that came; `None` where they are not counted here, as at a device host.
    pub received: Option<u64>,
    /// Frames that were sent.
    pub sent: Option<u64>,
}

/// An isolated module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Calls by function.
    pub calls: BTreeMap<String, u64>,
    /// Calls taken back, by function.
    pub aborts: BTreeMap<String, u64>,
    /// How recovery stands.
    pub ladder: LadderStatus,
    /// Why it is isolated no more although it should be.
    pub broken: Option<String>,
    /// What its calls did wrong, the latest last.
    pub violations: Vec<Violations>,
}

impl Guest {
    /// What `status` says, with the violations of each module.
    pub fn new(
        at_ns: u64,
        status: Status,
        mut violations: BTreeMap<String, Vec<Violations>>,
    ) -> Self {
        let mut ladders = status.recovery;
        let modules = status.isolation.into_iter().take(MOST).map(|module| {
            let ladder = ladders.remove(&module.module).unwrap_or_default();
            let violations = violations.remove(&module.module).unwrap_or_default();
            let name = clean(&module.module);
            (name, Module::new(module, ladder, violations))
        });
        Self {
            at_ns,
            state: status.state,
            panic: status.guest_panic.as_deref().map(clean),
            uptime_ms: status.uptime_ms,
            vcpus: status.config.vcpus,
            memory_mib: status.config.memory_mib,
            guest_rss_kib: status.guest_rss_kib,
            vmm_rss_kib: status.vmm_rss_kib,
            resets: status.resets,
            kernel: clean(&status.config.kernel),
            exits: counters(status.exits),
            nics: status.nics.into_iter().take(MOST).map(Nic::new).collect(),
            modules: modules.collect(),
        }
    }

    /// Frames of all NICs by address: those that came, and those that were sent.
    pub fn frames(&self) -> [BTreeMap<String, u64>; 2] {
        let of = |count: fn(&Nic) -> Option<u64>| {
            let nics = self.nics.iter();
            nics.filter_map(|nic| Some((nic.name.clone(), count(nic)?)))
                .collect()
        };
        [of(|nic| nic.received), of(|nic| nic.sent)]
    }
}

impl Nic {
    fn new(nic: NicStatus) -> Self {
        let NicStatus {
            address,
            net,
            counters,
        } = nic;
        Self {
            name: clean(&format!("{address} {} on {}", net.nic, net.wire)),
            received: counters.get("rx_frames").copied(),
            sent: counters.get("tx_frames").copied(),
        }
    }
}

impl Module {
    fn new(status: ModuleStatus, mut ladder: LadderStatus, violations: Vec<Violations>) -> Self {
        ladder.gave_up = ladder.gave_up.as_deref().map(clean);
        let entries = || status.entries.iter().take(MOST);
        Self {
            calls: entries().map(|e| (clean(&e.name), e.calls)).collect(),
            aborts: entries().map(|e| (clean(&e.name), e.aborts)).collect(),
            ladder,
            broken: status.broken.as_deref().map(clean),
            violations: violations
                .into_iter()
                .rev()
                .take(MOST)
                .rev()
                .map(|violations| Violations {
                    entry: clean(&violations.entry),
                    text: clean(&violations.text),
                    ..violations
                })
                .collect(),
        }
    }

    /// Calls that were taken back.
    pub fn all_aborts(&self) -> u64 {
        self.aborts
            .values()
            .fold(0, |all, n| all.saturating_add(*n))
    }
}

fn counters(counters: BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let clean = |(name, count): (String, u64)| (clean(&name), count);
    counters.into_iter().take(MOST).map(clean).collect()
}

/// A device host at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// What it serves, and on what.
    pub card: String,
    /// The VM that has the turn.
    pub turn: Option<String>,
    /// The time slice in milliseconds, if the turn is passed on by time.
    pub every_ms: Option<u64>,
    /// The VMs that have a context, with what each is at.
    pub contexts: Vec<(String, &'static str)>,
    /// Switches since it began.
    pub switch_count: u64,
    /// Of them those that failed.
    pub failed_switches: u64,
    /// When each of the last ones began (`CLOCK_MONOTONIC`), and what it was, oldest first.
    pub switches: Vec<(u64, String)>,
}

impl Host {
    /// What `status` says.
    pub fn new(status: HostStatus) -> Self {
        let on = status.function.as_deref().unwrap_or(&status.net);
        let skipped = status.switches.len().saturating_sub(MOST_SWITCHES);
        let switches = status.switches.iter().skip(skipped);
        let contexts = status.contexts.iter().take(MOST);
        Self {
            card: clean(&format!("{} on {on}", status.model)),
            turn: status.turn.as_deref().map(clean),
            every_ms: status.every_ms,
            contexts: contexts
                .map(|context| (clean(&context.vm), at(context)))
                .collect(),
            switch_count: status.switch_count,
            failed_switches: status.failed_switches,
            switches: switches
                .map(|record| (record.begin_ns, clean(&switched(record))))
                .collect(),
        }
    }
}

fn at(context: &ContextStatus) -> &'static str {
    match (context.connected, context.away, context.turn) {
        (false, _, _) => "gone",
        (true, true, _) => "at rest",
        (true, false, true) => "has the turn",
        (true, false, false) => "parked",
    }
}
