//! Domains of a hand-made guest that runs, on the host's real KVM: what is put in place, patched and taken out between
//! calls.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

mod guest;

use guest::*;
use isolation::dispatch::fault::FaultOrder;
use vm_memory::{Bytes, GuestAddress};

/// -EIO, what a call returns that failed and whose type is not known.
const ERROR: u64 = -5i64 as u64;

/// Calls the first module from a process's tables, which the guest then gives to somebody who writes to them.
fn called_from_a_process_that_is_gone() -> Guest {
    let guest = Guest::start();
    guest.isolate("first").unwrap();
    assert_eq!(guest.call_from(PROCESS_TABLES, FIRST), 1);
    let poison = [0xaa; PAGE as usize];
    let memory = guest.handle.ram().memory();
    memory
        .write_slice(&poison, GuestAddress(PROCESS_TABLES))
        .unwrap();
    guest
}

#[test]
fn code_is_put_into_the_domain_after_the_process_of_the_last_call_is_gone() {
    let guest = called_from_a_process_that_is_gone();
    let isolator = &guest.isolator;
    // ud2 in place of the function's second instruction.
    let before = isolator
        .inject("first", "first_counts", 5, &[0x0f, 0x0b])
        .unwrap();
    assert_eq!(before, [0x48, 0xb9]);
    assert_eq!(guest.call(FIRST), ERROR);
    isolator
        .inject("first", "first_counts", 5, &before)
        .unwrap();
    assert_eq!(guest.call(FIRST), 2);
    assert_eq!(guest.read(FIRST_DATA), 2);
}

#[test]
fn instructions_are_listed_after_the_process_of_the_last_call_is_gone() {
    let guest = called_from_a_process_that_is_gone();
    let instructions = guest
        .isolator
        .instructions("first", "first_counts")
        .unwrap();
    assert!(instructions.len() >= 5, "{instructions:?}");
    assert_eq!((instructions[1].offset, instructions[1].len), (5, 10));
}

#[test]
fn a_fault_that_was_ordered_comes_after_the_process_of_the_last_call_is_gone() {
    let guest = called_from_a_process_that_is_gone();
    let order = FaultOrder {
        entry: "first_counts".to_owned(),
        offset: 5,
        code: vec![0x0f, 0x0b],
        every: 1,
        times: 1,
    };
    guest.isolator.order_fault("first", order).unwrap();
    assert_eq!(guest.call(FIRST), ERROR);
    let count = guest.isolator.fault_count("first").unwrap();
    assert_eq!((count.tried, count.failed, count.left), (1, 1, 0));
    assert_eq!(guest.call(FIRST), 2);
    assert_eq!(guest.status("first").broken, None);
}

#[test]
fn a_module_is_released_after_the_process_of_the_last_call_is_gone() {
    let guest = called_from_a_process_that_is_gone();
    guest.isolator.release("first").unwrap();
    assert_eq!(guest.call(FIRST), 2);
}

#[test]
fn two_modules_are_isolated_at_once() {
    let guest = Guest::start();
    guest.isolate("first").unwrap();
    guest.isolate("second").unwrap();
    for round in 1..=5 {
        assert_eq!(guest.call(FIRST), round);
        assert_eq!(guest.call(SECOND), round);
    }
    guest.isolator.release("first").unwrap();
    assert_eq!((guest.call(FIRST), guest.call(SECOND)), (6, 6));
    let status = guest.status("second");
    assert_eq!((status.entries[0].calls, status.entries[0].commits), (6, 6));
}

#[test]
fn an_isolated_module_calls_another_one() {
    let guest = Guest::start();
    guest.isolate("first").unwrap();
    guest.isolate("second").unwrap();
    for round in 1..=3 {
        assert_eq!(guest.call(CALLS_SECOND), 101 * round);
    }
    assert_eq!((guest.read(FIRST_DATA), guest.read(SECOND_DATA)), (300, 3));
    let (first, second) = (guest.status("first"), guest.status("second"));
    assert_eq!((&first.broken, &second.broken), (&None, &None));
    let entries = first.entries.iter();
    let caller = entries.clone().find(|e| e.name == "first_calls_second");
    assert_eq!(caller.unwrap().commits, 3, "{first:?}");
    assert_eq!(second.entries[0].commits, 3, "{second:?}");
    // The other's fault is the other's: the caller gets its error, and what it did itself stays.
    guest
        .isolator
        .inject("second", "second_counts", 5, &[0x0f, 0x0b])
        .unwrap();
    assert_eq!(guest.call(CALLS_SECOND), 400u64.wrapping_add(ERROR));
}
