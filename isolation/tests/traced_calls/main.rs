//! What a trace has of known calls of hand-made guests, on the host's real KVM: all that they do,
//! in its order, and nothing when it was not asked for.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../arming/guest.rs"]
#[allow(dead_code, reason = "each test file uses a part of it")]
mod guest;
mod live;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::recorder::{Event, ExitReason, Happened, MAX_EVENTS, Place, Recording};
use isolation::domain::transaction::CallEnd;

/// A kernel function that the driver calls through a pointer.
const CALLED: u64 = KERNEL_TEXT + 0x100;

/// Whether the events have times that do not run backwards, and runs of the private VM end before
/// the next begin.
pub fn check_order(events: &[Event]) {
    assert!(events.is_sorted_by_key(|event| event.at_ns), "{events:?}");
    let mut inside = false;
    for event in events {
        match event.what {
            Happened::Entered => assert!(!std::mem::replace(&mut inside, true), "{events:?}"),
            Happened::Exit(_) => assert!(std::mem::replace(&mut inside, false), "{events:?}"),
            _ => assert!(!inside, "{event:?} while the domain runs: {events:?}"),
        }
    }
}

/// Whether `wanted` are among the events in this order.
pub fn has_in_order(events: &[Event], wanted: &[Happened]) {
    let mut events_left = events.iter();
    for one in wanted {
        assert!(
            events_left.any(|event| event.what == *one),
            "no {one:?} where it belongs: {events:?}"
        );
    }
}

/// Records a call of a driver with this code that ends well or not.
fn recorded(build: impl FnOnce(&mut CodeAssembler)) -> (CallEnd, Recording) {
    let guest = Guest::new();
    guest.code(CALLED, |a| a.ret().unwrap());
    guest.code(DRIVER_TEXT, build);
    let mut domain = guest.domain();
    let mut kernel = Kernel {
        device_value: 0x55,
        ..Kernel::with_data()
    };
    kernel.kernel_functions.extend([CALLED]);
    domain.recorder.begin(&[]);
    let result = guest.call(&mut domain, &mut kernel);
    let recording = domain.recorder.end().unwrap();
    // What comes next is nobody's.
    guest.call(&mut domain, &mut kernel);
    assert!(!domain.recorder.is_on() && domain.recorder.end().is_none());
    (result.end, recording)
}

/// Calls the kernel, stores to its data and to the device, and asks the device.
fn does_all(a: &mut CodeAssembler) {
    a.mov(rdx, DRIVER_DATA).unwrap();
    a.mov(qword_ptr(rdx), 8).unwrap();
    a.mov(rcx, DEVICE).unwrap();
    a.mov(dword_ptr(rcx + 0x18), 0x77).unwrap();
    a.mov(eax, dword_ptr(rcx + 8)).unwrap();
    a.mov(rax, CALLED).unwrap();
    a.call(rax).unwrap();
}

/// What such a call does until its end.
fn all_done() -> [Happened; 11] {
    [
        Happened::Prepared,
        Happened::Entered,
        Happened::Exit(ExitReason::Out),
        Happened::Opened(DRIVER_DATA),
        Happened::Exit(ExitReason::MmioStore),
        Happened::DeviceStore {
            at: Place::Memory(DEVICE_GPA + 0x18),
            bytes: 4,
            value: 0x77,
        },
        Happened::Exit(ExitReason::MmioLoad),
        Happened::DevicePerforms(1),
        Happened::DeviceLoad {
            at: Place::Memory(DEVICE_GPA + 8),
            bytes: 4,
            value: 0x55,
        },
        Happened::Calls(CALLED),
        Happened::Exit(ExitReason::Out),
    ]
}

#[test]
fn a_call_that_ends_well_has_all_that_it_did_in_order() {
    let (end, recording) = recorded(|a| {
        does_all(a);
        a.ret().unwrap();
    });
    assert!(matches!(end, CallEnd::Committed), "{end:?}");
    let events = &recording.events;
    check_order(events);
    let mut wanted = all_done().to_vec();
    wanted.extend([Happened::Returned, Happened::Commits]);
    has_in_order(events, &wanted);
    let is_writing = |event: &Event| matches!(event.what, Happened::Writes(1..));
    assert!(is_writing(events.last().unwrap()), "{events:?}");
    assert_eq!(recording.left_out, 0);
    let is_failing = |event: &Event| event.what == Happened::TakesBack;
    assert!(!events.iter().any(is_failing), "{events:?}");
}

#[test]
fn a_call_that_fails_is_taken_back_and_commits_nothing() {
    let (end, recording) = recorded(|a| {
        does_all(a);
        a.ud2().unwrap();
    });
    assert!(matches!(end, CallEnd::Aborted(_)), "{end:?}");
    let events = &recording.events;
    check_order(events);
    has_in_order(events, &all_done());
    assert_eq!(events.last().unwrap().what, Happened::TakesBack);
    let commits = |event: &Event| matches!(event.what, Happened::Commits | Happened::Writes(_));
    assert!(!events.iter().any(commits), "{events:?}");
}

#[test]
fn a_call_with_more_events_than_are_kept_has_its_end_and_says_how_many_are_missing() {
    const STORES: u64 = 2000;
    let (end, recording) = recorded(|a| {
        let mut again = a.create_label();
        a.mov(rcx, DEVICE).unwrap();
        a.mov(rdx, STORES).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(dword_ptr(rcx), 1).unwrap();
        a.dec(rdx).unwrap();
        a.jne(again).unwrap();
        a.ret().unwrap();
    });
    assert!(matches!(end, CallEnd::Committed), "{end:?}");
    let events = &recording.events;
    assert!(events.is_sorted_by_key(|event| event.at_ns));
    assert!(recording.left_out > 0);
    assert!(events.len() > MAX_EVENTS, "{}", events.len());
    // Each store is entered for, exited for and noted.
    let all = events.len() as u64 + recording.left_out;
    assert!(all >= 3 * STORES, "{all}");
    has_in_order(events, &[Happened::Returned, Happened::Commits]);
}
