//! Kernel functions that wait until the driver's call has ended: a hand-made guest on the host's real
//! KVM.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::Domain;
use isolation::domain::effects::{KernelCall, KernelEffects};
use isolation::domain::monitor::MAX_HANDED_OVER;
use isolation::domain::transaction::{CallEnd, CallRequest, CallResult};
use isolation::domain::violation::ViolationKind;
use isolation::guest::addr::{Gva, GvaRange};
use kvm_bindings::kvm_regs;
use std::time::Duration;

/// Takes something from the driver: counts in the kernel's data.
const TAKES: u64 = KERNEL_TEXT + 0x100;
/// What its callers are told as long as it waits.
const ANSWER: u32 = 3;
/// Another one, for which stores to the device wait.
const ENDS: u64 = KERNEL_TEXT + 0x200;
/// One that does not wait.
const COUNTS: u64 = KERNEL_TEXT + 0x300;
/// Calls the driver back.
const CALLS_BACK: u64 = KERNEL_TEXT + 0x400;
/// The function that it calls back.
const CALLED_BACK: u64 = DRIVER_TEXT + 0x800;

struct Bench {
    guest: Guest,
    domain: Domain,
    kernel: Kernel,
    effects: KernelEffects,
}

/// A kernel function that counts in the kernel's data at `offset`, and returns what is there.
fn counts(a: &mut CodeAssembler, offset: u64) {
    a.mov(rcx, KERNEL_DATA + offset).unwrap();
    a.inc(qword_ptr(rcx)).unwrap();
    a.mov(rax, qword_ptr(rcx)).unwrap();
    a.ret().unwrap();
}

impl Bench {
    /// A driver with this code, whose calls at these addresses are of these functions.
    fn new(build: impl FnOnce(&mut CodeAssembler), calls: &[(u64, u64)]) -> Self {
        Self::of(Guest::new(), build, calls)
    }

    fn of(guest: Guest, build: impl FnOnce(&mut CodeAssembler), calls: &[(u64, u64)]) -> Self {
        guest.code(TAKES, |a| counts(a, 0));
        guest.code(ENDS, |a| counts(a, 8));
        guest.code(COUNTS, |a| counts(a, 16));
        guest.code(CALLS_BACK, |a| {
            a.sub(rsp, 8).unwrap();
            a.call(CALLED_BACK).unwrap();
            a.add(rsp, 8).unwrap();
            a.ret().unwrap();
        });
        guest.code(DRIVER_TEXT, build);
        let mut domain = guest.domain();
        domain.let_wait([(TAKES, ANSWER), (ENDS, 1)].into());
        for (site, function) in calls {
            domain.redirect(*site, *function).unwrap();
        }
        let kernel = Kernel {
            may_hand_over: true,
            stores_wait_for: Some(ENDS),
            ..Kernel::with_data()
        };
        Self {
            guest,
            domain,
            kernel,
            effects: KernelEffects::default(),
        }
    }

    fn call(&mut self) -> CallResult {
        let regs = self.guest.entry_regs();
        self.call_with(regs)
    }

    fn call_with(&mut self, regs: kvm_regs) -> CallResult {
        let request = CallRequest {
            regs,
            sregs: &self.guest.sregs,
            stack: self.guest.stack_around(regs.rsp),
            clock: None,
            vcpu: 0,
            function: DRIVER_TEXT,
            return_gate: None,
            effects: Some(&self.effects),
            budget: Duration::from_secs(300),
            sleep_limit: Duration::from_millis(20),
        };
        self.domain.call(&request, &mut self.kernel).unwrap()
    }
}

/// `mov rdi, first; mov rsi, second; call function`, the call at the address that is returned.
fn gives(a: &mut CodeAssembler, function: u64, first: u64, second: u64) {
    a.mov(rdi, first).unwrap();
    a.mov(rsi, second).unwrap();
    a.call(function).unwrap();
}

/// Length of the two `mov`s, whose numbers do not fit 32 bits.
const MOVES: u64 = 20;
/// Length of all three.
const GIVES: u64 = MOVES + 5;
/// A number of that kind.
const A: u64 = 0x1234_5678_9abc;
const B: u64 = 0x1234_5678_0000;

