//! Guests that are rewound with functions isolated, on the host's real KVM: memory and calls are as
//! at the mark, whatever was done since.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

#[path = "../arming/guest.rs"]
#[allow(dead_code, reason = "each test file uses a part of it")]
mod guest;
mod mark;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use guest::*;
use isolation::attach::request::IsolateRequest;
use isolation::compensation::effects::KernelModel;
use isolation::dispatch::fault::{FaultOrder, UsedUpBy, WhichCalls};
use isolation::guest::btf::Btf;
use mark::{MachineMark, Mark, memory};
use vm_memory::{Bytes, GuestAddress};
use vmm::snapshot::{Beside, CaptureError, Chain, SnapshotRequest, Taken};

/// -EIO, what a call returns that failed and whose type is not known.
const ERROR: u64 = -5i64 as u64;

/// A fault for the next call of a function of the first module.
fn fault(entry: &str) -> FaultOrder {
    FaultOrder {
        function: entry.to_owned(),
        // Behind the gate: ud2.
        offset: 5,
        code: vec![0x0f, 0x0b],
        which: WhichCalls::ALL,
        times: 1,
        used_up_by: UsedUpBy::Failing,
    }
}

/// Calls of the first module: to a function, and perhaps with a fault in it.
type Calls = [(u64, bool)];

fn results(guest: &Guest, calls: &Calls) -> Vec<u64> {
    let run = |(function, fails): &(u64, bool)| {
        if *fails {
            let name = if *function == FIRST {
                "first_counts"
            } else {
                "first_calls_second"
            };
            guest.isolator.order_fault("first", fault(name)).unwrap();
        }
        guest.call(*function)
    };
    calls.iter().map(run).collect()
}

/// Both modules isolated, and each called once.
fn both() -> Guest {
    let guest = Guest::start();
    guest.isolate("first").unwrap();
    guest.isolate("second").unwrap();
    guest.call(CALLS_SECOND);
    guest
}

#[test]
fn the_same_calls_have_the_same_results_after_each_rewind() {
    let guest = both();
    let mark = Mark::of(&guest);
    let calls = [
        (FIRST, false),
        (FIRST, true),
        (CALLS_SECOND, false),
        (CALLS_SECOND, true),
        (SECOND, false),
        (FIRST, false),
    ];
    let first = results(&guest, &calls);
    assert!(first.contains(&ERROR), "{first:?}");
    let after = memory(&guest);
    for _ in 0..5 {
        assert!(mark.rewind(&guest) > 0);
        assert_eq!(results(&guest, &calls), first);
        assert!(memory(&guest) == after);
    }
    // What happened is counted, though it was undone.
    let entry = guest.entry("first_counts");
    assert_eq!((entry.aborts, entry.taken_back.count()), (6, 6));
}

/// Rewinds a guest that has both modules isolated a thousand times, after random calls, some of
/// which fail.
fn thousand_rewinds(guest: &Guest, rewind: impl Fn()) {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = |below: u64| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (random >> 33) % below
    };
    for _ in 0..1000 {
        let calls: Vec<_> = (0..next(4))
            .map(|_| ([FIRST, CALLS_SECOND][next(2) as usize], next(3) == 0))
            .collect();
        let well = calls.iter().filter(|(_, fails)| !fails).count();
        let results = results(guest, &calls);
        assert_eq!(results.iter().filter(|rax| **rax != ERROR).count(), well);
        // Also with an order that no call has taken yet.
        if next(4) == 0 {
            let order = fault("first_counts");
            guest.isolator.order_fault("first", order).unwrap();
        }
        rewind();
    }
    assert_eq!((guest.call(FIRST), guest.call(SECOND)), (101, 2));
    for module in ["first", "second"] {
        assert_eq!(guest.status(module).broken, None);
    }
}

