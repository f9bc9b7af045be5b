//! Faults in calls of the stock e1000 driver of a live guest, and what is left of them.
//!
//! `COFFERDAM_FULL=1` runs all entry points, all places and a thousand faults in a stream; otherwise a
//! few of each.

use std::time::{Duration, Instant};

use agent_protocol::message::Exec;
use agent_protocol::traffic::TrafficKind;
use cofferdam::bench::guest::Guest;
use cofferdam::bench::network::{self, LINK_TIME};
use cofferdam::bench::rollback::{ENTRIES, Operation};
use cofferdam::bench::traffic;
use cofferdam::control::protocol::{EntrySelection, Reply, Request};
use isolation::attach::device::CheckpointBy;
use isolation::attach::fault::{FaultCount, InstructionAt};
use recovery::fault::{FaultKind, Place, after_kernel_calls};
use recovery::ladder::{LadderConfig, LadderStatus, OnFault, State};

use super::{boot, options};

const DRIVER: &str = "e1000";
/// How long a call may be in coming.
const CALL_TIME: Duration = Duration::from_secs(5);
/// Functions whose calls carry a stream.
const STREAM_ENTRIES: [&str; 3] = ["e1000_xmit_frame", "e1000_clean", "e1000_intr"];

fn full() -> bool {
    std::env::var_os("COFFERDAM_FULL").is_some()
}

/// A guest whose driver is made to fail.
pub(super) struct Victim {
    pub guest: Guest,
    /// First kernel message after the boot.
    boot_end: u64,
    /// How the device's state is taken.
    checkpoint: CheckpointBy,
}

impl Victim {
    pub fn boot() -> Self {
        let mut guest = boot(&options().with("--net user --nic e1000"));
        // The emulated processor's quirks make the kernel warn while it boots.
        let (_, boot_end) = guest.agent().kmsg(0).unwrap();
        network::bring_up(&mut guest, DRIVER).unwrap();
        network::wait_for_link(&mut guest, LINK_TIME).unwrap();
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
        // The VM asks the agent itself, which listens to one client at a time.
        self.guest.agent().disconnect();
        self.ask(&Request::Isolate {
            module: DRIVER.to_owned(),
            entries: EntrySelection::Named(vec![entry.to_owned()]),
            budget_us: Some(2_000_000),
            device_checkpoint: self.checkpoint,
            recovery,
        });
    }

    fn release(&mut self) {
        self.ask(&Request::Release {
            module: DRIVER.to_owned(),
        });
    }

    fn inject(&mut self, entry: &str, offset: u64, fault: FaultKind, every: u32, times: u64) {
        self.ask(&Request::Inject {
            module: DRIVER.to_owned(),
            entry: entry.to_owned(),
            offset,
            fault,
            every,
            times,
        });
    }

    fn count(&mut self) -> FaultCount {
        match self.ask(&Request::FaultCount {
            module: DRIVER.to_owned(),
        }) {
            Reply::FaultCount(count) => count,
            other => panic!("{other:?}"),
        }
    }

    fn instructions(&mut self, function: &str) -> Vec<InstructionAt> {
        match self.ask(&Request::Instructions {
            module: DRIVER.to_owned(),
            function: function.to_owned(),
        }) {
            Reply::Instructions { instructions } => instructions,
            other => panic!("{other:?}"),
        }
    }

    fn ladder(&self) -> LadderStatus {
        let status = self.guest.control().unwrap().status().unwrap();
        status.recovery[DRIVER].clone()
    }

