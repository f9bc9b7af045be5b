//! Faults on purpose: in calls of the domain, and in the guest's own text.

use std::time::Duration;

use isolation::attach::text_fault::{LoadedModule, TextChange};
use isolation::dispatch::fault::{FaultCount, FaultOrder, UsedUpBy, WhichCalls};
use isolation::guest::symbols::SymbolTable;
use vm_memory::{Bytes, GuestAddress};

use super::guest::*;
use super::{ERROR, FIRST_CODE};

/// `inc (%rcx)` in `first_counts`, and as many bytes that do nothing.
const INC: u64 = 15;
const NOP: [u8; 3] = [0x0f, 0x1f, 0x00];

fn order(entry: &str, offset: u64, code: &[u8], used_up_by: UsedUpBy) -> FaultOrder {
    FaultOrder {
        function: entry.to_owned(),
        offset,
        code: code.to_vec(),
        which: WhichCalls::ALL,
        times: 1,
        used_up_by,
    }
}

fn count(guest: &Guest) -> FaultCount {
    let count = guest.isolator.fault_count("first").unwrap();
    assert_eq!(count.reached_ns.is_some(), count.reached > 0);
    FaultCount {
        reached_ns: None,
        ..count
    }
}

#[test]
fn a_fault_that_does_no_harm_is_used_up_by_the_call_that_comes_to_it() {
    let guest = Guest::start();
    guest.isolate("first").unwrap();
    let fault = order("first_counts", INC, &NOP, UsedUpBy::Reaching);
    let every_other = FaultOrder {
        which: WhichCalls::Every(2),
        ..fault
    };
    guest.isolator.order_fault("first", every_other).unwrap();
    let results = [(); 4].map(|()| guest.call(FIRST));
    assert_eq!(results, [1, 1, 2, 3], "the second call counts nothing");
    let expected = FaultCount {
        tried: 1,
        reached: 1,
        failed: 0,
        left: 0,
        reached_ns: None,
    };
    assert_eq!(count(&guest), expected);
    assert_eq!(guest.status("first").violations, 0);
}

#[test]
fn a_fault_that_comes_by_chance_comes_to_the_same_calls_by_the_same_seed() {
    let guest = Guest::start();
    guest.isolate("first").unwrap();
    let fault = order("first_counts", INC, &NOP, UsedUpBy::Reaching);
    let by_chance = |seed| FaultOrder {
        which: WhichCalls::Chance {
            millionths: 500_000,
            seed,
        },
        times: u64::MAX,
        ..fault.clone()
    };
    // Which of 40 calls count nothing.
    let struck = |seed| {
        guest
            .isolator
            .order_fault("first", by_chance(seed))
            .unwrap();
        let mut before = guest.call(FIRST);
        let struck = [(); 40].map(|()| {
            let now = guest.call(FIRST);
            let is_struck = std::mem::replace(&mut before, now) == now;
            u8::from(is_struck)
        });
        guest.isolator.withdraw_faults("first").unwrap();
        struck
    };
    let (first, second) = (struck(1), struck(2));
    assert_eq!(first, struck(1));
    assert_ne!(first, second);
    let often: u8 = first.into_iter().sum();
    assert!((10..=30).contains(&often), "{first:?}");
    assert_eq!(guest.status("first").violations, 0);
}

#[test]
fn a_fault_in_a_function_that_an_isolated_one_calls_comes_with_calls_of_that() {
    let guest = Guest::start();
    guest.isolate("first").unwrap();
    let entries = guest.status("first").entries;
    assert!(entries.iter().all(|entry| entry.name != "first_helps"));
    // The function has no gate in front.
    let fault = order("first_helps", INC - 5, &NOP, UsedUpBy::Reaching);
    guest.isolator.order_fault("first", fault).unwrap();
    // Of a function that does not call it.
    assert_eq!(guest.call(FIRST), 1);
    let mut expected = FaultCount {
        tried: 1,
        left: 1,
        ..FaultCount::default()
    };
    assert_eq!(count(&guest), expected);
    assert_eq!(guest.call(CALLS_OWN), 1, "it counts nothing");
    (expected.tried, expected.reached, expected.left) = (2, 1, 0);
    assert_eq!(count(&guest), expected);
    assert_eq!(guest.call(CALLS_OWN), 2);
    let fails = order("first_helps", INC - 5, &[0x0f, 0x0b], UsedUpBy::Reaching);
    guest.isolator.order_fault("first", fails).unwrap();
    assert_eq!(guest.call(CALLS_OWN), ERROR);
    assert_eq!(guest.call(CALLS_OWN), 3);
    let missing = order("first_misses", 0, &NOP, UsedUpBy::Reaching);
    let refused = guest.isolator.order_fault("first", missing).unwrap_err();
    assert!(refused.to_string().contains("no function first_misses"));
}

