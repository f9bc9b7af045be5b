//! Resume, restart and reset of a guest that is a double.

use std::sync::Arc;

use super::*;
use crate::asker::Nobody;
use crate::double::{DRIVER, Double, come_to_rest, request};
use crate::ladder::{Decision, Fault, LadderConfig, LadderStatus, MayReset, OnFault, State};

/// A supervisor whose driver is isolated, and its guest with nothing written down yet.
fn isolated(may_reset_guest: MayReset) -> (Arc<Supervisor<Double>>, Double) {
    let guest = Double::new();
    let supervisor = Supervisor::start(guest.clone()).unwrap();
    let config = LadderConfig {
        on_fault: Some(OnFault::Restart),
        may_reset_guest,
        ..LadderConfig::default()
    };
    supervisor.isolate(request(), config, &Nobody).unwrap();
    guest.world().done.clear();
    (supervisor, guest)
}

/// A call fails, and what the ladder decides is carried out.
fn fail(supervisor: &Supervisor<Double>, device_lost: bool) {
    let ladder = supervisor.ladder(DRIVER).unwrap();
    let decision = lock(&ladder).fault(&Fault {
        entry: "xmit",
        attempts: 1,
        unheard: false,
        half_done: false,
        device_lost,
        out_of_time: false,
        in_a_row: false,
        now_ns: 0,
    });
    assert!(matches!(decision, Decision::Restart | Decision::Resume));
    let resume = decision == Decision::Resume;
    let turn = supervisor.change_driver();
    recover(supervisor, DRIVER, resume, &ladder, &turn);
}

fn status(supervisor: &Supervisor<Double>) -> LadderStatus {
    let (module, status) = supervisor.status().pop().unwrap();
    assert_eq!(module, DRIVER);
    status
}

/// As `isolated`, with a ladder that resumes the device first.
fn resuming() -> (Arc<Supervisor<Double>>, Double) {
    let guest = Double::new();
    let supervisor = Supervisor::start(guest.clone()).unwrap();
    let config = LadderConfig {
        on_fault: Some(OnFault::Resume),
        ..LadderConfig::default()
    };
    supervisor.isolate(request(), config, &Nobody).unwrap();
    guest.world().done.clear();
    (supervisor, guest)
}

#[test]
fn a_restart_gives_configuration_and_isolation_back() {
    let (supervisor, guest) = isolated(MayReset::No);
    fail(&supervisor, false);
    let world = guest.world();
    assert_eq!(
        world.done,
        [
            "release",
            "remove",
            "insert /lib/modules/6.1/kernel/driver.ko",
            "look for eth0",
            "mtu 1400",
            "up",
            "isolate"
        ]
    );
    assert!(world.policy.is_some() && world.up);
    assert_eq!((world.mtu, world.agents), (1400, 0));
    drop(world);
    let status = status(&supervisor);
    assert_eq!(status.state, State::Running);
    assert_eq!(
        (status.rungs.restarts, status.rungs.failed_restarts),
        (1, 0)
    );
}

#[test]
fn the_ladder_remembers_over_restarts() {
    let (supervisor, _guest) = isolated(MayReset::No);
    for _ in 0..3 {
        fail(&supervisor, false);
    }
    assert_eq!(status(&supervisor).rungs.restarts, 3);
}

#[test]
fn an_interface_that_does_not_come_back_is_not_waited_for_without_end() {
    let (supervisor, guest) = isolated(MayReset::No);
    guest.world().fails = |step, _| step == "look for eth0";
    fail(&supervisor, false);
    let why = status(&supervisor).gave_up.unwrap();
    assert!(why.contains("eth0 does not come back"), "{why}");
    let waited = guest.world().now;
    assert!(waited >= STEP_TIME && waited < STEP_TIME * 2, "{waited:?}");
}