    /// Waits until the ladder has done what it is at.
    fn wait_until_running(&mut self) -> LadderStatus {
        // It asks the agent itself, which listens to one client at a time.
        self.guest.agent().disconnect();
        let deadline = Instant::now() + Duration::from_secs(120);
        while matches!(self.ladder().state, State::Resuming | State::Restarting) {
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
    fn try_command(&mut self, argv: &[&str]) {
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
    fn operate(&mut self, operation: Operation) {
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
    fn operate_well(&mut self, operation: Operation) {
        for argv in [operation.command(true), operation.command(false)]
            .into_iter()
            .flatten()
        {
            self.run(argv);
        }
        self.ping();
    }

    /// One fault at `offset`; whether a call reached it.
    fn fail_once(
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
    fn fail_at(&mut self, entry: &str, operation: Operation, place: Place) -> u64 {
        let candidates = place.candidates(&self.instructions(entry));
        let reached = candidates
            .into_iter()
            .take(24)
            .find(|offset| self.fail_once(entry, operation, *offset, FaultKind::NullDereference));
        reached.unwrap_or_else(|| panic!("{entry}: no {} instruction", place.name()))
    }

    /// What the last failed calls did, as a person reads it.
    fn violations(&mut self) -> Vec<String> {
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
    fn memory(&mut self) -> Vec<(String, i64)> {
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
}

fn unlimited() -> LadderConfig {
    LadderConfig {
        recoveries_per_minute: u32::MAX,
        ..LadderConfig::default()
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn after_a_fault_at_any_place_the_same_operation_succeeds() {
    let mut victim = Victim::boot();
    let shortened = [
        "e1000_xmit_frame",
        "e1000_get_ethtool_stats",
        "e1000_set_mac",
    ];
    let entries: &[&str] = if full() { ENTRIES } else { &shortened };
    for entry in entries {
        let operation = Operation::of(entry).unwrap();
        victim.isolate(entry, unlimited());
        let instructions = victim.instructions(entry);
        let mut failed = 0;
        for place in Place::ALL {
            let offset = victim.fail_at(entry, operation, place);
            eprintln!("{entry}+{offset:#x} ({})", place.name());
            victim.operate_well(operation);
            victim.assert_healthy(&format!("{entry}, {}", place.name()));
            failed += 1;
        }
        let calls = after_kernel_calls(&instructions);
        let most = if full() { usize::MAX } else { 3 };
        for (offset, called) in calls.into_iter().take(most) {
            // Calls on ways that this operation does not go are not reached.
            if victim.fail_once(entry, operation, offset, FaultKind::UndefinedInstruction) {
                eprintln!("{entry}+{offset:#x} (after {called})");
                victim.operate_well(operation);
                victim.assert_healthy(&format!("{entry}, after {called}"));
                failed += 1;
            }
        }
        eprintln!("{entry}: {failed} places");
        victim.release();
        victim.ping();
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_checked_stream_survives_faults_and_nothing_leaks() {
    let mut victim = Victim::boot();
    let faults: u64 = if full() { 1000 } else { 30 };
    for entry in STREAM_ENTRIES {
        // Once without faults, so that what is kept for later is there already.
        let warm = traffic::send(
            &mut victim.guest,
            TrafficKind::TcpEcho,
            Duration::from_secs(2),
        );
        assert_eq!(warm.unwrap().error, None);
        let before = victim.memory();
        victim.isolate(entry, unlimited());
        victim.inject(entry, 5, FaultKind::NullDereference, 5, faults);
        let mut bytes = 0;
        let deadline = Instant::now() + Duration::from_secs(600);
        loop {
            let result = traffic::send(
                &mut victim.guest,
                TrafficKind::TcpEcho,
                Duration::from_secs(5),
            );
            let result = result.unwrap();
            assert_eq!((result.corrupted, &result.error), (0, &None), "{entry}");
            bytes += result.bytes_to_peer + result.bytes_from_peer;
            let count = victim.count();
            if count.left == 0 {
                assert_eq!(count.failed, faults);
                break;
            }
            assert!(Instant::now() < deadline, "{entry}: {count:?}");
        }
        let ladder = victim.ladder();
        assert_eq!(
            ladder.rungs.errors + ladder.rungs.retries,
            faults,
            "{ladder:?}"
        );
        victim.release();
        let after = victim.memory();
        victim.assert_healthy(entry);
        eprintln!("{entry}: {faults} faults, {bytes} bytes; before {before:?}, after {after:?}");
        for ((name, before), (_, after)) in before.iter().zip(&after) {
            // One for every other fault would be a leak; less is the noise of a living guest.
            let allowed =
                if name == "pages" { 512 } else { 64 } + i64::try_from(faults).unwrap() / 4;
            assert!(
                after - before < allowed,
                "{entry}: {name} went from {before} to {after}"
            );
        }
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn configuration_survives_rollback_and_restart_and_a_driver_that_fails_too_often_is_stopped() {
    let mut victim = Victim::boot();
    victim.configure();
    let before = victim.configuration();
    // A call that returns nothing is run again, and does its work.
    victim.isolate("e1000_set_rx_mode", LadderConfig::default());
    victim.inject(
        "e1000_set_rx_mode",
        5,
        FaultKind::UndefinedInstruction,
        1,
        1,
    );
    victim.run(&["ip", "link", "set", "eth0", "allmulticast", "on"]);
    victim.run(&["ip", "link", "set", "eth0", "allmulticast", "off"]);
    let rungs = victim.ladder().rungs;
    assert_eq!((rungs.retries, rungs.errors), (1, 0));
    victim.release();
    victim.assert_configured(&before);
    // The driver suspends and resumes its device, and has never gone.
    let mut resume = LadderConfig::default();
    let entry = "e1000_get_ethtool_stats";
    resume.per_entry.insert(entry.to_owned(), OnFault::Resume);
    victim.isolate(entry, resume);
    victim.inject(entry, 5, FaultKind::NullDereference, 1, 1);
    victim.try_command(&["ethtool", "-S", "eth0"]);
    let ladder = victim.wait_until_running();
    assert_eq!(
        (
            ladder.rungs.resumes,
            ladder.rungs.failed_resumes,
            ladder.rungs.restarts
        ),
        (1, 0, 0)
    );
    network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
    victim.ping();
    victim.assert_configured(&before);
    victim.release();
    // The driver is restarted, and all that was set is set again.
    let mut restart = LadderConfig::default();
    restart.per_entry.insert(entry.to_owned(), OnFault::Restart);
    victim.isolate(entry, restart);
    victim.inject(entry, 5, FaultKind::NullDereference, 1, 1);
    victim.try_command(&["ethtool", "-S", "eth0"]);
    let ladder = victim.wait_until_running();
    assert_eq!(
        (ladder.rungs.restarts, ladder.rungs.failed_restarts),
        (1, 0)
    );
    network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
    victim.ping();
    victim.assert_configured(&before);
    victim.release();
    // Too many faults: the driver is stopped, the guest lives.
    victim.isolate(
        entry,
        LadderConfig {
            recoveries_per_minute: 3,
            on_fault: Some(OnFault::Error),
            ..LadderConfig::default()
        },
    );
    victim.inject(entry, 5, FaultKind::NullDereference, 1, 100);
    for _ in 0..6 {
        victim.try_command(&["ethtool", "-S", "eth0"]);
    }
    let ladder = victim.ladder();
    assert_eq!(
        (ladder.state, ladder.rungs.errors),
        (State::Stopped, 3),
        "{ladder:?}"
    );
    assert_eq!(
        victim.count().failed,
        4,
        "a stopped driver's calls are not run"
    );
    victim.run(&["true"]);
    victim.release();
    // The device was silenced with its driver.
    victim.run(&["ip", "link", "set", "eth0", "down"]);
    victim.run(&["ip", "link", "set", "eth0", "up"]);
    network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
    victim.ping();
    victim.assert_healthy("all of it");
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_device_that_is_put_back_by_its_registers_goes_on() {
    let mut victim = Victim::boot();
    victim.checkpoint = CheckpointBy::Registers;
    // These read the device, and the first acknowledges its interrupts by that.
    for entry in ["e1000_intr", "e1000_clean"] {
        victim.isolate(entry, unlimited());
        let operation = Operation::of(entry).unwrap();
        let offset = victim.fail_at(entry, operation, Place::Last);
        victim.inject(entry, offset, FaultKind::UndefinedInstruction, 5, 30);
        let result = traffic::send(
            &mut victim.guest,
            TrafficKind::TcpEcho,
            Duration::from_secs(5),
        );
        let result = result.unwrap();
        assert_eq!((result.corrupted, &result.error), (0, &None), "{entry}");
        let count = victim.count();
        let violations = victim.violations();
        eprintln!("{entry}+{offset:#x}: {count:?}, {result:?}");
        assert!(count.failed > 0, "{count:?}");
        // Not every poll reads the device before its end.
        let reached = |text: &String| text.contains("put back from its checkpoint");
        assert!(
            entry == "e1000_clean" || violations.iter().all(reached),
            "{violations:?}"
        );
        victim.release();
        victim.assert_healthy(entry);
    }
    // These reset the controller and power the PHY down and up.
    for entry in ["e1000_set_ringparam", "e1000_change_mtu"] {
        victim.isolate(entry, unlimited());
        let operation = Operation::of(entry).unwrap();
        for place in [Place::Middle, Place::Last] {
            let offset = victim.fail_at(entry, operation, place);
            let violations = victim.violations();
            eprintln!("{entry}+{offset:#x}: {violations:?}");
            victim.ping();
            victim.operate_well(operation);
            victim.assert_healthy(entry);
        }
        victim.release();
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_driver_suspends_and_resumes_its_device_while_the_guest_works() {
    let mut victim = Victim::boot();
    victim.configure();
    let before = victim.configuration();
    let resume = |victim: &mut Victim, module: &str| {
        victim.guest.agent().disconnect();
        let request = Request::ResumeDevice {
            module: module.to_owned(),
        };
        victim.guest.control().unwrap().ask(&request)
    };
    // The driver takes its link away and gives it back.
    let changes = |victim: &mut Victim| -> u32 {
        let text = victim.run(&["cat", "/sys/class/net/eth0/carrier_changes"]);
        text.trim().parse().unwrap()
    };
    for round in 0..3 {
        let changes_before = changes(&mut victim);
        let answer = resume(&mut victim, DRIVER);
        let last_words = victim.guest.last_words();
        match answer.unwrap_or_else(|error| panic!("{error:#}{last_words}")) {
            Reply::Resumed { times_us } => eprintln!("round {round}: {times_us:?} us"),
            other => panic!("{other:?}"),
        }
        network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
        victim.ping();
        victim.assert_configured(&before);
        assert!(changes(&mut victim) >= changes_before + 2);
        victim.assert_healthy("suspend and resume");
    }
    // It works with functions in the domain as well, and others' writes are what they were.
    victim.isolate("e1000_xmit_frame", unlimited());
    resume(&mut victim, DRIVER).unwrap();
    network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
    victim.ping();
    victim.release();
    let attribute = "/sys/class/net/eth0/device/broken_parity_status";
    victim.run(&["sh", "-c", &format!("echo 1 > {attribute}")]);
    assert_eq!(victim.run(&["cat", attribute]).trim(), "1");
    victim.guest.agent().load_module("dummy", "").unwrap();
    let error = resume(&mut victim, "dummy").unwrap_err().to_string();
    assert!(error.contains("drives no PCI device"), "{error}");
    victim.assert_healthy("all of it");
}