#[test]
fn a_fault_that_fails_its_call_was_come_to_and_is_counted_once() {
    let guest = Guest::start();
    guest.isolate("first").unwrap();
    for used_up_by in [UsedUpBy::Reaching, UsedUpBy::Failing] {
        let fault = order("first_counts", INC, &[0x0f, 0x0b], used_up_by);
        guest.isolator.order_fault("first", fault).unwrap();
        assert_eq!(guest.call(FIRST), ERROR);
        let count = count(&guest);
        assert_eq!(
            (count.tried, count.reached, count.failed, count.left),
            (1, 1, 1, 0)
        );
    }
    assert_eq!(guest.call(FIRST), 1);
}

#[test]
fn a_fault_that_is_not_on_the_calls_way_is_not_used_up() {
    let guest = Guest::start();
    guest.isolate("first").unwrap();
    let start = guest.isolator.instructions("first", "first_waits").unwrap();
    // The `ud2` of a call that is told to fail, of two bytes.
    let dead = start
        .iter()
        .find(|at| at.kind == isolation::dispatch::fault::InstructionKind::Dead);
    let offset = dead.unwrap().offset;
    let fault = order("first_waits", offset, &[0x66, 0x90], UsedUpBy::Reaching);
    guest.isolator.order_fault("first", fault).unwrap();
    assert_eq!(guest.call(WAITS), 7);
    let not_reached = FaultCount {
        tried: 1,
        reached: 0,
        failed: 0,
        left: 1,
        reached_ns: None,
    };
    assert_eq!(count(&guest), not_reached);
    guest.write(FAILS, 1);
    assert_eq!(guest.call(WAITS), 7, "what would have failed it is gone");
    assert_eq!(count(&guest).reached, 1);
    assert_eq!(guest.call(WAITS), ERROR);
}

fn sections() -> Vec<(String, u64)> {
    vec![(".text".into(), FIRST), (".data".into(), FIRST_DATA)]
}

fn first<'a>(sections: &'a [(String, u64)], symbols: &'a SymbolTable) -> LoadedModule<'a> {
    LoadedModule {
        name: "first",
        sections,
        symbols,
    }
}

fn counts_nothing() -> TextChange {
    TextChange {
        at: FIRST + INC,
        old: FIRST_CODE[INC as usize..INC as usize + 3].to_vec(),
        new: NOP.to_vec(),
    }
}

#[test]
fn a_function_is_read_without_its_gate_and_with_names_of_what_it_calls() {
    let guest = Guest::start();
    let (sections, symbols) = (sections(), symbols());
    let module = first(&sections, &symbols);
    let text = guest
        .isolator
        .function_text(module, "first_counts")
        .unwrap();
    assert_eq!(text.start, FIRST);
    assert!(text.code.starts_with(&FIRST_CODE));
    assert!(text.callees.is_empty());
    let calls = guest.isolator.function_text(module, "first_calls_second");
    let callees = calls.unwrap().callees;
    assert_eq!(
        callees.into_iter().collect::<Vec<_>>(),
        [(SECOND, "second_counts".to_owned())]
    );
    guest.isolate("first").unwrap();
    assert_eq!(
        guest
            .isolator
            .function_text(module, "first_counts")
            .unwrap(),
        text
    );
    for missing in ["second_counts", "kernel_loop", "nothing", "data"] {
        let refused = guest.isolator.function_text(module, missing).unwrap_err();
        assert!(refused.to_string().contains("has no function"), "{refused}");
    }
}

