//! Supervisors of a double at rest and after rewinds.

use std::time::Duration;

use super::*;
use crate::asker::Nobody;
use crate::double::{DRIVER, Double, come_to_rest, request};
use crate::ladder::{LadderConfig, OnFault};

fn config(recoveries_per_minute: u32) -> LadderConfig {
    LadderConfig {
        on_fault: Some(OnFault::Error),
        recoveries_per_minute,
        ..LadderConfig::default()
    }
}

fn isolated(config: LadderConfig) -> (Arc<Supervisor<Double>>, Double) {
    let guest = Double::new();
    let supervisor = Supervisor::start(guest.clone()).unwrap();
    supervisor.isolate(request(), config, &Nobody).unwrap();
    (supervisor, guest)
}

/// Keeps as at a mark.
fn mark(supervisor: &Supervisor<Double>) -> Kept {
    come_to_rest(supervisor);
    let kept = supervisor.keep_ladders();
    supervisor.end_rest();
    kept
}

fn rewind(supervisor: &Supervisor<Double>, kept: &Kept) {
    come_to_rest(supervisor);
    supervisor.put_ladders_back(kept).unwrap();
    supervisor.end_rest();
}

#[test]
fn faults_since_a_mark_do_not_count_after_the_rewind_but_are_told() {
    let (supervisor, guest) = isolated(config(3));
    guest.fail();
    let kept = mark(&supervisor);
    for round in 1..=10 {
        // The fourth within a minute stops the driver.
        for _ in 0..4 {
            guest.fail();
        }
        let (_, status) = supervisor.status().pop().unwrap();
        assert_eq!(status.state, State::Stopped);
        rewind(&supervisor, &kept);
        let (_, status) = supervisor.status().pop().unwrap();
        assert_eq!((status.state, status.gave_up), (State::Running, None));
        assert_eq!(status.rungs.stops, round);
    }
}

#[test]
fn what_is_isolated_and_the_files_of_drivers_are_those_of_the_mark() {
    let (supervisor, guest) = isolated(config(600));
    let kept = mark(&supervisor);
    let file = crate::double::build(2);
    let limit = Duration::from_secs(5);
    supervisor.upgrade(DRIVER, &file, limit, &Nobody).unwrap();
    assert!(supervisor.driver_file(DRIVER).is_some());
    supervisor.release(DRIVER).unwrap();
    guest.world().learnt = 2;
    rewind(&supervisor, &kept);
    assert_eq!(supervisor.driver_file(DRIVER), None);
    assert!(supervisor.ladder(DRIVER).is_some());
    assert_eq!(guest.world().learnt, 1);
    let none = isolated(config(600)).0;
    none.release(DRIVER).unwrap();
    let kept = mark(&none);
    none.isolate(request(), config(600), &Nobody).unwrap();
    rewind(&none, &kept);
    assert!(none.status().is_empty());
}

#[test]
fn there_is_no_rest_while_a_driver_is_exchanged_and_no_exchange_at_rest() {
    let (supervisor, _guest) = isolated(config(600));
    let alone = supervisor.change_driver();
    let refused = supervisor.come_to_rest().unwrap_err();
    assert!(
        refused.soon && refused.reason.contains("exchanged"),
        "{refused:?}"
    );
    drop(alone);
    come_to_rest(&supervisor);
    let limit = Duration::from_secs(5);
    let file = crate::double::build(2);
    std::thread::scope(|scope| {
        let upgrading = scope.spawn(|| supervisor.upgrade(DRIVER, &file, limit, &Nobody).unwrap());
        supervisor.end_rest();
        upgrading.join().unwrap();
    });
}

#[test]
fn there_is_no_rest_with_a_rung_to_be_climbed() {
    let guest = Double::new();
    let (supervisor, asked) = Supervisor::new(guest.clone());
    let config = LadderConfig {
        on_fault: Some(OnFault::Restart),
        ..LadderConfig::default()
    };
    supervisor.isolate(request(), config, &Nobody).unwrap();
    guest.fail();
    let refused = supervisor.come_to_rest().unwrap_err();
    assert!(refused.soon && refused.reason.contains("`driver` is about to be restarted"));
    while let Ok(request) = asked.try_recv() {
        crate::rungs::climb(&supervisor, &request);
    }
    come_to_rest(&supervisor);
}

#[test]
fn what_is_isolated_is_told_so_that_it_can_be_isolated_again() {
    let (supervisor, guest) = isolated(config(7));
    for _ in 0..8 {
        guest.fail();
    }
    let told = serde_json::to_string(&supervisor.isolated()).unwrap();
    let modules: Vec<IsolatedModule> = serde_json::from_str(&told).unwrap();
    let restored = Double::new();
    let other = Supervisor::start(restored.clone()).unwrap();
    let again = other.isolate_as_told(modules, &Nobody);
    assert!(again.is_empty(), "{again:?}");
    assert_eq!(other.isolated(), supervisor.isolated());
    assert!(restored.world().stopped, "as the other one was");
    assert_eq!(other.status()[0].1.state, State::Stopped);
    // Where it does not work, that is told.
    let restored = Double::new();
    restored.world().fails = |step, _| step == "isolate";
    let other = Supervisor::start(restored.clone()).unwrap();
    let failed = other.isolate_as_told(supervisor.isolated(), &Nobody);
    assert_eq!(failed[0].0, DRIVER);
    assert_eq!(other.status()[0].1.state, State::Unisolated);
}
