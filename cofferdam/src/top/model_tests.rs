//! Rates, processes that come and go, and what happens meanwhile.

use recovery::ladder::{LadderStatus, Rungs, State};

use super::super::double::{S, Told1s, host_who, module, status, violations, who};
use super::*;
use crate::control::protocol::VmState;

#[test]
fn rates_are_what_went_by_between_two_readings() {
    let mut told = Told1s::running(&[who("web")]);
    told.guest("web", status(100, 10), &[]);
    let web = &told.model.guests["web"];
    assert_eq!(web.exits_per_second(), None);
    assert!(!told.model.is_settled());
    told.guest("web", status(350, 30), &[]);
    let web = &told.model.guests["web"];
    assert_eq!(web.exits_per_second(), Some(250));
    assert_eq!(web.frames_per_second(), [Some(20), Some(10)]);
    assert!(told.model.is_settled());
}

#[test]
fn counters_that_begin_anew_have_no_rate_until_the_next_reading() {
    let mut told = Told1s::running(&[who("web")]);
    let with = |calls, exits| {
        let isolation = vec![module(calls, 0)];
        let mut status = status(exits, exits);
        status.exits.remove("io");
        crate::control::protocol::Status {
            isolation,
            ..status
        }
    };
    told.guest("web", with(1000, 5000), &[]);
    told.guest("web", with(3, 4), &[]);
    let web = &told.model.guests["web"];
    assert_eq!(web.exits_per_second(), None);
    assert_eq!(web.frames_per_second(), [None, None]);
    assert_eq!(web.calls_per_second("e1000"), None);
    told.guest("web", with(10, 9), &[]);
    let web = &told.model.guests["web"];
    assert_eq!(web.calls_per_second("e1000"), Some(7));
    assert_eq!(web.exits_per_second(), Some(5));
    assert_eq!(web.calls_per_second("none"), None);
}

#[test]
fn a_guest_that_goes_is_gone_and_one_of_its_name_begins_anew() {
    let mut told = Told1s::running(&[who("db"), who("web"), host_who("web")]);
    told.guest("web", status(1, 1), &[]);
    told.run(&[who("db"), host_who("web")]);
    assert!(!told.model.guests.contains_key("web"));
    assert!(told.model.hosts.contains_key("web"));
    assert_eq!(told.happened()[0], "web has ended");
    // What it said last comes late.
    told.guest("web", status(2, 2), &[]);
    assert!(!told.model.guests.contains_key("web"));
    let other = Who {
        pid: Some(8),
        ..who("web")
    };
    told.run(&[who("db"), other]);
    assert_eq!(told.happened()[..2], ["web has ended", "web has begun"]);
    told.guest("web", status(3, 3), &[]);
    assert_eq!(told.model.guests["web"].last, None);
}

#[test]
fn a_process_whose_number_comes_to_be_known_is_the_same_one() {
    let unknown = Who {
        pid: None,
        ..who("web")
    };
    let mut told = Told1s::running(&[unknown]);
    told.run(&[who("web")]);
    assert_eq!(told.model.guests["web"].pid, Some(7));
    assert!(told.happened().is_empty());
}

#[test]
fn a_guest_that_hangs_is_said_not_to_answer_and_the_others_go_on() {
    let mut told = Told1s::running(&[who("db"), who("web")]);
    let say = |told: &Told1s, name: &str| told.model.silence(&told.model.guests[name]);
    assert_eq!(say(&told, "db").unwrap(), "...");
    told.guest("db", status(1, 1), &[]);
    told.guest("web", status(1, 1), &[]);
    for n in 0..4 {
        assert_eq!(say(&told, "db"), None);
        told.guest("web", status(n, 1), &[]);
    }
    // Its poller is still waiting.
    assert_eq!(say(&told, "db").unwrap(), "does not answer");
    assert_eq!(say(&told, "web"), None);
    told.no_answer("db", "db does not answer: its process is \x1b[31mstopped");
    let why = "does not answer: its process is [31mstopped";
    assert_eq!(say(&told, "db").unwrap(), why);
    told.no_answer("db", "its process is \x1b[31mstopped");
    assert_eq!(say(&told, "db").unwrap(), why);
    assert_eq!(told.happened(), ["db does not answer"]);
    told.guest("db", status(9, 1), &[]);
    assert_eq!(say(&told, "db"), None);
    assert_eq!(told.happened()[0], "db answers again");
}

#[test]
fn what_happens_to_a_driver_is_told_once_with_how_often() {
    let mut told = Told1s::running(&[who("web")]);
    told.guest("web", status(1, 1), &[]);
    let with = |aborts, ladder: LadderStatus| {
        let mut status = status(1, 1);
        status.isolation = vec![module(10, aborts)];
        status.recovery.insert("e1000".to_owned(), ladder);
        status
    };
    let ladder = |state, restarts| LadderStatus {
        state,
        rungs: Rungs {
            restarts,
            ..Rungs::default()
        },
        ..LadderStatus::default()
    };
    told.guest("web", with(0, ladder(State::Running, 0)), &[]);
    assert_eq!(told.happened(), ["web e1000: isolated, functions: 1"]);
    for n in 1..1000 {
        let last_ns = told.model.now_ns;
        let status = with(n, ladder(State::Running, n));
        told.guest("web", status, &[violations(n, last_ns)]);
    }
    let happened = told.happened();
    assert_eq!(happened.len(), 3, "{happened:?}");
    assert_eq!(happened[0], "web e1000: restarts: 999");
    assert!(happened[1].contains("e1000_tx_map+0x4c (999 times)"));
    let last = violations(999, told.model.now_ns - S);
    told.guest("web", with(999, ladder(State::Stopped, 999)), &[last]);
    assert_eq!(told.happened()[0], "web e1000: STOPPED");
    told.guest("web", status(1, 1), &[]);
    assert_eq!(told.happened()[0], "web e1000: is isolated no more");
}

#[test]
fn a_guests_states_panics_and_resets_are_told() {
    let mut told = Told1s::running(&[who("web")]);
    told.guest("web", status(1, 1), &[]);
    let mut now = status(1, 1);
    now.guest_panic = Some("Kernel panic\x1b]0;x\x07 - not syncing".to_owned());
    told.guest("web", now.clone(), &[]);
    told.guest("web", now, &[]);
    let mut now = status(0, 0);
    now.resets = 1;
    now.state = VmState::Paused;
    told.guest("web", now, &[]);
    assert_eq!(
        told.happened(),
        [
            "web was reset (1 in all)",
            "web is paused",
            "web has panicked: Kernel panic]0;x - not syncing"
        ]
    );
}