#[test]
fn a_fault_in_the_guests_own_text_waits_stays_and_goes() {
    let guest = Guest::start();
    let (sections, symbols) = (sections(), symbols());
    let module = first(&sections, &symbols);
    let isolator = &guest.isolator;
    assert_eq!(guest.call(FIRST), 1);
    isolator.set_text_fault(module, counts_nothing()).unwrap();
    let status = isolator.text_fault_status().unwrap();
    assert_eq!(
        (status.at, status.reached_ns, status.tells),
        (FIRST + INC, None, true)
    );
    // A snapshot would have the driver's own code.
    let clean: Vec<u8> = isolator
        .clean_bytes()
        .into_iter()
        .flat_map(|one| one.bytes)
        .collect();
    assert_eq!(clean, counts_nothing().old);
    let results = [(); 3].map(|()| guest.call(FIRST));
    assert_eq!(results, [1, 1, 1]);
    let reached = isolator.text_fault_status().unwrap();
    assert!(reached.reached_ns.is_some(), "{reached:?}");
    let again = isolator
        .set_text_fault(module, counts_nothing())
        .unwrap_err();
    assert!(again.to_string().contains("--undo"), "{again}");
    let refused = guest.isolate("first").unwrap_err();
    assert!(refused.to_string().contains("--undo"), "{refused}");
    assert_eq!(isolator.clear_text_fault().unwrap(), reached);
    assert_eq!(guest.call(FIRST), 2);
    assert!(isolator.clean_bytes().is_empty());
    assert!(
        isolator.clear_text_fault().is_err(),
        "there is none any more"
    );
    guest.isolate("first").unwrap();
    let refused = isolator
        .set_text_fault(module, counts_nothing())
        .unwrap_err();
    assert!(refused.to_string().contains("isolated"), "{refused}");
}

#[test]
fn a_fault_of_one_byte_is_there_at_once_and_does_not_tell() {
    let guest = Guest::start();
    let (sections, symbols) = (sections(), symbols());
    // `push %rbx` of a function that nobody calls meanwhile.
    let change = TextChange {
        at: WAITS + 5,
        old: vec![0x53],
        new: vec![0x90],
    };
    let isolator = &guest.isolator;
    isolator
        .set_text_fault(first(&sections, &symbols), change)
        .unwrap();
    let there = guest.handle.ram().memory().clone();
    let byte = || there.read_obj::<u8>(GuestAddress(gpa_of(WAITS + 5)));
    assert_eq!(byte().unwrap(), 0x90);
    assert!(!isolator.text_fault_status().unwrap().tells);
    isolator.clear_text_fault().unwrap();
    assert_eq!(byte().unwrap(), 0x53);
    assert_eq!(guest.call(WAITS), 7);
}

#[test]
fn what_is_not_the_code_that_was_looked_at_is_not_changed() {
    let guest = Guest::start();
    let (sections, symbols) = (sections(), symbols());
    let module = first(&sections, &symbols);
    let good = counts_nothing();
    let wrong = [
        TextChange {
            at: good.at + 1,
            ..good.clone()
        },
        TextChange {
            new: vec![0x90; 2],
            ..good.clone()
        },
        TextChange {
            old: Vec::new(),
            new: Vec::new(),
            ..good.clone()
        },
        TextChange {
            old: vec![0x90; 16],
            new: vec![0x90; 16],
            ..good.clone()
        },
        TextChange {
            at: SECOND + INC,
            ..good.clone()
        },
        TextChange {
            at: FIRST_DATA,
            ..good.clone()
        },
        TextChange {
            at: u64::MAX,
            ..good.clone()
        },
    ];
    for change in wrong {
        let refused = guest.isolator.set_text_fault(module, change.clone());
        assert!(refused.is_err(), "{change:x?}");
    }
    assert_eq!(guest.isolator.text_fault_status(), None);
    assert_eq!(guest.call(FIRST), 1);
}

#[test]
fn a_fault_in_the_guests_text_is_as_at_the_mark_after_a_rewind() {
    let guest = Guest::start();
    let (sections, symbols) = (sections(), symbols());
    let module = first(&sections, &symbols);
    let limit = Duration::from_secs(60);
    let isolator = &guest.isolator;
    guest.handle.mark("healthy", limit).unwrap();
    isolator.set_text_fault(module, counts_nothing()).unwrap();
    guest.handle.mark("waits", limit).unwrap();
    for _ in 0..3 {
        assert_eq!(guest.call(FIRST), 0);
        assert!(isolator.text_fault_status().unwrap().reached_ns.is_some());
        guest.handle.rewind(Some("waits"), limit).unwrap();
        assert_eq!(isolator.text_fault_status().unwrap().reached_ns, None);
        guest.handle.rewind(Some("healthy"), limit).unwrap();
        assert_eq!(isolator.text_fault_status(), None);
        assert_eq!(guest.call(FIRST), 1);
        guest.handle.rewind(Some("waits"), limit).unwrap();
    }
}