#[test]
fn a_thousand_rewinds_under_calls_that_fail_leave_memory_as_at_the_mark() {
    let guest = both();
    let mark = Mark::of(&guest);
    thousand_rewinds(&guest, || {
        mark.rewind(&guest);
    });
}

#[test]
fn a_thousand_rewinds_by_the_machine_leave_memory_as_at_the_mark() {
    let guest = both();
    let mark = MachineMark::of(&guest);
    thousand_rewinds(&guest, || mark.rewind(&guest));
    guest.isolator.release("first").unwrap();
    assert_eq!(guest.call(FIRST), 102);
    mark.rewind(&guest);
    assert_eq!(guest.call(FIRST), 101);
    assert!(guest.entry("first_counts").commits > 0);
}

#[test]
fn marks_are_gone_back_to_in_any_order() {
    let guest = Guest::start();
    let none = Mark::of(&guest);
    guest.isolate("first").unwrap();
    guest.call(FIRST);
    let one = Mark::of(&guest);
    guest.isolate("second").unwrap();
    guest.call(SECOND);
    let two = Mark::of(&guest);
    for (mark, modules) in [
        (&none, 0),
        (&two, 2),
        (&one, 1),
        (&two, 2),
        (&none, 0),
        (&one, 1),
    ] {
        mark.rewind(&guest);
        assert_eq!(guest.isolator.status().len(), modules);
        let before = guest.read(FIRST_DATA);
        let commits = || {
            let status = guest.isolator.status();
            let mut entries = status.first()?.entries.iter();
            let counts = entries.find(|entry| entry.name == "first_counts");
            counts.map(|entry| entry.commits)
        };
        let counted = commits();
        assert_eq!(guest.call(FIRST), before + 1);
        assert_eq!(commits(), counted.map(|count| count + 1));
    }
}

#[test]
fn what_was_released_isolated_anew_or_lost_with_the_guest_since_is_isolated_as_at_the_mark() {
    let what_happens: [fn(&Guest); 4] = [
        |guest| {
            guest.isolator.release("first").unwrap();
            assert_eq!(guest.call(FIRST), 101);
        },
        |guest| {
            guest.isolator.release("first").unwrap();
            guest.isolate("first").unwrap();
            assert_eq!(guest.call(FIRST), 101);
        },
        |guest| {
            guest
                .handle
                .with_paused(|_| guest.isolator.forget())
                .unwrap();
        },
        |guest| guest.isolator.stop("first").unwrap(),
    ];
    for happens in what_happens {
        let guest = both();
        let mark = Mark::of(&guest);
        happens(&guest);
        mark.rewind(&guest);
        let before = guest.entry("first_counts").commits;
        assert_eq!((guest.call(FIRST), guest.call(FIRST)), (101, 102));
        assert_eq!(guest.entry("first_counts").commits, before + 2);
        let order = fault("first_counts");
        guest.isolator.order_fault("first", order).unwrap();
        assert_eq!((guest.call(FIRST), guest.call(FIRST)), (ERROR, 103));
        guest.isolator.release("first").unwrap();
        guest.isolator.release("second").unwrap();
        assert_eq!(guest.call(FIRST), 104);
    }
}

#[test]
fn a_domain_is_gone_once_neither_the_guest_nor_a_mark_needs_it() {
    let guest = both();
    let mark = Mark::of(&guest);
    guest.isolator.release("first").unwrap();
    assert_eq!(guest.isolator.kept_for_marks(), 1);
    mark.rewind(&guest);
    assert_eq!(guest.isolator.kept_for_marks(), 0);
    guest.isolator.release("first").unwrap();
    guest.isolator.release("second").unwrap();
    assert_eq!(guest.isolator.kept_for_marks(), 2);
    drop(mark);
    // Whoever makes the next one finds out.
    drop(Mark::of(&guest));
    assert_eq!(guest.isolator.kept_for_marks(), 0);
}

