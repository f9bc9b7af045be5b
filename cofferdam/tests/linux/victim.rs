//! A guest with an e1000 whose driver is made to fail, restarted, exchanged.

use std::time::{Duration, Instant};

use agent_protocol::message::{Bytes, Exec};
use cofferdam::bench::guest::Guest;
use cofferdam::bench::network::{self, LINK_TIME};
use cofferdam::bench::operation::Operation;
use cofferdam::control::protocol::{Reply, Request};
use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use isolation::dispatch::fault::{FaultCount, InstructionAt};
use isolation::status::ModuleStatus;
use recovery::fault::{FaultKind, Place};
use recovery::ladder::{LadderConfig, LadderStatus, State};
use recovery::request::Spilling;
use recovery::upgrade::UpgradeReport;

use super::{boot, options};

/// The driver.
pub const DRIVER: &str = "e1000";
/// How long a call may be in coming.
const CALL_TIME: Duration = Duration::from_secs(5);

/// A guest whose driver is made to fail.
pub struct Victim {
    pub guest: Guest,
    /// First kernel message after the boot.
    boot_end: u64,
    /// How the device's state is taken.
    pub checkpoint: CheckpointBy,
}

impl Victim {
    pub fn boot() -> Self {
        let mut guest = boot(&options().with("--net user --nic e1000"));
        let boot_end = messages(&mut guest);
        network::bring_up(&mut guest, DRIVER).unwrap();
        network::wait_for_link(&mut guest, LINK_TIME).unwrap();
        Self::new(guest, boot_end)
    }

    /// One that has loaded its driver while it booted.
    pub fn of(mut guest: Guest) -> Self {
        network::wait_for_link(&mut guest, LINK_TIME).unwrap();
        let boot_end = messages(&mut guest);
        Self::new(guest, boot_end)
    }

    fn new(guest: Guest, boot_end: u64) -> Self {
        Self {
            guest,
            boot_end,
            checkpoint: CheckpointBy::Exact,
        }
    }

    pub fn ask(&mut self, request: &Request) -> Reply {
        let answer = self.guest.control().unwrap().ask(request);
        answer.unwrap_or_else(|error| panic!("{request:?}: {error:#}{}", self.guest.last_words()))
    }

    pub fn isolate(&mut self, entry: &str, recovery: LadderConfig) {
        self.isolate_all(&[entry], recovery);
    }

    pub fn isolate_all(&mut self, entries: &[&str], recovery: LadderConfig) {
        // The VM asks the agent itself, which listens to one client at a time.
        self.guest.agent().disconnect();
        self.ask(&Request::Isolate {
            module: DRIVER.to_owned(),
            entries: Wanted::Named(entries.iter().map(|&entry| entry.to_owned()).collect()),
            // The longest that there is: resets of the adapter take seconds in a busy lab.
            budget_us: Some(10_000_000),
            device_checkpoint: self.checkpoint,
            recovery,
            spilling: Spilling::default(),
            contain: Contain::Full,
            keep_faults: None,
        });
    }

    pub fn release(&mut self) {
        self.ask(&Request::Release {
            module: DRIVER.to_owned(),
        });
    }

    pub fn inject(&mut self, entry: &str, offset: u64, fault: FaultKind, every: u32, times: u64) {
        self.ask(&Request::Inject {
            module: DRIVER.to_owned(),
            entry: entry.to_owned(),
            offset,
            fault,
            every,
            times,
        });
    }

    pub fn count(&mut self) -> FaultCount {
        match self.ask(&Request::FaultCount {
            module: DRIVER.to_owned(),
        }) {
            Reply::FaultCount(count) => count,
            other => panic!("{other:?}"),
        }
    }

    pub fn instructions(&mut self, function: &str) -> Vec<InstructionAt> {
        match self.ask(&Request::Instructions {
            module: DRIVER.to_owned(),
            function: function.to_owned(),
        }) {
            Reply::Instructions { instructions } => instructions,
            other => panic!("{other:?}"),
        }
    }

    pub fn ladder(&self) -> LadderStatus {
        let status = self.guest.control().unwrap().status().unwrap();
        status.recovery[DRIVER].clone()
    }

    /// How many rungs took how long, in milliseconds, by rung.
    pub fn rung_times(&self) -> Vec<(&'static str, u64, u64)> {
        let times = self.ladder().times;
        let times = times
            .each()
            .map(|(rung, times)| (rung, times.count(), times.sum_ns() / 1_000_000));
        times
            .into_iter()
            .filter(|(_, count, _)| *count > 0)
            .collect()
    }

    /// How many calls of isolated functions were taken back, and how long it took until they were,
    /// in microseconds.
    pub fn taken_back(&self) -> (u64, u64) {
        let status = self.guest.control().unwrap().status().unwrap();
        let entries = status.isolation.iter().flat_map(|one| &one.entries);
        let times = entries.map(|entry| &entry.taken_back);
        times.fold((0, 0), |(count, us), times| {
            (count + times.count(), us + times.sum_ns() / 1000)
        })
    }

