//! Drivers that can be neither restarted nor exchanged: the guest goes back to its snapshot, or is
//! booted anew.

use std::path::Path;
use std::time::{Duration, Instant};

use cofferdam::bench::device_host::{DeviceHost, NAME};
use cofferdam::bench::guest::Guest;
use cofferdam::bench::network::{self, LINK_TIME};
use cofferdam::control::protocol::Request;
use recovery::fault::FaultKind;
use recovery::ladder::{LadderConfig, LadderStatus, MayReset, OnFault, State};
use recovery::upgrade::{UpgradeOutcome, UpgradeReport};

use super::builds::{another_build, build_of, hex, stock, that_stays, without_the_device};
use super::victim::{DRIVER, Victim};
use super::{BOOT_TIME, boot, options};

const ENTRY: &str = "e1000_get_ethtool_stats";
/// Within which a driver that cannot be restarted is stopped.
const STOP_TIME: Duration = Duration::from_secs(120);

/// Whose `/init` loads the driver and gives it its address, at each boot.
fn victim() -> Victim {
    let network = "--net user --nic e1000 --append cofferdam.net=e1000,10.0.2.15/24,10.0.2.2";
    Victim::of(boot(&options().with(network)))
}

/// The new driver works, and the same functions are isolated in it.
#[track_caller]
fn is_new(victim: &Victim, report: &UpgradeReport) {
    let fine = report.outcome == UpgradeOutcome::New && report.problems.is_empty();
    assert!(fine, "{report:?}{}", victim.guest.what_it_does());
}

