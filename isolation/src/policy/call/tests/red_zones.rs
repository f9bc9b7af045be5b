//! What lies behind the bytes that a call asked for is not its own.

use super::*;
use crate::domain::monitor::Asked;
use crate::domain::supervisor::Behind;

const FRESH: u64 = OBJECTS + 512;

fn asked(bytes: Option<u64>, flags: u64) -> [Asked; 1] {
    [Asked {
        at: FRESH,
        bytes,
        flags: Some(flags),
    }]
}

fn memory<'a>(now: &'a TestGuest, before: &'a TestGuest) -> CallMemory<'a, TestMemory> {
    CallMemory {
        private: now.virt(),
        before: MemoryBefore::new(before.virt().memory),
        stack: GvaRange::new(Gva(STACK), 0x2000),
        per_cpu_base: PER_CPU,
    }
}

/// Memory before a call that has been handed out the object at `FRESH`, and in it.
fn guests() -> (TestGuest, TestGuest) {
    let before = guest();
    let mut now = before.clone();
    now.put(Gva(FRESH + 128), &words(&[0]), DATA);
    (now, before)
}

#[test]
fn behind_what_a_call_asked_for_it_may_not_write_until_that_is_not_known_any_more() {
    let (now, before) = guests();
    let mut policy = policy(&before);
    let fresh = |policy: &mut DriverPolicy| {
        policy.begin("my_irq", [0; 6]);
        policy.asked_for(&memory(&now, &before), &asked(Some(200), 0));
    };
    let may = |policy: &mut DriverPolicy, at, bytes| ask(policy, &now, &before, at, bytes);
    fresh(&mut policy);
    assert!(may(&mut policy, FRESH, 200));
    for (at, bytes) in [(FRESH + 200, 1), (FRESH + 255, 1), (FRESH + 196, 8)] {
        assert!(!may(&mut policy, at, bytes), "{at:#x}");
    }
    assert_eq!(
        policy.owner(Gva(FRESH + 200)).unwrap().label,
        "behind 200 bytes that were asked for of kmalloc-256"
    );
    // Given back, or made longer.
    policy.asked_for(&memory(&now, &before), &asked(None, 0));
    assert!(may(&mut policy, FRESH, 256));
    policy.end(true);

    fresh(&mut policy);
    assert!(!may(&mut policy, FRESH, 256));
    policy.leave(&memory(&now, &before), &[]);
    assert!(may(&mut policy, FRESH, 256), "who knows, by then");
    policy.end(true);

    fresh(&mut policy);
    policy.end(true);
    policy.begin("my_irq", [0; 6]);
    assert!(may(&mut policy, FRESH, 256), "in a later call");
    policy.begin_again(&mut memory(&now, &before));
    policy.asked_for(&memory(&now, &before), &asked(Some(100), 0));
    policy.begin_again(&mut memory(&now, &before));
    assert!(may(&mut policy, FRESH, 256), "in another run");
}

#[test]
fn of_what_is_not_as_it_seems_nothing_is_guarded() {
    let (now, before) = guests();
    let mut policy = policy(&before);
    policy.begin("my_irq", [0; 6]);
    let all = [
        // Nothing, all of it, more, an error, the middle of an object, no memory, whole pages.
        (FRESH, Some(0)),
        (FRESH, Some(256)),
        (FRESH, Some(u64::MAX)),
        (0, Some(8)),
        (u64::MAX - 11, Some(8)),
        (FRESH + 16, Some(8)),
        (BASES, Some(8)),
        (HEAD, Some(100)),
    ];
    for (at, bytes) in all {
        let flags = Some(0x100);
        policy.asked_for(&memory(&now, &before), &[Asked { at, bytes, flags }]);
    }
    assert_eq!(policy.behind_asked().count(), 0);
    assert!(ask(&mut policy, &now, &before, FRESH, 256));
}

#[test]
fn memory_that_was_zeroed_is_known_by_its_flags_its_function_and_the_kernels_own() {
    let (mut now, before) = guests();
    let zeroed = |policy: &mut DriverPolicy, now: &TestGuest, flags| {
        let asked = [Asked {
            at: FRESH,
            bytes: Some(40),
            flags,
        }];
        policy.begin("my_irq", [0; 6]);
        policy.asked_for(&memory(now, &before), &asked);
        let found: Vec<Behind> = policy.behind_asked().collect();
        policy.end(true);
        found
    };
    let mut policy = policy(&before);
    let behind = vec![Behind {
        range: GvaRange::new(Gva(FRESH + 40), 216).unwrap(),
        is_red_zone: false,
    }];
    assert_eq!(zeroed(&mut policy, &now, Some(0xcc0)), []);
    assert_eq!(zeroed(&mut policy, &now, Some(0xdc0)), behind);
    assert_eq!(zeroed(&mut policy, &now, None), behind);
    policy.init_on_alloc = Some(Gva(BASES + 0x80));
    now.put(Gva(BASES + 0x80), &words(&[0]), DATA);
    assert_eq!(zeroed(&mut policy, &now, Some(0xcc0)), []);
    now.put(Gva(BASES + 0x80), &words(&[1]), DATA);
    assert_eq!(zeroed(&mut policy, &now, Some(0xcc0)), behind);
}
