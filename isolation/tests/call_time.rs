//! What a call may take, of a hand-made guest, on the host's real KVM. How fast the machine is
//! makes no difference: the calls that are to take too long go on until they are ended.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::*;
use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions};
use isolation::domain::Domain;
use isolation::domain::transaction::{CallEnd, CallRequest, CallResult, PassThroughReason};
use isolation::domain::violation::ViolationKind;
use kvm_bindings::kvm_regs;
use std::time::Duration;

const WAITS: u64 = KERNEL_TEXT + 0x100;
const SCHEDULER: u64 = KERNEL_TEXT + 0x200;
const SLEEP: u64 = KERNEL_TEXT + 0x300;
const RETURN_GATE: u64 = DRIVER_TEXT + 2;
/// More than any call of these takes.
const PLENTY: Duration = Duration::from_secs(60);
/// What so many parts take at least: the budget is enough for some of them, and for far less than
/// can spill.
const SOME_PARTS: (u32, Duration) = (32, Duration::from_millis(16));
/// Many more parts than the budget is enough for.
const PARTS: u32 = 100_000;
/// What all parts of a call have together.
const BUDGET: Duration = Duration::from_millis(20);

/// A driver that works for so many turns and then calls `function`, so many times.
fn works_and_calls(guest: &Guest, turns: u32, parts: u32, function: u64) -> Domain {
    let mut code = CodeAssembler::new(64).unwrap();
    let mut part = code.create_label();
    let mut turn = code.create_label();
    code.push(rbx).unwrap();
    code.mov(ebx, parts).unwrap();
    code.set_label(&mut part).unwrap();
    code.mov(ecx, turns).unwrap();
    code.set_label(&mut turn).unwrap();
    code.dec(ecx).unwrap();
    code.jne(turn).unwrap();
    code.mov(edi, 1).unwrap();
    code.call(function).unwrap();
    code.dec(ebx).unwrap();
    code.jne(part).unwrap();
    code.pop(rbx).unwrap();
    code.ret().unwrap();
    guest.code(WAITS, |a| {
        a.call(SCHEDULER).unwrap();
        a.ret().unwrap();
    });
    guest.code(SCHEDULER, |a| a.ret().unwrap());
    // The guest's own function would never return.
    guest.code(SLEEP, |a| a.hlt().unwrap());
    domain_of(guest, &mut code)
}

/// A domain for this driver, with its calls redirected.
fn domain_of(guest: &Guest, code: &mut CodeAssembler) -> Domain {
    let bytes = code.assemble(DRIVER_TEXT).unwrap();
    guest.code(DRIVER_TEXT, |a| a.db(&bytes).unwrap());
    let mut domain = guest.domain();
    for instruction in &mut Decoder::with_ip(64, &bytes, DRIVER_TEXT, DecoderOptions::NONE) {
        if instruction.is_call_near() {
            let target = instruction.near_branch_target();
            domain.redirect(instruction.ip(), target).unwrap();
        }
    }
    domain.trap_function(SCHEDULER).unwrap();
    let unit = Duration::from_nanos(100);
    domain.sleep_function(SLEEP, unit).unwrap();
    domain
}

fn request(guest: &Guest, regs: kvm_regs, budget: Duration) -> CallRequest<'_> {
    CallRequest {
        regs,
        sregs: &guest.sregs,
        clock: None,
        vcpu: 0,
        stack: guest.stack_around(regs.rsp),
        function: DRIVER_TEXT,
        return_gate: Some(RETURN_GATE),
        effects: None,
        budget,
        sleep_limit: PLENTY,
    }
}

/// Runs a call to its end, its kernel functions returning in the guest at once.
fn run(guest: &Guest, domain: &mut Domain, budget: Duration) -> CallResult {
    let mut kernel = Kernel::with_data();
    let begin = request(guest, guest.entry_regs(), budget);
    let mut result = domain.call(&begin, &mut kernel).unwrap();
    while let CallEnd::Spilled(_, call) = &result.end {
        let regs = kvm_regs {
            rip: RETURN_GATE + 2,
            rsp: call.returns_with(),
            ..result.regs
        };
        let mut call = call.clone();
        let request = request(guest, regs, budget);
        result = domain.go_on(&mut call, &request, &mut kernel).unwrap();
    }
    result
}

/// What a call takes that comes to its end: the first run also makes everything ready, and any may
/// be disturbed.
fn shortest(guest: &Guest, domain: &mut Domain) -> Duration {
    let runs = [(); 4].map(|()| {
        let result = run(guest, domain, PLENTY);
        assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        result.time.own
    });
    runs.into_iter().min().unwrap()
}

/// A call whose parts are each much shorter than its budget, and together longer, is ended.
fn parts_share_the_budget(function: u64) -> CallResult {
    let guest = Guest::new();
    let (some, enough) = SOME_PARTS;
    let mut turns = 100;
    while shortest(&guest, &mut works_and_calls(&guest, turns, some, function)) < enough {
        turns *= 2;
    }
    let mut many = works_and_calls(&guest, turns, PARTS, function);
    let before = guest.all();
    let ended = run(&guest, &mut many, BUDGET);
    assert_eq!(violation_kind(&ended), ViolationKind::TimeBudget);
    assert!(guest.all() == before || violation(&ended).spills > 0);
    ended
}

#[test]
fn parts_of_a_call_that_goes_on_in_the_guest_share_its_time() {
    assert!(violation(&parts_share_the_budget(WAITS)).spills > 0);
}

#[test]
fn the_time_of_a_call_does_not_begin_anew_at_each_wait() {
    assert!(parts_share_the_budget(SLEEP).stats.sleeps > 0);
}

#[test]
fn what_the_host_does_for_a_call_is_not_the_calls_time() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DEVICE).unwrap();
        a.mov(eax, dword_ptr(rcx)).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let mut kernel = Kernel {
        device_works: Duration::from_secs(1),
        ..Kernel::with_data()
    };
    let request = request(&guest, guest.entry_regs(), kernel.device_works / 2);
    let result = domain.call(&request, &mut kernel).unwrap();
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert!(result.time.host > result.time.own, "{:?}", result.time);
}

#[test]
fn a_call_that_waits_at_two_places_in_turn_is_not_kept_waiting() {
    let guest = Guest::new();
    guest.code(SLEEP, |a| a.hlt().unwrap());
    let mut code = CodeAssembler::new(64).unwrap();
    let mut again = code.create_label();
    code.mov(ebx, 100_000).unwrap();
    code.set_label(&mut again).unwrap();
    for _ in 0..2 {
        code.mov(edi, 1).unwrap();
        code.call(SLEEP).unwrap();
    }
    code.dec(ebx).unwrap();
    code.jne(again).unwrap();
    code.ret().unwrap();
    let mut domain = domain_of(&guest, &mut code);
    let mut kernel = Kernel::with_data();
    let request = CallRequest {
        return_gate: None,
        sleep_limit: Duration::from_millis(20),
        ..request(&guest, guest.entry_regs(), PLENTY)
    };
    let before = guest.all();
    let result = domain.call(&request, &mut kernel).unwrap();
    let reason = match result.end {
        CallEnd::PassThrough(reason) => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(reason, PassThroughReason::Sleeps);
    // Each wait takes longer than it was asked for.
    assert!(result.time.waited > result.time.asked);
    assert!(guest.all() == before);
}