fn boot_id(guest: &mut Guest) -> String {
    guest.agent().hello(BOOT_TIME).unwrap().boot_id.clone()
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_driver_that_cannot_be_removed_is_stopped_where_the_guest_may_not_be_reset() {
    let mut victim = victim();
    let restart = LadderConfig {
        on_fault: Some(OnFault::Restart),
        ..LadderConfig::default()
    };
    victim.isolate(ENTRY, restart);
    let stays = that_stays(another_build(0xb3));
    let report = victim.upgrade(DRIVER, stays, 60_000).unwrap();
    is_new(&victim, &report);

    victim.inject(ENTRY, 5, FaultKind::NullDereference, 1, 1);
    victim.try_command(&["ethtool", "-S", "eth0"]);
    victim.guest.agent().disconnect();
    // The gates are put in again, and calls are not run.
    let deadline = Instant::now() + STOP_TIME;
    while !victim.module().is_some_and(|module| module.stopped) {
        assert!(Instant::now() < deadline, "{:?}", victim.ladder());
        std::thread::sleep(Duration::from_millis(100));
    }
    let ladder = victim.ladder();
    assert_eq!(ladder.state, State::Stopped, "{ladder:?}");
    victim.try_command(&["ethtool", "-S", "eth0"]);
    let entry = victim.module().unwrap().entries.remove(0);
    assert_eq!((entry.name.as_str(), entry.commits), (ENTRY, 0));
    assert!(entry.refused > 0, "{entry:?}");
    victim.assert_healthy("a driver that was stopped");
}

fn take_snapshot(victim: &mut Victim, dir: &Path, track: bool) {
    victim.guest.agent().disconnect();
    victim.ask(&Request::Snapshot {
        dir: dir.to_owned(),
        parent: None,
        track,
        stop: false,
    });
}

/// What is isolated, with what may be reset when its restart has failed.
fn may_reset(may_reset_guest: MayReset) -> LadderConfig {
    LadderConfig {
        on_fault: Some(OnFault::Restart),
        may_reset_guest,
        ..LadderConfig::default()
    }
}

/// Exchanges the driver for one that cannot be removed, and has a call of it fail, which asks for
/// its restart; what becomes of that.
fn fail_to_restart(victim: &mut Victim) -> LadderStatus {
    let stays = that_stays(another_build(0xb1));
    let report = victim.upgrade(DRIVER, stays.clone(), 60_000).unwrap();
    is_new(victim, &report);
    assert_eq!(hex(&victim.loaded_build()), hex(&build_of(&stays)));
    victim.inject(ENTRY, 5, FaultKind::NullDereference, 1, 1);
    victim.try_command(&["ethtool", "-S", "eth0"]);
    victim.wait_until_running()
}

/// The driver that was there before is back, isolated, and works.
fn is_back(victim: &mut Victim) {
    assert_eq!(hex(&victim.loaded_build()), hex(&build_of(&stock(DRIVER))));
    assert_eq!(victim.isolated(), [ENTRY]);
    network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
    victim.ping();
    let statistics = victim.run(&["ethtool", "-S", "eth0"]);
    assert!(statistics.contains("rx_packets"), "{statistics}");
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_guest_that_has_a_snapshot_in_a_directory_and_no_mark_goes_back_to_it_without_a_boot() {
    let folder = tempfile::tempdir().unwrap();
    goes_back_to_its_snapshot(victim(), folder.path(), true);
}

fn goes_back_to_its_snapshot(mut victim: Victim, folder: &Path, track: bool) {
    let first = boot_id(&mut victim.guest);
    victim.isolate(ENTRY, may_reset(MayReset::Snapshot));
    victim.run(&["sh", "-c", "echo before > /tmp/when"]);
    take_snapshot(&mut victim, &folder.join("s"), track);
    victim.run(&["sh", "-c", "echo behind > /tmp/when"]);
    let ladder = fail_to_restart(&mut victim);
    let rungs = &ladder.rungs;
    let counts = (rungs.failed_restarts, rungs.rewinds, rungs.resets);
    assert_eq!(counts, (1, 1, 0), "{ladder:?}");
    // It is the guest that was saved, and it has not booted.
    assert_eq!(boot_id(&mut victim.guest), first);
    assert_eq!(victim.run(&["cat", "/tmp/when"]).trim(), "before");
    is_back(&mut victim);
    victim.assert_healthy("a guest that is back at its snapshot");
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    /// The device's memory and state, which are elsewhere, go back too.
    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_guest_with_a_nic_of_a_device_host_goes_back_to_its_snapshot_without_a_boot() {
        let folder = tempfile::tempdir().unwrap();
        let options = options().among(folder.path(), "left");
        let words = ["--model", "e1000", "--net", "user"];
        let host = DeviceHost::start(&options.program, folder.path(), &words).unwrap();
        let network =
            format!("--nic device={NAME} --append cofferdam.net=e1000,10.0.2.15/24,10.0.2.2");
        let victim = Victim::of(boot(&options.with(&network)));
        goes_back_to_its_snapshot(victim, folder.path(), false);
        assert_eq!(host.status().unwrap().contexts.len(), 1);
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_new_driver_that_fails_and_cannot_be_removed_is_said_to_need_a_reset() {
        let mut victim = victim();
        let first = boot_id(&mut victim.guest);
        victim.isolate(ENTRY, LadderConfig::default());
        let bad = that_stays(without_the_device());
        let report = victim.upgrade(DRIVER, bad.clone(), 2000).unwrap();
        assert_eq!(report.outcome, UpgradeOutcome::Neither);
        let [new, old] = report.problems.as_slice() else {
            panic!("{report:?}");
        };
        assert!(new.contains("eth0 does not come back"), "{new}");
        assert!(old.contains("the new one cannot be removed"), "{old}");
        assert_eq!(report.isolated, 0);
        // The guest goes on without its NIC.
        assert_eq!(hex(&victim.loaded_build()), hex(&build_of(&bad)));
        assert_eq!(victim.isolated(), [""; 0]);
        let interfaces = victim.guest.agent().interfaces().unwrap();
        assert!(interfaces.iter().all(|one| one.name != "eth0"));

        victim.ask(&Request::Reset {});
        victim.guest.agent().disconnect();
        victim.guest.wait_for_agent(BOOT_TIME).unwrap();
        assert_ne!(boot_id(&mut victim.guest), first);
        network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
        victim.ping();
        assert_eq!(hex(&victim.loaded_build()), hex(&build_of(&stock(DRIVER))));
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_driver_that_cannot_be_restarted_has_the_guest_reset_where_that_is_allowed() {
        the_guest_is_reset(MayReset::Boot, |_| {});
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_guest_that_has_neither_a_mark_nor_a_snapshot_boots() {
        the_guest_is_reset(MayReset::Snapshot, |_| {});
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_guest_whose_last_snapshot_is_gone_boots() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("s");
        the_guest_is_reset(MayReset::Snapshot, |victim| {
            take_snapshot(victim, &dir, true);
            std::fs::remove_dir_all(&dir).unwrap();
        });
    }

    /// Has the driver fail in a guest that was made ready with `before`, when it cannot be
    /// restarted.
    fn the_guest_is_reset(may_reset_guest: MayReset, before: impl FnOnce(&mut Victim)) {
        let mut victim = victim();
        let first = boot_id(&mut victim.guest);
        victim.isolate(ENTRY, may_reset(may_reset_guest));
        before(&mut victim);
        let ladder = fail_to_restart(&mut victim);
        let rungs = &ladder.rungs;
        // There is nothing to go back to: the rung is tried, and the next one taken.
        let tried = u64::from(may_reset_guest == MayReset::Snapshot);
        assert_eq!(
            (
                rungs.restarts,
                rungs.failed_restarts,
                rungs.rewinds,
                rungs.resets
            ),
            (1, 1, tried, 1),
            "{ladder:?}"
        );
        assert_ne!(boot_id(&mut victim.guest), first);
        is_back(&mut victim);
    }
}