    /// Waits until the ladder has done what it is at.
    pub fn wait_until_running(&mut self) -> LadderStatus {
        // It asks the agent itself, which listens to one client at a time.
        self.guest.agent().disconnect();
        // Steps of a restart have limits of their own; a lab beside others may be several times as
        // slow as alone.
        let deadline = Instant::now() + Duration::from_secs(600);
        let under_way = |state| {
            matches!(
                state,
                State::Resuming | State::Restarting | State::Resetting
            )
        };
        while under_way(self.ladder().state) {
            assert!(Instant::now() < deadline, "the driver is not back");
            std::thread::sleep(Duration::from_millis(100));
        }
        let ladder = self.ladder();
        assert_eq!(
            ladder.state,
            State::Running,
            "{ladder:?}{}",
            self.guest.last_words()
        );
        ladder
    }

    /// Runs a command, which may fail.
    pub fn try_command(&mut self, argv: &[&str]) {
        let exec = Exec {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            limit_ms: Some(20_000),
            ..Exec::default()
        };
        self.guest.agent().exec(exec).unwrap();
    }

    pub fn run(&mut self, argv: &[&str]) -> String {
        let result = self.guest.run(argv);
        result.unwrap_or_else(|error| panic!("{error:#}{}", self.guest.last_words()))
    }

    pub fn ping(&mut self) {
        self.run(&["ping", "-c", "3", "-i", "0.1", "-W", "5", "10.0.2.2"]);
    }

    /// Has the kernel call the function once or twice.
    pub fn operate(&mut self, operation: Operation) {
        match (operation.command(true), operation.command(false)) {
            (None, _) | (_, None) => {
                self.try_command(&["ping", "-c", "2", "-i", "0.05", "-W", "1", "10.0.2.2"])
            }
            (Some(forth), Some(back)) => {
                self.try_command(forth);
                self.try_command(back);
            }
        }
    }

    /// The same, which must succeed.
    pub fn operate_well(&mut self, operation: Operation) {
        for argv in [operation.command(true), operation.command(false)]
            .into_iter()
            .flatten()
        {
            self.run(argv);
        }
        self.ping();
    }

    /// One fault at `offset`; whether a call reached it.
    pub fn fail_once(
        &mut self,
        entry: &str,
        operation: Operation,
        offset: u64,
        fault: FaultKind,
    ) -> bool {
        self.inject(entry, offset, fault, 1, 1);
        let deadline = Instant::now() + CALL_TIME;
        let count = loop {
            self.operate(operation);
            let count = self.count();
            if count.tried > 0 || Instant::now() > deadline {
                break count;
            }
        };
        assert!(
            count.tried > 0,
            "{entry} is not called{}",
            self.guest.last_words()
        );
        self.inject(entry, offset, fault, 1, 0);
        count.failed > 0
    }

    /// One fault at a place of this kind that calls reach.
    pub fn fail_at(&mut self, entry: &str, operation: Operation, place: Place) -> u64 {
        let candidates = place.candidates(&self.instructions(entry));
        let reached = candidates
            .into_iter()
            .take(24)
            .find(|offset| self.fail_once(entry, operation, *offset, FaultKind::NullDereference));
        reached.unwrap_or_else(|| panic!("{entry}: no {} instruction", place.name()))
    }

    /// What the last failed calls did, as a person reads it.
    pub fn violations(&mut self) -> Vec<String> {
        match self.ask(&Request::Violations {
            module: DRIVER.to_owned(),
        }) {
            Reply::Violations { texts, .. } => texts,
            other => panic!("{other:?}"),
        }
    }

    /// Kernel messages that no healthy guest writes.
    pub fn assert_healthy(&mut self, after: &str) {
        let (records, _) = self.guest.agent().kmsg(self.boot_end).unwrap();
        for record in records {
            for bad in [
                "BUG:",
                "WARNING: CPU",
                "Oops",
                "Call Trace",
                "soft lockup",
                "stall",
                "leak",
            ] {
                assert!(
                    !record.text.contains(bad),
                    "{after}: dmesg: {}",
                    record.text
                );
            }
        }
    }

    /// Objects of the caches that packets and rings are made of, and pages in use.
    pub fn memory(&mut self) -> Vec<(String, i64)> {
        let script = "for c in skbuff_head_cache skbuff_fclone_cache kmalloc-256 kmalloc-512 kmalloc-1k kmalloc-2k kmalloc-4k; do \
            f=/sys/kernel/slab/$c; [ -e $f/shrink ] || continue; echo 1 > $f/shrink; \
            echo $c $(sed 's/ .*//' $f/objects); done; \
            echo pages $(awk '/^MemFree/{f=$2} /^Cached/{c=$2} END{print int(-(f+c)/4)}' /proc/meminfo)";
        let text = self.run(&["sh", "-c", script]);
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        lines
            .map(|(name, count)| (name.to_owned(), count.trim().parse().unwrap()))
            .collect()
    }