#[test]
fn what_waits_is_told_in_order_and_nothing_of_it_was_done() {
    let mut bench = Bench::new(
        |a| {
            gives(a, TAKES, A, B);
            a.push(rax).unwrap();
            gives(a, COUNTS, A, B);
            gives(a, ENDS, B, A);
            a.pop(rcx).unwrap();
            a.shl(rcx, 8).unwrap();
            a.or(rax, rcx).unwrap();
            a.ret().unwrap();
        },
        &[
            (DRIVER_TEXT + MOVES, TAKES),
            (DRIVER_TEXT + GIVES + 1 + MOVES, COUNTS),
            (DRIVER_TEXT + 2 * GIVES + 1 + MOVES, ENDS),
        ],
    );
    let result = bench.call();
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.regs.rax, u64::from(ANSWER) << 8 | 1);
    let told: Vec<_> = result
        .handed_over
        .iter()
        .map(|call| (call.function, call.arguments[0], call.arguments[1]))
        .collect();
    assert_eq!(told, [(TAKES, A, B), (ENDS, B, A)]);
    assert_eq!((result.stats.handed_over, result.stats.crossings), (2, 1));
    let counted = |offset| bench.guest.read(KERNEL_DATA + offset);
    assert_eq!([counted(0), counted(8), counted(16)], [0, 0, 1]);
    // The next one begins with none.
    let again = bench.call();
    assert_eq!(again.handed_over.len(), 2);
}

/// A driver that gives something away, stores to its device before and behind the end, and writes
/// to its data.
fn stores_behind_the_end() -> Bench {
    stores_behind_the_end_in(Guest::new())
}

fn stores_behind_the_end_in(guest: Guest) -> Bench {
    Bench::of(
        guest,
        |a| {
            a.mov(rbx, DEVICE).unwrap();
            gives(a, TAKES, A, B);
            a.mov(dword_ptr(rbx), 1).unwrap();
            gives(a, ENDS, B, A);
            a.mov(dword_ptr(rbx + 4), 2).unwrap();
            a.mov(rbx, DRIVER_DATA).unwrap();
            a.inc(qword_ptr(rbx)).unwrap();
            a.mov(rbx, 0xb0b0u64).unwrap();
            a.ret().unwrap();
        },
        &[
            (DRIVER_TEXT + 10 + MOVES, TAKES),
            (DRIVER_TEXT + 10 + GIVES + 6 + MOVES, ENDS),
        ],
    )
}

#[test]
fn stores_behind_the_one_that_they_wait_for_are_told_and_those_before_it_are_made() {
    let mut bench = stores_behind_the_end();
    let result = bench.call();
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(bench.kernel.device_writes, [(DEVICE_GPA, 1, 4)]);
    let later: Vec<_> = result.later.iter().map(|s| (s.value, s.bytes)).collect();
    assert_eq!(later, [(2, 4)]);
    // Where nothing waits for it, all are made.
    bench.kernel.stores_wait_for = None;
    let result = bench.call();
    assert_eq!(
        (result.later.len(), bench.kernel.device_writes.len()),
        (0, 3)
    );
}

#[test]
fn what_may_not_wait_is_called_in_the_call_which_is_run_once_more() {
    let mut bench = stores_behind_the_end();
    bench.kernel.refused.insert(ENDS);
    for round in 1..=4 {
        let result = bench.call();
        assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        assert_eq!((result.handed_over.len(), result.later.len()), (0, 0));
        let counted = [0, 8].map(|offset| bench.guest.read(KERNEL_DATA + offset));
        assert_eq!(
            (counted, bench.guest.read(DRIVER_DATA)),
            ([round; 2], round)
        );
        assert_eq!(u64::from(bench.kernel.begun_again), round);
        assert_eq!(bench.kernel.device_writes.len() as u64, 2 * round);
    }
    // After some in a row it is not tried for a while.
    bench.kernel.refused.clear();
    assert_eq!(bench.call().stats.handed_over, 0);
    assert_eq!(bench.kernel.begun_again, 4);
    let mut tried = (0..100).filter(|_| bench.call().stats.handed_over > 0);
    assert!(tried.next().is_some());
}

