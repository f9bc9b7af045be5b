//! Made-up processes for tests.

use std::collections::BTreeMap;
use std::time::Duration;

use isolation::status::{EntryStatus, ModuleStatus};
use recovery::violations::Violations;

use super::model::Model;
use super::poll::{Kind, Told, Who};
use super::reading::{Guest, Host};
use crate::control::protocol::{ConfigSummary, NetSummary, NicStatus, Status, VmState};
use crate::device::protocol::HostStatus;

/// A second.
pub const S: u64 = 1_000_000_000;

/// Counters with these names.
pub fn counters(all: &[(&str, u64)]) -> BTreeMap<String, u64> {
    let all = all.iter();
    all.map(|(name, count)| ((*name).to_owned(), *count))
        .collect()
}

/// The status of a guest with one NIC.
pub fn status(exits: u64, frames: u64) -> Status {
    Status {
        name: "web".to_owned(),
        pid: 7,
        state: VmState::Running,
        guest_panic: None,
        uptime_ms: 5000,
        ready_ns: None,
        vmm_rss_kib: 1024,
        guest_rss_kib: 2048,
        mark_pages: None,
        resets: 0,
        config: ConfigSummary {
            kernel: "/boot/vmlinux".to_owned(),
            memory_mib: 512,
            vcpus: 2,
            net: None,
            disks: Vec::new(),
            serial: "stdio".to_owned(),
        },
        exits: counters(&[("hlt", exits), ("io", 0)]),
        isolation: Vec::new(),
        recovery: BTreeMap::new(),
        nic: BTreeMap::new(),
        nics: vec![NicStatus {
            address: "0000:00:02.0".to_owned(),
            net: NetSummary {
                nic: "e1000".to_owned(),
                mac: None,
                wire: "user".to_owned(),
            },
            counters: counters(&[("rx_frames", frames), ("tx_frames", frames / 2)]),
        }],
    }
}

/// An isolated module called `e1000`.
pub fn module(calls: u64, aborts: u64) -> ModuleStatus {
    ModuleStatus {
        module: "e1000".to_owned(),
        entries: vec![EntryStatus {
            calls,
            aborts,
            ..EntryStatus::new("e1000_xmit_frame")
        }],
        violations: aborts,
        stopped: false,
        warm_pages: 0,
        broken: None,
        strength: Default::default(),
    }
}

/// What calls of it did wrong.
pub fn violations(count: u64, last_ns: u64) -> Violations {
    Violations {
        entry: "e1000_xmit_frame".to_owned(),
        count,
        first_ns: 1,
        last_ns,
        text: "e1000_xmit_frame: wrote 8 bytes at 0xffff888003a01000 (kmalloc-512) that the call may not write, at \
               e1000_tx_map+0x4c"
            .to_owned(),
        image: None,
    }
}

/// A guest's process.
pub fn who(name: &str) -> Who {
    Who {
        kind: Kind::Guest,
        name: name.to_owned(),
        pid: Some(7),
    }
}

/// A device host's process.
pub fn host_who(name: &str) -> Who {
    Who {
        kind: Kind::Host,
        ..who(name)
    }
}

/// The status of a device host that `left` and `right` share.
pub fn host_status() -> HostStatus {
    let context = |vm: &str, turn: bool| {
        serde_json::json!({"vm": vm, "mac": "02:00:00:00:00:01", "connected": true, "away": false, "turn": turn,
            "carrier": turn, "attached": 1, "dma_maps": 1, "dma_bytes": 1, "frames": {"received": 1,
            "received_bytes": 1, "sent": 1, "sent_bytes": 1, "sent_without_carrier": 0, "lost_while_parked": 0,
            "waited": 0, "delivered_after_wait": 0, "lost_after_wait": 0, "refused_as_anothers": 0, "turns": 1}})
    };
    serde_json::from_value(serde_json::json!({
        "name": "nic0", "pid": 7, "model": "e1000", "net": "user", "parked": "down", "on_exit": "next", "slots": 8,
        "uptime_ms": 1, "turn": "right", "every_ms": 100, "contexts": [context("left", false), context("right", true)],
        "lost_without_turn": 0, "switch_count": 12, "failed_switches": 1,
        "switches": [{"number": 12, "begin_ns": 8 * S, "from": "left", "to": "right", "reason": "asked",
            "outcome": "switched", "phases": {"quiesce_ns": 1500}}]
    }))
    .unwrap()
}

/// A model that takes in what it is told one second after the other.
pub struct Told1s {
    /// What it knows.
    pub model: Model,
}

impl Told1s {
    /// These processes run.
    pub fn running(all: &[Who]) -> Self {
        let mut model = Model::new(Duration::from_secs(1));
        model.take(Told::Running(all.to_vec()), S);
        Self { model }
    }

    fn next(&mut self, told: Told) {
        let now_ns = self.model.now_ns + S;
        self.model.take(told, now_ns);
    }

    /// These processes run now.
    pub fn run(&mut self, all: &[Who]) {
        self.next(Told::Running(all.to_vec()));
    }

    /// A guest answers.
    pub fn guest(&mut self, name: &str, status: Status, violations: &[Violations]) {
        let at_ns = self.model.now_ns + S;
        let all = BTreeMap::from([("e1000".to_owned(), violations.to_vec())]);
        let guest = Guest::new(at_ns, status, all);
        self.next(Told::Guest(who(name), Ok(Box::new(guest))));
    }

    /// A guest does not answer.
    pub fn no_answer(&mut self, name: &str, why: &str) {
        self.next(Told::Guest(who(name), Err(why.to_owned())));
    }

    /// A device host answers.
    pub fn host(&mut self, name: &str) {
        let host = Host::new(host_status());
        self.next(Told::Host(host_who(name), Ok(Box::new(host))));
    }

    /// What happened, the latest first.
    pub fn happened(&self) -> Vec<String> {
        let log = self.model.log.latest();
        log.map(|one| format!("{} {}", one.who, one.text)).collect()
    }
}
