//! The ladder alone, and against a model that looks at the whole history at each step.

mod model;

use super::rows::HANG;
use super::*;

fn config(on_fault: OnFault) -> LadderConfig {
    LadderConfig {
        on_fault: Some(on_fault),
        ..LadderConfig::default()
    }
}

fn fault(entry: &str, attempts: u32, now_ns: u64) -> Fault<'_> {
    Fault {
        entry,
        attempts,
        unheard: false,
        half_done: false,
        device_lost: false,
        out_of_time: false,
        in_a_row: false,
        now_ns,
    }
}

#[test]
fn who_can_be_told_of_an_error_is_and_who_cannot_gets_another_try() {
    let mut ladder = Ladder::new(LadderConfig::default());
    assert_eq!(
        ladder.fault(&fault("ndo_start_xmit", 1, 0)),
        Decision::Error
    );
    let void = |attempts| Fault {
        unheard: true,
        ..fault("watchdog", attempts, 0)
    };
    let decided: Vec<Decision> = (1..=3).map(|n| ladder.fault(&void(n))).collect();
    assert_eq!(decided, [Decision::Retry, Decision::Retry, Decision::Error]);
    let rungs = ladder.status().rungs;
    assert_eq!((rungs.errors, rungs.retries), (2, 2));
}

#[test]
fn a_call_that_was_half_done_has_its_driver_restarted_whatever_else_was_chosen() {
    for (chosen, decision) in [
        (OnFault::Error, Decision::Restart),
        (OnFault::Retry, Decision::Restart),
        (OnFault::Resume, Decision::Restart),
        (OnFault::Stop, Decision::Stop),
    ] {
        let mut ladder = Ladder::new(config(chosen));
        let half_done = Fault {
            half_done: true,
            ..fault("set_ringparam", 1, 0)
        };
        assert_eq!(ladder.fault(&half_done), decision);
    }
}

#[test]
fn a_device_that_is_lost_is_resumed_and_one_that_is_lost_again_has_its_driver_restarted() {
    let lost = |now_ns| Fault {
        device_lost: true,
        ..fault("f", 1, now_ns)
    };
    let mut ladder = Ladder::new(LadderConfig::default());
    assert_eq!(ladder.fault(&lost(0)), Decision::Resume);
    assert_eq!(ladder.status().state, State::Resuming);
    // Calls meanwhile, one of which finds the device gone too.
    assert_eq!(ladder.fault(&fault("f", 1, 1)), Decision::Error);
    assert_eq!(ladder.resumed(Ok(())), Next::Nothing);
    assert_eq!(ladder.status().state, State::Running);
    assert_eq!(ladder.fault(&lost(MINUTE_NS - 1)), Decision::Restart);
    assert_eq!(ladder.restarted(Ok(())), Next::Nothing);
    assert_eq!(ladder.fault(&lost(2 * MINUTE_NS)), Decision::Resume);
    let rungs = ladder.status().rungs;
    assert_eq!(
        (rungs.resumes, rungs.failed_resumes, rungs.restarts),
        (2, 0, 1)
    );
}

#[test]
fn a_resume_that_fails_leads_to_a_restart() {
    let mut ladder = Ladder::new(config(OnFault::Resume));
    assert_eq!(ladder.fault(&fault("f", 1, 0)), Decision::Resume);
    assert_eq!(ladder.resumed(Err("no such functions")), Next::Restart);
    assert_eq!(ladder.status().state, State::Restarting);
    assert_eq!(ladder.restarted(Ok(())), Next::Nothing);
    let rungs = ladder.status().rungs;
    assert_eq!((rungs.failed_resumes, rungs.restarts), (1, 1));
}

#[test]
fn what_is_said_for_one_entry_goes_before_what_is_said_for_all() {
    let mut config = config(OnFault::Retry);
    config.per_entry.insert("open".to_owned(), OnFault::Restart);
    let mut ladder = Ladder::new(config);
    assert_eq!(ladder.fault(&fault("close", 1, 0)), Decision::Retry);
    assert_eq!(ladder.fault(&fault("open", 1, 0)), Decision::Restart);
}