    /// Sets all that can be set of the interface to something else than the driver's default.
    pub fn configure(&mut self) {
        self.guest.agent().load_module("8021q", "").unwrap();
        for line in [
            "ip link set eth0 down",
            "ip link set eth0 address 52:54:00:00:00:99",
            "ip link set eth0 up",
            "ip route replace default via 10.0.2.2",
            "ip link set eth0 mtu 1400",
            "ethtool -G eth0 rx 128 tx 128",
            "ethtool -K eth0 rx off",
            "ip link set eth0 promisc on",
            "ip link add link eth0 name eth0.5 type vlan id 5",
            "ip addr add 10.64.5.15/24 dev eth0.5",
            "ip link set eth0.5 up",
            "ip route add 192.0.2.0/24 via 10.0.2.2",
        ] {
            self.run(&line.split(' ').collect::<Vec<_>>());
        }
        network::wait_for_link(&mut self.guest, LINK_TIME).unwrap();
        self.ping();
        self.run(&["ping", "-c", "3", "-i", "0.1", "-W", "5", "10.64.5.2"]);
        // Packets pass before the interface is said to be up.
        let settled = "until [ $(cat /sys/class/net/eth0.5/operstate) = up ]; do sleep 0.1; done";
        self.run(&["busybox", "sh", "-c", settled]);
    }

    /// The configuration is as before, once the interfaces' states have settled.
    #[track_caller]
    pub fn assert_configured(&mut self, before: &str) {
        let deadline = Instant::now() + CALL_TIME;
        loop {
            let now = self.configuration();
            if now == before || Instant::now() > deadline {
                assert_eq!(now, before);
                return;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// All that a person can set of the interface, as programs print it.
    pub fn configuration(&mut self) -> String {
        let mut text = self.run(&["ip", "-d", "link", "show", "dev", "eth0"]);
        text += &self.run(&["ip", "-4", "addr", "show"]);
        text += &self.run(&["ip", "route"]);
        text += &self.run(&["ethtool", "-g", "eth0"]);
        text += &self.run(&["ethtool", "-k", "eth0"]);
        // Numbers of interfaces grow with each that is made.
        let plain = |line: &str| match line.split_once(": ") {
            Some((number, rest)) if number.parse::<u32>().is_ok() => rest.to_owned(),
            _ => line.to_owned(),
        };
        text.lines().map(plain).collect::<Vec<_>>().join("\n")
    }

    /// Exchanges the driver; what was told meanwhile is printed.
    pub fn upgrade(
        &mut self,
        module: &str,
        file: Vec<u8>,
        limit_ms: u64,
    ) -> Result<UpgradeReport, String> {
        // The VM asks the agent itself, which listens to one client at a time.
        self.guest.agent().disconnect();
        let request = Request::Upgrade {
            module: module.to_owned(),
            file: Bytes(file),
            limit_ms,
        };
        let mut told = Vec::new();
        let answer = self
            .guest
            .control()
            .unwrap()
            .ask_and_watch(&request, &mut |what| told.push(what.to_owned()));
        match answer {
            Ok(Reply::Upgraded(report)) => {
                eprintln!("{told:?}: {report:?}");
                Ok(*report)
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(format!("{error:#}")),
        }
    }

    /// Build id of the driver that runs.
    pub fn loaded_build(&mut self) -> Vec<u8> {
        let path = "/sys/module/e1000/notes/.note.gnu.build-id";
        let note = self.guest.agent().read_file(path).unwrap();
        recovery::module_file::build_id(&note).unwrap()
    }

    /// How often the other end of the wire saw the link go.
    pub fn link_losses(&self) -> u64 {
        self.guest.control().unwrap().status().unwrap().nic["link_losses"]
    }

    /// The driver, if it is isolated.
    pub fn module(&self) -> Option<ModuleStatus> {
        let status = self.guest.control().unwrap().status().unwrap();
        let mut modules = status.isolation.into_iter();
        modules.find(|module| module.module == DRIVER)
    }

    /// Functions that are isolated.
    pub fn isolated(&self) -> Vec<String> {
        let status = self.guest.control().unwrap().status().unwrap();
        let modules = status.isolation.into_iter();
        modules
            .flat_map(|module| module.entries)
            .map(|entry| entry.name)
            .collect()
    }
}

/// How many kernel messages there are. The emulated processor's quirks make the kernel warn while
/// it boots.
fn messages(guest: &mut Guest) -> u64 {
    guest.agent().kmsg(0).unwrap().1
}