/// Has the first module's data be another page, with `value` in it.
fn remap_data(guest: &Guest, value: u64) {
    const OTHER: u64 = 0x40_0000;
    guest.remap(FIRST_DATA, |entry| OTHER | entry & !0x000f_ffff_ffff_f000);
    let memory = guest.handle.ram().memory();
    memory.write_obj(value, GuestAddress(OTHER)).unwrap();
}

#[test]
fn page_tables_that_were_changed_since_are_followed_back() {
    let guest = both();
    let mark = Mark::of(&guest);
    for round in 0..3 {
        guest
            .handle
            .with_paused(|_| remap_data(&guest, 1000 + round))
            .unwrap();
        assert_eq!(guest.call(FIRST), 1001 + round);
        mark.rewind(&guest);
        assert_eq!(guest.call(FIRST), 101);
        assert_eq!(guest.read(FIRST_DATA), 101);
        mark.rewind(&guest);
    }
}

#[test]
fn code_that_the_guest_changed_since_is_what_it_was_then() {
    let guest = both();
    let mark = Mark::of(&guest);
    // mov rax, [rcx] becomes three NOPs, and a fault is put over other code of the page.
    let text = GuestAddress(gpa_of(FIRST) + 18);
    let ram = guest.handle.ram().memory();
    let mut before = [0; 3];
    ram.read_slice(&mut before, text).unwrap();
    assert_eq!(before, [0x48, 0x8b, 0x01]);
    for _ in 0..3 {
        ram.write_slice(&[0x90; 3], text).unwrap();
        let isolator = &guest.isolator;
        isolator
            .inject("first", "first_calls_second", 5, &[0x0f, 0x0b])
            .unwrap();
        // Each call looks at one page of code.
        while guest.call(FIRST) == guest.read(FIRST_DATA) {}
        assert_eq!(guest.call(CALLS_SECOND), ERROR);
        mark.rewind(&guest);
        assert_eq!((guest.call(FIRST), guest.call(CALLS_SECOND)), (101, 203));
        mark.rewind(&guest);
    }
}

/// Types of nothing at all: BTF with an empty string in it (Documentation/bpf/btf.rst).
fn no_types() -> Arc<Btf> {
    let words = [0x0001_eb9fu32, 24, 0, 0, 0, 1];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.push(0);
    Arc::new(Btf::parse(&bytes, None).unwrap())
}

/// A guest of which the first module is isolated with all that isolation puts into memory, and its
/// calls go on in the guest for the scheduler.
fn spilling() -> Guest {
    let guest = Guest::start();
    // As the kernel leaves what it rounded a module's text up to.
    let end = GuestAddress(gpa_of(FIRST) + PAGE - 128);
    guest
        .handle
        .ram()
        .memory()
        .write_slice(&[0; 128], end)
        .unwrap();
    isolate_spilling(&guest);
    guest
}

fn isolate_spilling(guest: &Guest) {
    let model = KernelModel {
        harmless: vec!["kernel_waits".to_owned()],
        ..KernelModel::default()
    };
    guest
        .isolator
        .isolate(IsolateRequest {
            types: Some(no_types()),
            model: Some(model),
            guest_only: vec!["kernel_schedule".to_owned()],
            ..Guest::request("first")
        })
        .unwrap();
}

#[test]
fn a_guest_with_a_call_open_is_not_marked_but_waited_for() {
    let guest = spilling();
    let mark = Mark::of(&guest);
    guest.write(STAYS, 1);
    guest.order(WAITS);
    while guest.read(SCHEDULED) == 0 {
        std::thread::yield_now();
    }
    let refused = Mark::within(&guest, Duration::ZERO)
        .err()
        .unwrap()
        .to_string();
    assert!(refused.contains("1 calls of `first` are open"), "{refused}");
    guest.write(STAYS, 0);
    // It has ended now.
    mark.rewind(&guest);
    assert_eq!((guest.read(SCHEDULED), guest.read(RUNS)), (0, 0));
    for _ in 0..3 {
        assert_eq!(guest.call(WAITS), 7);
        guest.write(FAILS, 1);
        assert_eq!(guest.call(WAITS), ERROR);
        mark.rewind(&guest);
        assert_eq!(guest.read(RUNS), 0);
    }
}

