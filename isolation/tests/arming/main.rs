//! Domains of a hand-made guest that runs, on the host's real KVM: what is put in place, patched
//! and taken out between calls.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

#[path = "../../../vmm/tests/mapped_bars/card.rs"]
mod card;
mod faults;
#[allow(dead_code, reason = "each test file uses a part of it")]
mod guest;
mod mapped;

use std::sync::Arc;

use guest::*;
use isolation::attach::request::{Contain, IsolateRequest};
use isolation::dispatch::fault::{FaultOrder, UsedUpBy, WhichCalls};
use isolation::guest::btf::Btf;
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::{MemorySource, Userfault};

/// The code of `first_counts`.
const FIRST_CODE: [u8; 22] = [
    0x0f, 0x1f, 0x44, 0x00, 0x00, // nopl
    0x48, 0xb9, 0x00, 0x30, 0x00, 0xc0, 0xff, 0xff, 0xff, 0xff, // movabs $FIRST_DATA,%rcx
    0x48, 0xff, 0x01, // incq (%rcx)
    0x48, 0x8b, 0x01, // mov (%rcx),%rax
    0xc3, // ret
];

/// -EIO, what a call returns that failed and whose type is not known.
const ERROR: u64 = -5i64 as u64;

/// Calls the first module from a process's tables, which the guest then gives to somebody who
/// writes to them.
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
        function: "first_counts".to_owned(),
        offset: 5,
        code: vec![0x0f, 0x0b],
        which: WhichCalls::ALL,
        times: 1,
        used_up_by: UsedUpBy::Failing,
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
fn guests_whose_memory_begins_as_the_same_file_are_isolated_each_for_itself() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(8 << 20).unwrap();
    let file = Arc::new(file);
    // One has its memory copied, the other where it is touched; both where that cannot be had.
    let userfaults = [Userfault::open().ok().map(Arc::new), None];
    let on_demand = userfaults[0].is_some();
    let guests = userfaults.map(|userfault| {
        Guest::start_with(MemorySource::Template {
            file: file.clone(),
            userfault,
        })
    });
    let [first, second] = &guests;
    first.isolate("first").unwrap();
    // A private view is a mapping of a file of the guest's own.
    assert_eq!(first.handle.ram().comes_on_demand(), on_demand);
    assert!(on_demand || !first.handle.ram().is_template());
    assert!(second.handle.ram().is_template());
    for round in 1..=5 {
        assert_eq!(first.call(FIRST), round);
        assert_eq!(second.call(FIRST), round);
    }
    let commits = first.status("first").entries.into_iter();
    assert_eq!(commits.map(|entry| entry.commits).sum::<u64>(), 5);
    assert_eq!(first.read(FIRST_DATA), 5);
    second.isolate("first").unwrap();
    assert!(!second.handle.ram().is_template());
    assert_eq!(second.call(FIRST), 6);
    // Taken out, and put in place again: another view.
    for round in 6..9 {
        first.isolator.release("first").unwrap();
        first.isolate("first").unwrap();
        assert_eq!(first.call(FIRST), round);
    }
    assert_eq!(first.handle.ram().comes_on_demand(), on_demand);
    let mut bytes = vec![0; 8 << 20];
    std::os::unix::fs::FileExt::read_exact_at(&*file, &mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0), "the file was written");
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

/// The first module's text as it is in memory.
fn first_text(guest: &Guest) -> Vec<u8> {
    let mut text = vec![0; PAGE as usize];
    let memory = guest.handle.ram().memory();
    memory
        .read_slice(&mut text, GuestAddress(gpa_of(FIRST)))
        .unwrap();
    text
}

/// Types of nothing: a header with no types and one empty string (Documentation/bpf/btf.rst).
fn no_types() -> Arc<Btf> {
    let words = [0x0001_eb9fu32, 24, 0, 0, 0, 1];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.push(0);
    Arc::new(Btf::parse(&bytes, None).unwrap())
}