#[test]
fn more_faults_than_allowed_in_a_minute_stop_the_driver_for_good() {
    let limited = LadderConfig {
        recoveries_per_minute: 3,
        ..config(OnFault::Error)
    };
    let mut ladder = Ladder::new(limited.clone());
    for now in [0, 1, 2] {
        assert_eq!(ladder.fault(&fault("f", 1, now)), Decision::Error);
    }
    assert_eq!(ladder.fault(&fault("f", 1, 3)), Decision::Stop);
    let why = ladder.status().gave_up.clone().unwrap();
    assert!(why.contains("more than 3"), "{why}");
    assert_eq!(ladder.fault(&fault("f", 1, 9 * MINUTE_NS)), Decision::Stop);
    assert_eq!(ladder.status().rungs.stops, 1);
    // The same number spread over more time is no reason.
    let mut ladder = Ladder::new(limited);
    for minute in 0..10 {
        let now = minute * MINUTE_NS / 3;
        assert_eq!(ladder.fault(&fault("f", 1, now)), Decision::Error);
    }
}

#[test]
fn a_restart_that_fails_leads_to_a_reset_only_where_that_is_allowed() {
    for (may_reset_guest, next, state) in [
        (MayReset::Boot, Next::Reset, State::Resetting),
        (MayReset::Snapshot, Next::GoBack, State::Resetting),
        (MayReset::No, Next::Stop, State::Stopped),
    ] {
        let mut ladder = Ladder::new(LadderConfig {
            may_reset_guest,
            ..config(OnFault::Restart)
        });
        assert_eq!(ladder.fault(&fault("f", 1, 0)), Decision::Restart);
        // Calls of the driver on its way out.
        assert_eq!(ladder.fault(&fault("f", 1, 1)), Decision::Error);
        assert_eq!(ladder.restarted(Err("busy")), next);
        assert_eq!(ladder.status().state, state);
        assert_eq!(ladder.status().rungs.failed_restarts, 1);
        assert_eq!(ladder.status().rungs.restarts, 1);
    }
}

#[test]
fn a_driver_that_was_restarted_runs_and_can_be_restarted_again() {
    let mut ladder = Ladder::new(config(OnFault::Restart));
    for n in 1..=3 {
        assert_eq!(ladder.fault(&fault("f", 1, n)), Decision::Restart);
        assert_eq!(ladder.restarted(Ok(())), Next::Nothing);
        assert_eq!(ladder.status().state, State::Running);
        assert_eq!(ladder.status().rungs.restarts, n);
    }
}

#[test]
fn a_reset_that_fails_is_the_end() {
    let mut ladder = Ladder::new(LadderConfig {
        may_reset_guest: MayReset::Boot,
        ..config(OnFault::Restart)
    });
    ladder.fault(&fault("f", 1, 0));
    assert_eq!(ladder.restarted(Err("gone")), Next::Reset);
    assert_eq!(ladder.reset(Err("stopped")), Next::Stop);
    assert_eq!(ladder.reset(Ok(())), Next::Nothing);
    assert_eq!(ladder.status().state, State::Stopped);
}

#[test]
fn a_guest_that_went_back_boots_if_that_has_not_helped() {
    let mut ladder = Ladder::new(LadderConfig {
        may_reset_guest: MayReset::Snapshot,
        ..config(OnFault::Restart)
    });
    let kept = ladder.clone();
    let mut fails_at = |now_ns| {
        assert_eq!(ladder.fault(&fault("f", 1, now_ns)), Decision::Restart);
        let next = ladder.restarted(Err("busy"));
        match next {
            Next::GoBack => {
                ladder.put_back(&kept);
                assert_eq!(ladder.went_back(Ok(())), Next::Nothing);
            }
            _ => assert_eq!(ladder.reset(Ok(())), Next::Nothing),
        }
        assert_eq!(ladder.status().state, State::Running);
        next
    };
    assert_eq!(fails_at(1000), Next::GoBack);
    assert_eq!(fails_at(1000 + MINUTE_NS), Next::Reset);
    assert_eq!(fails_at(1000 + REMEMBERED_NS), Next::GoBack);
    let rungs = ladder.status().rungs;
    assert_eq!((rungs.restarts, rungs.rewinds, rungs.resets), (3, 2, 1));
}

