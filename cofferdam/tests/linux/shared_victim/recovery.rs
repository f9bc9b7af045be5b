//! Faults in calls of the stock e1000 driver of a live guest, and what is left of them.
//!
//! `COFFERDAM_FULL=1` runs all entry points, all places and a thousand faults in a stream;
//! otherwise a few of each.

use std::time::{Duration, Instant};

use agent_protocol::traffic::TrafficKind;
use cofferdam::bench::network::{self, LINK_TIME};
use cofferdam::bench::operation::Operation;
use cofferdam::bench::traffic;
use cofferdam::control::protocol::{Reply, Request};
use devices::hold::CheckpointBy;
use recovery::fault::{FaultKind, Place, after_kernel_calls};
use recovery::ladder::{LadderConfig, OnFault, State};

use super::victim;
use crate::GATEWAY;
use crate::full;
use crate::victim::{DRIVER, Victim};

/// The entry points of which calls are made to fail.
const ALL: [&str; 13] = [
    "e1000_xmit_frame",
    "e1000_clean",
    "e1000_intr",
    "e1000_get_ethtool_stats",
    "e1000_get_regs",
    "e1000_set_ringparam",
    "e1000_change_mtu",
    "e1000_set_rx_mode",
    "e1000_set_features",
    "e1000_set_mac",
    "e1000_watchdog",
    "e1000_open",
    "e1000_close",
];
/// Functions whose calls carry a stream.
pub(super) const STREAM_ENTRIES: [&str; 3] = ["e1000_xmit_frame", "e1000_clean", "e1000_intr"];