/// A snapshot into `dir`, with bytes at gates as they are without isolation.
fn snapshot(guest: &Guest, dir: &Path, limit: Duration) -> Result<Taken, CaptureError> {
    let request = SnapshotRequest {
        dir,
        parent: None,
        program: "test",
        track: false,
        stop: false,
        limit,
    };
    let mut beside = || {
        let clean = guest.isolator.clean_bytes().into_iter();
        Ok(Beside {
            vm: serde_json::Value::Null,
            instead: clean.map(|clean| (clean.at, clean.bytes)).collect(),
        })
    };
    guest.handle.snapshot(&request, &mut |_| true, &mut beside)
}

#[test]
fn a_guest_with_a_call_open_is_not_saved_but_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let guest = spilling();
    guest.write(STAYS, 1);
    guest.order(WAITS);
    while guest.read(SCHEDULED) == 0 {
        std::thread::yield_now();
    }
    // Refused with the reason, also where the guest is paused and cannot come to the call's end.
    let refused = |is_paused: bool| {
        let dir = folder.path().join("refused");
        let limit = match is_paused {
            true => Duration::from_secs(60),
            false => Duration::ZERO,
        };
        let error = snapshot(&guest, &dir, limit).unwrap_err().to_string();
        assert!(error.contains("1 calls of `first` are open"), "{error}");
        assert_eq!(error.contains("resume it first"), is_paused, "{error}");
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    };
    refused(false);
    guest.handle.pause().unwrap();
    refused(true);
    guest.handle.resume().unwrap();
    // One that is not in a hurry waits for it.
    let dir = folder.path().join("s");
    let taken = std::thread::scope(|scope| {
        let taken = scope.spawn(|| snapshot(&guest, &dir, Duration::from_secs(60)));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!taken.is_finished());
        guest.write(STAYS, 0);
        taken.join().unwrap()
    });
    taken.unwrap();
    let chain = Chain::open(&dir).unwrap();
    chain.check(&mut |_| true).unwrap();
    // In the image the call has ended, and no gate is left.
    let word = |address: u64| {
        let mut page = [0; PAGE as usize];
        chain.read(address / PAGE, &mut page).unwrap();
        let at = (address % PAGE) as usize;
        u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
    };
    for clean in guest.isolator.clean_bytes() {
        let mut page = [0; PAGE as usize];
        chain.read(clean.at.0 / PAGE, &mut page).unwrap();
        let at = (clean.at.0 % PAGE) as usize;
        assert_eq!(&page[at..at + clean.bytes.len()], &clean.bytes[..]);
    }
    assert_eq!(word(gpa_of(STAYS)), 0);
    // The guest goes on, isolated.
    for _ in 0..3 {
        assert_eq!(guest.call(WAITS), 7);
    }
}

#[test]
fn clean_memory_is_that_of_a_guest_without_isolation_and_can_be_isolated_anew() {
    let guest = spilling();
    guest.isolate("second").unwrap();
    let mark = Mark::of(&guest);
    assert!(mark.clean_memory() != mark.memory);
    guest.isolator.release("first").unwrap();
    guest.isolator.release("second").unwrap();
    let without = Mark::of(&guest);
    assert!(without.clean.is_empty());
    assert!(mark.clean_memory() == without.memory);
    isolate_spilling(&guest);
    let again = Mark::of(&guest);
    assert!(again.clean_memory() == without.memory);
    // Gates of three functions, and the loop behind them.
    assert!(again.clean.len() >= 4, "{:?}", again.clean);
    assert_eq!(guest.call(WAITS), 7);
}