#[test]
fn how_long_rungs_took_is_known_after_the_guest_went_back() {
    let mut ladder = Ladder::new(config(OnFault::Restart));
    let kept = ladder.clone();
    assert!(ladder.status().times.is_empty());
    ladder.took(Rung::Restart, Err("busy"), Duration::from_millis(7));
    ladder.put_back(&kept);
    ladder.took(Rung::Rewind, Ok(()), Duration::from_millis(3));
    let times = ladder.status().times.clone();
    let seen = times.each().map(|(rung, times)| (rung, times.sum_ns()));
    let seen: Vec<_> = seen.into_iter().filter(|(_, sum)| *sum > 0).collect();
    assert_eq!(seen, [("failed_restart", 7_000_000), ("rewind", 3_000_000)]);
    // As it travels, also from a process that says nothing of it.
    let text = serde_json::to_string(ladder.status()).unwrap();
    let back: LadderStatus = serde_json::from_str(&text).unwrap();
    assert_eq!(back.times, times);
    let text = serde_json::to_string(kept.status()).unwrap();
    assert!(!text.contains("times"), "{text}");
    let back: LadderStatus = serde_json::from_str(&text).unwrap();
    assert!(back.times.is_empty());
}

#[test]
fn a_guest_that_cannot_go_back_boots() {
    let mut ladder = Ladder::new(LadderConfig {
        may_reset_guest: MayReset::Snapshot,
        ..config(OnFault::Restart)
    });
    ladder.fault(&fault("f", 1, 0));
    assert_eq!(ladder.restarted(Err("busy")), Next::GoBack);
    assert_eq!(ladder.went_back(Err("no mark")), Next::Reset);
    assert_eq!(ladder.reset(Ok(())), Next::Nothing);
    assert_eq!(ladder.status().state, State::Running);
}

/// What is decided about `count` calls of a poll that fail one after the other.
fn polls(ladder: &mut Ladder, count: u32, out_of_time: bool) -> Vec<Decision> {
    let poll = Fault {
        in_a_row: true,
        out_of_time,
        ..fault("poll", 1, 0)
    };
    (0..count).map(|_| ladder.fault(&poll)).collect()
}

#[test]
fn a_function_that_fails_again_and_again_has_one_rung_after_the_other_tried() {
    let mut ladder = Ladder::new(LadderConfig {
        failures_in_a_row: 10,
        ..config(OnFault::Error)
    });
    let next = |decision| [vec![Decision::Error; 9], vec![decision]].concat();
    assert_eq!(polls(&mut ladder, 10, false), next(Decision::Resume));
    // While that is tried it rests: what it does meanwhile is no reason for the next rung.
    for _ in 0..5 {
        assert_eq!(polls(&mut ladder, 10, false), next(Decision::Rest));
    }
    assert_eq!(ladder.status().rungs.rests, 5);
    ladder.device_begins_anew();
    ladder.resumed(Ok(()));
    assert_eq!(polls(&mut ladder, 10, false), next(Decision::Restart));
    ladder.restarted(Ok(()));
    assert_eq!(polls(&mut ladder, 10, false), next(Decision::Stop));
    assert!(ladder.status().gave_up.as_ref().unwrap().contains("poll"));
}

#[test]
fn a_rung_behind_which_a_function_has_to_rest_again_does_not_hold() {
    let mut ladder = Ladder::new(LadderConfig {
        failures_in_a_row: 10,
        ..config(OnFault::Error)
    });
    assert_eq!(polls(&mut ladder, 10, false)[9], Decision::Resume);
    assert_eq!(polls(&mut ladder, 10, false)[9], Decision::Rest);
    ladder.device_begins_anew();
    assert_eq!(polls(&mut ladder, 10, false)[9], Decision::Rest);
    assert_eq!(ladder.resumed(Ok(())), Next::Restart);
    ladder.device_begins_anew();
    assert_eq!(polls(&mut ladder, 10, false)[9], Decision::Rest);
    assert_eq!(ladder.restarted(Ok(())), Next::Stop);
    let why = ladder.status().gave_up.as_ref().unwrap();
    assert!(why.contains("goes on failing"), "{why}");
}

#[test]
fn a_call_that_ends_well_ends_the_row() {
    let mut ladder = Ladder::new(LadderConfig {
        failures_in_a_row: 10,
        ..config(OnFault::Error)
    });
    for _ in 0..20 {
        // The first one after one that ended well.
        assert_eq!(ladder.fault(&fault("poll", 1, 0)), Decision::Error);
        assert_eq!(polls(&mut ladder, 8, false), [Decision::Error; 8]);
    }
}

#[test]
fn four_calls_that_hang_are_enough_and_none_is_run_again() {
    let mut ladder = Ladder::new(config(OnFault::Retry));
    let decided = polls(&mut ladder, 4, true);
    assert_eq!(decided[..3], [Decision::Error; 3]);
    assert_eq!(decided[3], Decision::Resume);
}