#[test]
fn a_restart_that_fails_where_the_guest_may_not_be_reset_stops_the_driver() {
    for fails in [
        (|step, _| step == "mtu 1400") as fn(&str, usize) -> bool,
        |step, _| step.starts_with("insert"),
        |step, before| step == "isolate" && before == 0,
    ] {
        let (supervisor, guest) = isolated(MayReset::No);
        guest.world().fails = fails;
        fail(&supervisor, false);
        let status = status(&supervisor);
        assert_eq!(status.state, State::Stopped, "{status:?}");
        assert_eq!((status.rungs.resets, status.rungs.stops), (0, 1));
        let why = status.gave_up.unwrap();
        assert!(why.contains("could not be restarted"), "{why}");
        assert!(why.contains("refused") || why.contains("mtu"), "{why}");
        assert_eq!(guest.count("reset"), 0);
        // Of a driver that is not there no call can be run.
        let world = guest.world();
        assert!(world.stopped || world.loaded.is_none());
    }
}

#[test]
fn a_restart_that_fails_resets_a_guest_that_may_be() {
    let (supervisor, guest) = isolated(MayReset::Boot);
    guest.world().fails = |step, _| step.starts_with("insert");
    fail(&supervisor, false);
    let done = guest.world().done.clone();
    assert_eq!(done[done.len() - 3..], ["reset", "boot", "isolate"]);
    let status = status(&supervisor);
    assert_eq!((status.state, status.rungs.resets), (State::Running, 1));
    assert!(guest.world().policy.is_some());
}

#[test]
fn a_guest_that_cannot_be_reset_or_does_not_boot_has_its_driver_stopped() {
    for boots in [true, false] {
        let (supervisor, guest) = isolated(MayReset::Boot);
        guest.world().fails = match boots {
            true => |step, _| step.starts_with("insert") || step == "reset",
            false => |step, _| step.starts_with("insert") || step == "boot",
        };
        fail(&supervisor, false);
        let status = status(&supervisor);
        assert_eq!((status.state, status.rungs.stops), (State::Stopped, 1));
        assert!(status.gave_up.unwrap().contains("refused"));
    }
}

#[test]
fn a_device_is_resumed_without_touching_the_driver() {
    let (supervisor, guest) = resuming();
    fail(&supervisor, false);
    let done = guest.world().done.join("; ");
    assert!(
        done.starts_with("begin suspend; write /sys/bus/pci/devices/0000:00:02.0/"),
        "{done}"
    );
    assert!(done.ends_with("; end suspend"), "{done}");
    let status = status(&supervisor);
    assert_eq!((status.state, status.rungs.resumes), (State::Running, 1));
}

#[test]
fn a_resume_that_fails_restarts_the_driver() {
    let (supervisor, guest) = resuming();
    guest.world().fails = |step, _| step == "end suspend";
    fail(&supervisor, false);
    let status = status(&supervisor);
    assert_eq!(status.state, State::Running);
    assert_eq!((status.rungs.failed_resumes, status.rungs.restarts), (1, 1));
    assert_eq!(guest.world().done.last().unwrap(), "isolate");
}

#[test]
fn how_long_each_rung_took_is_counted_by_how_it_ended() {
    let counts = |supervisor: &Supervisor<Double>| {
        let times = status(supervisor).times;
        let all = times.each().map(|(rung, times)| (rung, times.count()));
        all.into_iter()
            .filter(|(_, count)| *count > 0)
            .collect::<Vec<_>>()
    };
    let (supervisor, guest) = resuming();
    fail(&supervisor, false);
    assert_eq!(counts(&supervisor), [("resume", 1)]);
    guest.world().fails = |step, _| step == "end suspend";
    fail(&supervisor, false);
    let expected = [("resume", 1), ("failed_resume", 1), ("restart", 1)];
    assert_eq!(counts(&supervisor), expected);

    let (supervisor, guest) = isolated(MayReset::Boot);
    guest.world().fails = |step, _| step == "look for eth0";
    let before = guest.now();
    fail(&supervisor, false);
    let took = guest.now() - before;
    let expected = [("failed_restart", 1), ("reset", 1)];
    assert_eq!(counts(&supervisor), expected);
    let times = status(&supervisor).times;
    let failed = times.each().into_iter();
    let sum: u64 = failed.map(|(_, times)| times.sum_ns()).sum();
    assert!(took >= STEP_TIME, "{took:?}");
    assert_eq!(Duration::from_nanos(sum), took);
}