#[test]
fn nothing_waits_where_it_may_not() {
    for (may, has_effects) in [(false, true), (true, false)] {
        let mut bench = stores_behind_the_end();
        bench.kernel.may_hand_over = may;
        let result = match has_effects {
            true => bench.call(),
            false => bench.guest.call(&mut bench.domain, &mut bench.kernel),
        };
        assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        assert_eq!((result.handed_over.len(), result.stats.crossings), (0, 2));
        assert_eq!(bench.guest.read(KERNEL_DATA), 1);
    }
    // A device that writes memory by itself.
    let mut guest = Guest::new();
    guest.moving = GvaRange::new(Gva(DIRECT_MAP), 1024 * PAGE);
    let mut bench = stores_behind_the_end_in(guest);
    let result = bench.call();
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!((result.handed_over.len(), result.stats.crossings), (0, 2));
}

#[test]
fn of_a_call_that_fails_nothing_is_handed_over() {
    let mut bench = Bench::new(
        |a| {
            gives(a, TAKES, A, B);
            a.ud2().unwrap();
        },
        &[(DRIVER_TEXT + MOVES, TAKES)],
    );
    let regs = bench.guest.entry_regs();
    let before = bench.guest.all();
    let result = bench.call_with(regs);
    assert!(
        matches!(violation_kind(&result), ViolationKind::Exception { .. }),
        "{result:?}"
    );
    assert_eq!((result.handed_over.len(), result.later.len()), (0, 0));
    assert!(bench.guest.all() == before);
}

#[test]
fn a_call_in_which_more_waits_than_there_is_room_for_calls_all_of_it_itself() {
    for (count, waits) in [(MAX_HANDED_OVER, true), (MAX_HANDED_OVER + 1, false)] {
        let mut bench = Bench::new(
            |a| {
                let mut top = a.create_label();
                a.mov(rbx, count).unwrap();
                a.set_label(&mut top).unwrap();
                gives(a, TAKES, A, B);
                a.dec(rbx).unwrap();
                a.jne(top).unwrap();
                a.mov(rbx, 0xb0b0u64).unwrap();
                a.ret().unwrap();
            },
            &[],
        );
        let site = (0..16)
            .map(|n| DRIVER_TEXT + MOVES + n)
            .find(|site| bench.guest.read(*site) as u8 == 0xe8)
            .unwrap();
        bench.domain.redirect(site, TAKES).unwrap();
        let result = bench.call();
        assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        let (expected, counted) = match waits {
            true => (count, 0),
            false => (0, count),
        };
        assert_eq!(result.handed_over.len() as u64, expected);
        assert_eq!(bench.guest.read(KERNEL_DATA), counted);
    }
}

#[test]
fn what_a_driver_gives_away_when_it_is_called_back_does_not_wait() {
    let mut bench = Bench::new(
        |a| {
            a.call(CALLS_BACK).unwrap();
            a.ret().unwrap();
        },
        &[(DRIVER_TEXT, CALLS_BACK), (CALLED_BACK + MOVES, TAKES)],
    );
    bench.guest.code(CALLED_BACK, |a| {
        gives(a, TAKES, A, B);
        a.ret().unwrap();
    });
    bench.kernel.driver_functions.insert(CALLED_BACK);
    let result = bench.call();
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(
        (result.handed_over.len(), bench.guest.read(KERNEL_DATA)),
        (0, 1)
    );
    assert_eq!(bench.kernel.begun_again, 1);
}

#[test]
fn notes_that_the_driver_writes_itself_are_looked_at_like_calls() {
    // Whatever it writes there, it is a call of a function that waits, or nothing waits.
    let mut bench = Bench::new(
        |a| {
            gives(a, TAKES, A, B);
            // The area of the monitor is right below the end of the modules' space.
            a.mov(rcx, 0xffff_ffff_fee0_0000u64 + 70 * PAGE + 32)
                .unwrap();
            a.mov(qword_ptr(rcx), 77).unwrap();
            a.ret().unwrap();
        },
        &[(DRIVER_TEXT + MOVES, TAKES)],
    );
    let result = bench.call();
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(
        (result.handed_over, bench.guest.read(KERNEL_DATA)),
        (Vec::<KernelCall>::new(), 1)
    );
}
