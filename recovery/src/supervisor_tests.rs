//! Rungs that take time, climbed for a double of a guest.

use std::time::Duration;

use super::*;
use crate::double::{DRIVER, Double, request};
use crate::ladder::{OnFault, State};
use crate::rungs::climb;

fn restarting() -> LadderConfig {
    LadderConfig {
        on_fault: Some(OnFault::Restart),
        ..LadderConfig::default()
    }
}

/// A supervisor of a guest with the module isolated, and what is asked of it.
fn supervised(guest: &Double) -> (Supervisor<Double>, Receiver<RungRequest>) {
    let (supervisor, asked) = Supervisor::new(guest.clone());
    supervisor
        .isolate(request(), restarting(), &Nobody)
        .unwrap();
    (supervisor, asked)
}

/// Climbs what is asked for, and how the ladder stands afterwards.
fn climb_all(supervisor: &Supervisor<Double>, asked: &Receiver<RungRequest>) -> LadderStatus {
    while let Ok(request) = asked.try_recv() {
        climb(supervisor, &request);
    }
    let mut all = supervisor.status();
    assert_eq!(all.len(), 1);
    all.remove(0).1
}

#[test]
fn a_driver_is_restarted_and_isolated_again() {
    let guest = Double::new();
    let (supervisor, asked) = supervised(&guest);
    assert_eq!(guest.fail(), AfterFault::ReturnError);
    let ladder = climb_all(&supervisor, &asked);
    assert_eq!((ladder.state, ladder.rungs.restarts), (State::Running, 1));
    assert_eq!(guest.count("remove"), 1);
    let world = guest.world();
    assert_eq!((world.policy.is_some(), world.stopped), (true, false));
}

#[test]
fn a_domain_that_failed_has_its_driver_restarted_whatever_else_was_chosen() {
    let guest = Double::new();
    let (supervisor, asked) = Supervisor::new(guest.clone());
    let config = LadderConfig {
        on_fault: Some(OnFault::Retry),
        ..LadderConfig::default()
    };
    supervisor.isolate(request(), config, &Nobody).unwrap();
    guest.world().domain_fails = true;
    assert_eq!(guest.fail(), AfterFault::ReturnError);
    let ladder = climb_all(&supervisor, &asked);
    assert_eq!((ladder.state, ladder.rungs.restarts), (State::Running, 1));
    assert_eq!((guest.count("remove"), guest.count("isolate")), (1, 2));
}

#[test]
fn a_driver_that_cannot_be_removed_is_isolated_again_and_stopped() {
    let guest = Double::new();
    let (supervisor, asked) = supervised(&guest);
    guest.world().fails = |step, _| step == "remove";
    guest.fail();
    let ladder = climb_all(&supervisor, &asked);
    assert_eq!(ladder.state, State::Stopped, "{ladder:?}");
    let world = guest.world();
    assert_eq!((world.policy.is_some(), world.stopped), (true, true));
}

#[test]
fn a_driver_that_cannot_be_isolated_again_is_said_to_run_unisolated() {
    let guest = Double::new();
    let (supervisor, asked) = supervised(&guest);
    guest.world().fails = |step, _| step == "isolate";
    guest.fail();
    let ladder = climb_all(&supervisor, &asked);
    assert_eq!(ladder.state, State::Unisolated, "{ladder:?}");
    assert!(
        ladder
            .gave_up
            .is_some_and(|why| why.contains("isolate: refused"))
    );
    // It can be given up, and isolated anew once that works.
    assert!(supervisor.release(DRIVER).is_err());
    assert_eq!(supervisor.status().len(), 0);
    guest.world().fails = |_, _| false;
    supervisor
        .isolate(request(), restarting(), &Nobody)
        .unwrap();
    assert_eq!(supervisor.status()[0].1.state, State::Running);
}

#[test]
fn a_driver_that_is_gone_is_stopped() {
    let guest = Double::new();
    let (supervisor, asked) = supervised(&guest);
    guest.world().fails = |step, _| step == "remove";
    guest.fail();
    guest.world().loaded = None;
    assert_eq!(climb_all(&supervisor, &asked).state, State::Stopped);
}

#[test]
fn a_call_that_fails_as_soon_as_there_are_gates_has_its_rung_climbed() {
    let guest = Double::new();
    guest.world().fails_at_once = true;
    let supervisor = Supervisor::start(guest.clone()).unwrap();
    supervisor
        .isolate(request(), restarting(), &Nobody)
        .unwrap();
    while supervisor.status()[0].1.state != State::Running {
        std::thread::yield_now();
    }
    assert_eq!(guest.count("remove"), 1);
}

#[test]
fn what_a_ladder_asked_for_that_is_not_there_any_more_is_not_done() {
    let guest = Double::new();
    let (supervisor, asked) = supervised(&guest);
    guest.fail();
    supervisor.release(DRIVER).unwrap();
    supervisor
        .isolate(request(), restarting(), &Nobody)
        .unwrap();
    assert_eq!(climb_all(&supervisor, &asked).state, State::Running);
    assert_eq!(guest.count("remove"), 0);
}

/// Somebody who goes away when told so many things.
struct Leaving(std::cell::Cell<usize>);