/// A guest with a mark at which the driver is isolated, or not, and whose driver cannot be inserted
/// any more.
fn with_mark(is_isolated: bool) -> (Arc<Supervisor<Double>>, Double) {
    let (supervisor, guest) = isolated(MayReset::Snapshot);
    let request = supervisor.request(DRIVER).unwrap();
    if !is_isolated {
        supervisor.release(DRIVER).unwrap();
    }
    come_to_rest(&supervisor);
    let kept = supervisor.keep_ladders();
    supervisor.end_rest();
    if !is_isolated {
        let config = LadderConfig {
            on_fault: Some(OnFault::Restart),
            may_reset_guest: MayReset::Snapshot,
            ..LadderConfig::default()
        };
        supervisor.isolate(request, config, &Nobody).unwrap();
    }
    let weak = Arc::downgrade(&supervisor);
    let mut world = guest.world();
    world.fails = |step, _| step.starts_with("insert");
    world.done.clear();
    world.mark = Some(Arc::new(move |guest: &Double| {
        let supervisor = weak.upgrade().unwrap();
        // As the machine does it.
        come_to_rest(&supervisor);
        guest.world().loaded = Some(crate::double::build(1));
        supervisor.put_ladders_back(&kept).unwrap();
        supervisor.end_rest();
    }));
    drop(world);
    (supervisor, guest)
}

#[test]
fn a_restart_that_fails_has_the_guest_go_back_to_its_mark_and_boot_if_it_fails_again() {
    let (supervisor, guest) = with_mark(true);
    fail(&supervisor, false);
    let went_back = status(&supervisor);
    assert_eq!((went_back.state, went_back.gave_up), (State::Running, None));
    assert_eq!((went_back.rungs.rewinds, went_back.rungs.resets), (1, 0));
    assert_eq!(guest.world().done.last().unwrap(), "go back");
    assert_eq!(guest.count("reset"), 0);
    fail(&supervisor, false);
    let booted = status(&supervisor);
    assert_eq!((booted.rungs.rewinds, booted.rungs.resets), (1, 1));
    let done = guest.world().done.clone();
    assert_eq!(done[done.len() - 3..], ["reset", "boot", "isolate"]);
}

#[test]
fn a_driver_that_was_not_isolated_at_the_mark_is_isolated_again_in_the_guest_that_went_back() {
    let (supervisor, guest) = with_mark(false);
    fail(&supervisor, false);
    let status = status(&supervisor);
    assert_eq!((status.state, status.rungs.rewinds), (State::Running, 1));
    let done = guest.world().done.clone();
    assert_eq!(done[done.len() - 2..], ["go back", "isolate"]);
}

#[test]
fn a_guest_without_a_mark_goes_back_to_its_snapshot_with_the_driver_isolated_and_boots_if_it_fails_again()
 {
    let (supervisor, guest) = isolated(MayReset::Snapshot);
    guest.world().fails = |step, _| step.starts_with("insert");
    guest.world().has_snapshot = true;
    fail(&supervisor, false);
    let went_back = status(&supervisor);
    assert_eq!((went_back.state, went_back.gave_up), (State::Running, None));
    assert_eq!((went_back.rungs.rewinds, went_back.rungs.resets), (1, 0));
    let done = guest.world().done.clone();
    assert_eq!(done[done.len() - 3..], ["go back", "boot", "isolate"]);
    assert!(guest.world().policy.is_some());
    fail(&supervisor, false);
    assert_eq!(status(&supervisor).rungs.resets, 1);
}

#[test]
fn a_guest_that_does_not_answer_back_at_its_snapshot_boots() {
    let (supervisor, guest) = isolated(MayReset::Snapshot);
    guest.world().has_snapshot = true;
    guest.world().fails =
        |step, before| step.starts_with("insert") || step == "boot" && before == 0;
    fail(&supervisor, false);
    let status = status(&supervisor);
    assert_eq!((status.state, status.rungs.resets), (State::Running, 1));
}

#[test]
fn a_guest_without_a_mark_boots() {
    let (supervisor, guest) = isolated(MayReset::Snapshot);
    guest.world().fails = |step, _| step.starts_with("insert");
    fail(&supervisor, false);
    let status = status(&supervisor);
    assert_eq!((status.state, status.rungs.resets), (State::Running, 1));
    let done = guest.world().done.clone();
    assert_eq!(
        done[done.len() - 4..],
        ["go back", "reset", "boot", "isolate"]
    );
}