pub(super) fn unlimited() -> LadderConfig {
    LadderConfig {
        recoveries_per_minute: u32::MAX,
        failures_in_a_row: u32::MAX,
        ..LadderConfig::default()
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn after_a_fault_at_any_place_the_same_operation_succeeds() {
    let mut victim = victim();
    let shortened = ["e1000_xmit_frame", "e1000_set_mac", "e1000_close"];
    let entries: &[&str] = if full() { &ALL } else { &shortened };
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
        // Its callers go on whatever it returns.
        if *entry == "e1000_close" {
            let rungs = victim.ladder().rungs;
            assert!(rungs.retries >= failed, "{rungs:?}");
        }
        victim.release();
        victim.ping();
    }
}

/// Pages that a processor keeps in its own list of free ones beyond what it kept before, where they
/// do not count as free: two batches (`zone_batchsize`, mm/page_alloc.c).
const KEPT_PAGES: i64 = 126;

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_checked_stream_survives_faults_and_nothing_leaks() {
    let mut victim = victim();
    // So many that one object or page for every other fault is more than the noise of a living
    // guest.
    let (entries, faults): (&[&str], u64) = match full() {
        true => (&STREAM_ENTRIES, 1000),
        false => (&["e1000_clean"], 200),
    };
    for &entry in entries {
        victim.isolate(entry, unlimited());
        // Twice without faults: once for what is kept for later, and once for how much comes and
        // goes anyhow.
        let mut undisturbed = || {
            let kind = TrafficKind::TcpEcho;
            let sent = traffic::send(&mut victim.guest, kind, Duration::from_secs(3));
            assert_eq!(sent.unwrap().error, None);
            victim.memory()
        };
        let (earlier, before) = (undisturbed(), undisturbed());
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
        let faults = i64::try_from(faults).unwrap();
        for (((name, earlier), (_, before)), (_, after)) in earlier.iter().zip(&before).zip(&after)
        {
            let noise = (before - earlier).abs();
            let kept = if *name == "pages" { KEPT_PAGES } else { 0 };
            assert!(
                after - before < noise + kept + faults / 2,
                "{entry}: {name} went from {earlier} to {before} without faults, and to {after} with {faults}"
            );
        }
    }
}

/// A call that returns nothing is run again, and does its work.
fn a_call_is_run_again(victim: &mut Victim) {
    let entry = "e1000_set_rx_mode";
    victim.isolate(entry, LadderConfig::default());
    victim.inject(entry, 5, FaultKind::UndefinedInstruction, 1, 1);
    victim.run(&["ip", "link", "set", "eth0", "allmulticast", "on"]);
    victim.run(&["ip", "link", "set", "eth0", "allmulticast", "off"]);
    let rungs = victim.ladder().rungs;
    assert_eq!((rungs.retries, rungs.errors), (1, 0));
    let (count, us) = victim.taken_back();
    assert!(count == 1 && us > 0, "{count} calls in {us} us");
    println!("a call taken back in {us} us");
    victim.release();
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn configuration_survives_rollback_and_restart_and_a_driver_that_fails_too_often_is_stopped() {
    let mut victim = victim();
    victim.configure();
    let before = victim.configuration();
    a_call_is_run_again(&mut victim);
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
    let times = victim.rung_times();
    assert!(matches!(times[..], [("resume", 1, 1..)]), "{times:?}");
    println!("{times:?}");
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
    let times = victim.rung_times();
    assert!(matches!(times[..], [("restart", 1, 1..)]), "{times:?}");
    println!("{times:?}");
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

/// Puts the NIC to sleep behind its driver's back (D3hot, by its power management control
/// register).
const SLEEP: &str =
    "printf '\\003' | dd of=/sys/class/net/eth0/device/config bs=1 seek=224 count=1 conv=notrunc";

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_device_is_suspended_in_d3_and_comes_back_when_it_is_resumed() {
    let mut victim = victim();
    victim.configure();
    let before = victim.configuration();
    let ask = |victim: &mut Victim, request: Request| {
        victim.guest.agent().disconnect();
        victim.guest.control().unwrap().ask(&request)
    };
    let module = || DRIVER.to_owned();
    let suspend = || Request::SuspendDevice { module: module() };
    let resume = || Request::ResumeDevice { module: module() };
    // Power management control and status of the 82540EM.
    let power_state = |victim: &mut Victim| {
        let config = "/sys/class/net/eth0/device/config";
        victim.guest.agent().read_file(config).unwrap()[0xe0] & 3
    };
    for round in 0..2 {
        if round == 1 {
            // With functions in the domain as well.
            victim.isolate("e1000_xmit_frame", unlimited());
        }
        let suspended = match ask(&mut victim, suspend()) {
            Ok(Reply::DeviceSuspended(suspended)) => suspended,
            other => panic!("not suspended: {other:?}"),
        };
        assert!(suspended.state_us.is_some() && suspended.power_us.is_some());
        assert_eq!(power_state(&mut victim), 3);
        let twice = ask(&mut victim, suspend()).unwrap_err().to_string();
        assert!(twice.contains("suspended already"), "{twice}");
        let Ok(Reply::DeviceResumed(resumed)) = ask(&mut victim, resume()) else {
            panic!("not resumed");
        };
        assert_eq!(power_state(&mut victim), 0);
        eprintln!("round {round}: suspended {suspended:?}, resumed {resumed:?}");
        network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
        victim.ping();
        victim.assert_configured(&before);
        victim.assert_healthy("a suspended device");
    }
    victim.release();
    victim.assert_healthy("all of it");
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_driver_suspends_and_resumes_its_device_while_the_guest_works() {
        let mut victim = victim();
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

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_device_that_is_lost_is_resumed_and_if_it_is_lost_again_its_driver_restarted() {
        let mut victim = victim();
        victim.configure();
        let before = victim.configuration();
        let entry = "e1000_get_ethtool_stats";
        victim.isolate(entry, LadderConfig::default());
        for round in 1..=2 {
            victim.run(&["busybox", "sh", "-c", SLEEP]);
            victim.try_command(&["ethtool", "-S", "eth0"]);
            let violations = victim.violations();
            let rungs = victim.wait_until_running().rungs;
            eprintln!("round {round}: {rungs:?}, {violations:?}");
            assert!(round == 2 || violations[0].contains("sleep state"));
            assert_eq!(rungs.failed_resumes + rungs.failed_restarts, 0);
            // The second time within a minute the driver is restarted, unless the lab is very slow.
            assert!(rungs.resumes >= 1 && rungs.resumes + rungs.restarts == round);
            network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
            victim.ping();
            victim.assert_configured(&before);
        }
        victim.release();
        victim.assert_healthy("a lost device");
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_poll_that_fails_for_ever_lets_the_guest_do_what_a_rung_needs_of_it() {
        let mut victim = victim();
        victim.configure();
        let before = victim.configuration();
        let entry = "e1000_clean";
        victim.isolate(
            entry,
            LadderConfig {
                recoveries_per_minute: u32::MAX,
                failures_in_a_row: 20,
                ..LadderConfig::default()
            },
        );
        victim.inject(entry, 5, FaultKind::UndefinedInstruction, 1, u64::MAX);
        victim.try_command(&["ping", "-c", "1", "-W", "1", GATEWAY]);
        // It fails until its module is isolated anew by the restart.
        let deadline = Instant::now() + Duration::from_secs(600);
        let rungs = loop {
            let rungs = victim.wait_until_running().rungs;
            if rungs.restarts > 0 {
                break rungs;
            }
            assert!(Instant::now() < deadline, "{rungs:?}");
            std::thread::sleep(Duration::from_millis(100));
        };
        eprintln!("{rungs:?}");
        assert_eq!((rungs.resumes, rungs.restarts), (1, 1));
        // The resume has failed if the function had to rest again before it was over.
        assert!(rungs.failed_resumes <= 1 && rungs.failed_restarts == 0);
        network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
        victim.ping();
        victim.assert_configured(&before);
        victim.release();
        victim.assert_healthy("a poll that fails for ever");
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_device_that_is_put_back_by_its_registers_goes_on() {
        let mut victim = victim();
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
        let resets: &[&str] = match full() {
            true => &["e1000_set_ringparam", "e1000_change_mtu"],
            false => &["e1000_set_ringparam"],
        };
        for entry in resets {
            victim.isolate(entry, unlimited());
            let operation = Operation::of(entry).unwrap();
            let places: &[Place] = match full() {
                true => &[Place::Middle, Place::Last],
                false => &[Place::Last],
            };
            for &place in places {
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
}