impl Asker for Leaving {
    fn tell(&self, _what: &str) -> Result<(), Gone> {
        let left = self.0.get().checked_sub(1).ok_or(Gone)?;
        self.0.set(left);
        Ok(())
    }
}

#[test]
fn what_nobody_waits_for_any_more_is_not_isolated() {
    let guest = Double::new();
    let (supervisor, _asked) = Supervisor::new(guest.clone());
    let error = supervisor.isolate(request(), restarting(), &Leaving(0.into()));
    assert!(error.unwrap_err().is::<Gone>());
    assert_eq!(guest.count("isolate"), 0);
    assert_eq!(supervisor.status().len(), 0);
}

#[test]
fn an_upgrade_whose_asker_goes_is_not_begun_or_carried_out_to_its_end() {
    let mut ends = [0, 0];
    for told in 0..6 {
        let guest = Double::new();
        let (supervisor, _asked) = supervised(&guest);
        let limit = Duration::from_secs(5);
        let file = crate::double::build(2);
        let report = supervisor.upgrade(DRIVER, &file, limit, &Leaving(told.into()));
        let world = guest.world();
        assert!(world.policy.is_some(), "after {told}");
        let loaded = if report.is_ok() {
            file
        } else {
            crate::double::build(1)
        };
        assert_eq!(world.loaded, Some(loaded), "after {told}");
        ends[usize::from(report.is_ok())] += 1;
    }
    assert!(ends[0] > 0 && ends[1] > 0, "{ends:?}");
}

/// By the rung that fails last, and by the ladder itself.
#[test]
fn a_driver_that_is_given_up_is_so_until_it_is_taken_up_again() {
    type Again = fn(&Supervisor<Double>);
    let ways: [(Again, bool); 4] = [
        (|supervisor| drop(supervisor.release(DRIVER).unwrap()), true),
        (|supervisor| supervisor.guest_was_reset(), true),
        (
            |supervisor| {
                supervisor.driver_came_from(DRIVER, "/x");
                supervisor.tell_given_up(DRIVER);
            },
            true,
        ),
        (|supervisor| drop(supervisor.status()), false),
    ];
    for (again, ends) in ways {
        for at_once in [false, true] {
            let guest = Double::new();
            let (supervisor, asked) = Supervisor::new(guest.clone());
            let config = match at_once {
                true => LadderConfig {
                    on_fault: Some(OnFault::Restart),
                    recoveries_per_minute: 1,
                    ..LadderConfig::default()
                },
                false => restarting(),
            };
            supervisor.isolate(request(), config, &Nobody).unwrap();
            if at_once {
                guest.fail();
                assert_eq!(climb_all(&supervisor, &asked).state, State::Running);
                assert!(!guest.world().given_up);
                assert_eq!(guest.fail(), AfterFault::Stop);
                // Said by another thread than the vCPU's.
                assert!(!guest.world().given_up);
            } else {
                guest.world().fails = |step, _| step == "remove";
                guest.fail();
            }
            assert_eq!(climb_all(&supervisor, &asked).state, State::Stopped);
            assert!(guest.world().given_up);
            again(&supervisor);
            while let Ok(request) = asked.try_recv() {
                climb(&supervisor, &request);
            }
            assert_eq!(guest.world().given_up, !ends);
        }
    }
}

/// What a ladder has said of a module that was released since is not said of the module.
#[test]
fn a_driver_that_was_released_before_it_was_said_to_be_given_up_is_not() {
    let guest = Double::new();
    let (supervisor, asked) = Supervisor::new(guest.clone());
    let config = LadderConfig {
        recoveries_per_minute: 0,
        ..restarting()
    };
    supervisor.isolate(request(), config, &Nobody).unwrap();
    assert_eq!(guest.fail(), AfterFault::Stop);
    supervisor.release(DRIVER).unwrap();
    while let Ok(request) = asked.try_recv() {
        climb(&supervisor, &request);
    }
    assert!(!guest.world().given_up);
}

/// Whoever hears of it may give a device to the guest, whose driver has to take it over then.
#[test]
fn who_isolates_or_exchanges_a_driver_says_so_when_others_may_change_drivers() {
    let guest = Double::new();
    let (supervisor, _asked) = supervised(&guest);
    let supervisor = Arc::new(supervisor);
    let (own, taken) = (
        Arc::downgrade(&supervisor),
        Arc::<Mutex<Vec<bool>>>::default(),
    );
    let said = taken.clone();
    guest.world().told = Some(Arc::new(move |_| {
        let own = own.upgrade().unwrap();
        said.lock().unwrap().push(own.turn.try_take().is_some());
    }));
    lock(&supervisor.given_up).insert(DRIVER.to_owned());
    guest.world().policy = None;
    supervisor
        .isolate(request(), restarting(), &Nobody)
        .unwrap();
    lock(&supervisor.given_up).insert(DRIVER.to_owned());
    let file = crate::double::build(2);
    let limit = Duration::from_secs(5);
    supervisor.upgrade(DRIVER, &file, limit, &Nobody).unwrap();
    assert_eq!(*taken.lock().unwrap(), [true, true]);
    assert!(!guest.world().given_up);
}
