//! Traces of calls of a guest that runs.

use std::time::Duration;

use isolation::attach::AttachError;
use isolation::attach::request::IsolateRequest;
use isolation::dispatch::call_trace::{CallTrace, TraceOrder};
use isolation::domain::recorder::{Ended, Happened};
use isolation::domain::transaction::PassThroughReason;

use super::guest::*;
use super::{check_order, has_in_order};

/// What no test waits for.
const LONG: Duration = Duration::from_secs(3600);

fn order(function: Option<&str>, calls: u32) -> TraceOrder {
    TraceOrder {
        function: function.map(str::to_owned),
        calls,
        limit: LONG,
    }
}

/// All that there is of a trace, and whether more may come.
fn taken(guest: &Guest, id: u64) -> (Vec<CallTrace>, bool) {
    let mut calls = Vec::new();
    loop {
        let taken = guest.isolator.take_trace("first", id).unwrap();
        let is_empty = taken.call.is_none();
        calls.extend(taken.call);
        assert!(!taken.continues, "calls of a few events");
        if !taken.more || is_empty {
            return (calls, taken.more);
        }
    }
}

fn ended(how: Ended) -> Happened {
    Happened::Ended(how)
}

#[test]
fn as_many_calls_as_were_asked_for_are_recorded_from_gate_to_guest() {
    let guest = Guest::start();
    guest.isolate("first").unwrap();
    let id = guest
        .isolator
        .begin_trace("first", order(Some("first_counts"), 2))
        .unwrap();
    assert_eq!(taken(&guest, id), (vec![], true));
    assert_eq!(guest.call(CALLS_OWN), 1, "another function");
    for round in 2..=4 {
        assert_eq!(guest.call(FIRST), round);
    }
    let (calls, more) = taken(&guest, id);
    assert_eq!((calls.len(), more), (2, false));
    for call in &calls {
        assert_eq!(call.function, "first_counts");
        assert_eq!((call.attempt, call.left_out, call.vcpu), (1, 0, 0));
        assert!(!call.comes_back && call.violation.is_none());
        let events = &call.events;
        check_order(events);
        let wanted = [
            Happened::Gate,
            Happened::Held,
            Happened::Prepared,
            Happened::Entered,
            Happened::Returned,
            Happened::Commits,
            ended(Ended::Committed),
            Happened::BackInGuest,
        ];
        has_in_order(events, &wanted);
        // The phases are the whole.
        let (first, last) = (events.first().unwrap(), events.last().unwrap());
        assert_eq!((first.what, last.what), (wanted[0], wanted[7]));
        let begins: Vec<u64> = events
            .iter()
            .filter(|event| event.what.begins_phase())
            .map(|event| event.at_ns)
            .collect();
        let phases: u64 = begins.windows(2).map(|two| two[1] - two[0]).sum();
        assert_eq!(phases, last.at_ns - first.at_ns);
    }
    let before = calls[0].events.last().unwrap().at_ns;
    assert!(before <= calls[1].events[0].at_ns);
    // It is over.
    assert_eq!(guest.call(FIRST), 5);
    let gone = guest.isolator.take_trace("first", id).unwrap_err();
    assert!(matches!(gone, AttachError::NoTrace), "{gone}");
}

#[test]
fn a_failed_call_and_one_that_goes_on_in_the_guest_say_so() {
    let guest = Guest::start();
    guest
        .isolator
        .isolate(IsolateRequest {
            guest_only: vec!["kernel_schedule".to_owned()],
            ..Guest::request("first")
        })
        .unwrap();
    let isolator = &guest.isolator;
    let id = isolator.begin_trace("first", order(None, 3)).unwrap();
    assert_eq!(guest.call(WAITS), 7);
    // ud2 in place of the function's second instruction.
    isolator
        .inject("first", "first_counts", 5, &[0x0f, 0x0b])
        .unwrap();
    guest.call(FIRST);
    let (calls, more) = taken(&guest, id);
    assert_eq!((calls.len(), more), (3, false));
    let [goes_on, comes_back, fails] = calls.as_slice() else {
        panic!("{calls:?}");
    };
    assert!(!goes_on.comes_back && comes_back.comes_back);
    assert_eq!(comes_back.function, "first_waits");
    let reason = PassThroughReason::TrappedFunction;
    has_in_order(&goes_on.events, &[ended(Ended::GoesOnInGuest(reason))]);
    has_in_order(
        &comes_back.events,
        &[Happened::Returned, ended(Ended::Committed)],
    );
    has_in_order(
        &fails.events,
        &[
            Happened::TakesBack,
            ended(Ended::TakenBack),
            Happened::BackInGuest,
        ],
    );
    let violation = fails.violation.as_deref().unwrap();
    assert!(violation.contains("first_counts"), "{violation}");
    calls.iter().for_each(|call| check_order(&call.events));
}

#[test]
fn a_trace_ends_with_its_time_with_another_one_and_with_the_module() {
    let guest = Guest::start();
    let isolator = &guest.isolator;
    let none = isolator.begin_trace("first", order(None, 1)).unwrap_err();
    assert!(matches!(none, AttachError::NotIsolated(_)), "{none}");
    guest.isolate("first").unwrap();
    let unknown = isolator
        .begin_trace("first", order(Some("first_helps"), 1))
        .unwrap_err();
    assert!(unknown.to_string().contains("first_helps"), "{unknown}");
    let at_once = TraceOrder {
        limit: Duration::ZERO,
        ..order(None, 1)
    };
    let id = isolator.begin_trace("first", at_once).unwrap();
    assert_eq!(guest.call(FIRST), 1);
    assert_eq!(taken(&guest, id), (vec![], false));
    let older = isolator.begin_trace("first", order(None, 1)).unwrap();
    let newer = isolator.begin_trace("first", order(None, 1)).unwrap();
    for gone in [
        isolator.take_trace("first", older).map(drop),
        isolator.end_trace("first", older),
    ] {
        assert!(matches!(gone, Err(AttachError::NoTrace)), "{gone:?}");
    }
    assert_eq!(guest.call(FIRST), 2);
    assert_eq!(taken(&guest, newer).0.len(), 1);
    let id = isolator.begin_trace("first", order(None, 1)).unwrap();
    isolator.end_trace("first", id).unwrap();
    assert_eq!(guest.call(FIRST), 3);
    let id = isolator.begin_trace("first", order(None, 1)).unwrap();
    isolator.release("first").unwrap();
    let released = isolator.take_trace("first", id).unwrap_err();
    assert!(
        matches!(released, AttachError::NotIsolated(_)),
        "{released}"
    );
}