#[test]
fn without_what_containment_needs_nothing_is_isolated_and_the_missing_fact_is_named() {
    let guest = Guest::start();
    let before = first_text(&guest);
    let full = |types| IsolateRequest {
        types,
        contain: Contain::Full,
        ..Guest::request("first")
    };
    for (types, missing) in [(None, "BTF"), (Some(no_types()), "page_offset_base")] {
        let error = guest.isolator.isolate(full(types)).unwrap_err().to_string();
        assert!(
            error.contains(missing) && error.contains("--contain none"),
            "{error}"
        );
        assert!(first_text(&guest) == before);
        assert!(guest.isolator.status().is_empty());
    }
    assert_eq!(guest.call(FIRST), 1);
}

#[test]
fn who_wants_it_all_the_same_is_told_what_is_not_contained() {
    let guest = Guest::start();
    let isolated = guest.isolate("first").unwrap();
    let strength = guest.status("first").strength;
    assert_eq!(isolated.strength, strength);
    assert!(
        !strength.contained && strength.model.is_none(),
        "{strength:?}"
    );
    let untyped = [
        "first_calls_own",
        "first_calls_second",
        "first_counts",
        "first_joins",
        "first_tells",
        "first_waits",
    ];
    assert_eq!(strength.untyped, untyped);
    assert!(
        strength.missing.iter().any(|m| m.contains("BTF")),
        "{strength:?}"
    );
    assert!(
        strength.missing.iter().any(|m| m.contains("6.1.0")),
        "{strength:?}"
    );
    assert_eq!(guest.call(FIRST), 1);
    let entries = guest.status("first").entries;
    let counts = entries.iter().find(|entry| entry.name == "first_counts");
    assert_eq!(counts.map(|entry| entry.commits), Some(1));
}

#[test]
fn a_module_that_is_isolated_is_refused_and_stays_as_it_is() {
    let guest = Guest::start();
    guest.isolate("first").unwrap();
    let armed = first_text(&guest);
    let error = guest.isolate("first").unwrap_err().to_string();
    assert!(error.contains("isolated already"), "{error}");
    assert!(first_text(&guest) == armed);
    assert_eq!(guest.call(FIRST), 1);
}

#[test]
fn a_module_that_is_gone_is_refused() {
    let guest = Guest::start();
    let request = IsolateRequest {
        sections: vec![(".text".into(), FIRST + 0x10_0000)],
        ..Guest::request("first")
    };
    let error = guest.isolator.isolate(request).unwrap_err().to_string();
    assert!(error.contains("still loaded"), "{error}");
}

#[test]
fn faults_that_were_ordered_before_are_kept() {
    let guest = Guest::start();
    guest.isolate("first").unwrap();
    guest.isolate("second").unwrap();
    let order = |entry: &str, times| FaultOrder {
        function: entry.to_owned(),
        offset: 5,
        code: vec![0x0f, 0x0b],
        which: WhichCalls::ALL,
        times,
        used_up_by: UsedUpBy::Failing,
    };
    let isolator = &guest.isolator;
    isolator
        .order_fault("first", order("first_counts", 2))
        .unwrap();
    isolator
        .order_fault("first", order("first_calls_second", 1))
        .unwrap();
    isolator
        .order_fault("first", order("first_counts", 1))
        .unwrap();
    assert_eq!(guest.call(CALLS_SECOND), ERROR);
    // The two of the first, and then the one that was ordered last.
    let results: Vec<u64> = (0..4).map(|_| guest.call(FIRST)).collect();
    assert_eq!(results, [ERROR, ERROR, ERROR, 1]);
    let count = isolator.fault_count("first").unwrap();
    assert_eq!((count.tried, count.failed, count.left), (1, 1, 0));
    // No more than there is room for, and used ones take none.
    for _ in 0..16 {
        isolator
            .order_fault("first", order("first_counts", 1))
            .unwrap();
    }
    let error = isolator.order_fault("first", order("first_counts", 1));
    assert!(error.unwrap_err().to_string().contains("too many faults"));
    // An order of none withdraws all that are left for the function.
    isolator
        .order_fault("first", order("first_counts", 0))
        .unwrap();
    assert_ne!(guest.call(FIRST), ERROR);
    isolator
        .order_fault("first", order("first_counts", 1))
        .unwrap();
    assert_eq!(guest.call(FIRST), ERROR);
}
