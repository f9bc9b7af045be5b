//! What kernel functions answer calls with, on the host's real KVM.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::Domain;
use isolation::domain::supervisor::Answer;
use isolation::domain::transaction::{CallEnd, CallRequest, CallResult};
use kvm_bindings::kvm_regs;

/// Returns its first argument, and waits before that if the guest's word [`WAITS`] is not 0.
const ANSWERS: u64 = KERNEL_TEXT + 0x100;
/// One whose answers nobody asks for.
const OTHER: u64 = KERNEL_TEXT + 0x200;
const SCHEDULER: u64 = KERNEL_TEXT + 0x300;
const WAITS: u64 = KERNEL_DATA + 0x800;
/// The return gate.
const GATE: u64 = KERNEL_TEXT + 0xe02;

/// A driver that calls the two functions, the first one directly or by a pointer and then once
/// more with 0, and returns what the first call has returned.
fn guest(by_pointer: bool) -> (Guest, Domain) {
    let guest = Guest::new();
    guest.code(ANSWERS, |a| {
        let mut go_on = a.create_label();
        a.mov(rax, WAITS).unwrap();
        a.cmp(qword_ptr(rax), 0).unwrap();
        a.je(go_on).unwrap();
        a.mov(rax, SCHEDULER).unwrap();
        a.push(rdi).unwrap();
        a.call(rax).unwrap();
        a.pop(rdi).unwrap();
        a.set_label(&mut go_on).unwrap();
        a.mov(rax, rdi).unwrap();
        a.ret().unwrap();
    });
    guest.code(OTHER, |a| {
        a.mov(eax, 1).unwrap();
        a.ret().unwrap();
    });
    guest.code(SCHEDULER, |a| a.ret().unwrap());
    guest.code(DRIVER_TEXT, |a| {
        a.push(rbx).unwrap();
        a.mov(rax, ANSWERS).unwrap();
        match by_pointer {
            true => a.call(rax).unwrap(),
            false => a.call(ANSWERS).unwrap(),
        }
        a.mov(rbx, rax).unwrap();
        a.mov(rax, OTHER).unwrap();
        a.call(rax).unwrap();
        a.xor(edi, edi).unwrap();
        a.mov(rax, ANSWERS).unwrap();
        a.call(rax).unwrap();
        a.mov(rax, rbx).unwrap();
        a.pop(rbx).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.tell_answers([ANSWERS].into_iter());
    if !by_pointer {
        domain.redirect(DRIVER_TEXT + 11, ANSWERS).unwrap();
    }
    domain.trap_function(SCHEDULER).unwrap();
    (guest, domain)
}

fn kernel() -> Kernel {
    Kernel {
        kernel_functions: [ANSWERS, OTHER].into(),
        ..Kernel::default()
    }
}

fn request<'a>(guest: &'a Guest, regs: kvm_regs) -> CallRequest<'a> {
    CallRequest {
        regs,
        sregs: &guest.sregs,
        stack: guest.stack_around(regs.rsp),
        clock: None,
        vcpu: 0,
        function: DRIVER_TEXT,
        return_gate: Some(GATE),
        effects: None,
        sleep_limit: std::time::Duration::ZERO,
        budget: std::time::Duration::from_secs(300),
    }
}

fn begin(guest: &Guest, domain: &mut Domain, kernel: &mut Kernel) -> CallResult {
    let regs = kvm_regs {
        rdi: 0x1234,
        rsi: 0x5678,
        ..guest.entry_regs()
    };
    domain.call(&request(guest, regs), kernel).unwrap()
}

fn answer(at: u64) -> Answer {
    Answer {
        function: ANSWERS,
        at,
    }
}

#[test]
fn answers_are_told_with_what_the_function_was_called_with_and_calls_are_as_any_others() {
    for by_pointer in [false, true] {
        let (guest, mut domain) = guest(by_pointer);
        for _ in 0..3 {
            let mut kernel = kernel();
            let result = begin(&guest, &mut domain, &mut kernel);
            assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
            assert_eq!((result.regs.rax, result.regs.rbx), (0x1234, 0xb0b0));
            assert_eq!(result.stats.crossings, 3);
            assert_eq!(kernel.answers, [answer(0x1234), answer(0x5678)]);
            assert!(kernel.was_answered.is_empty());
        }
        // Nobody asks any more.
        domain.tell_answers(std::iter::empty());
        let mut kernel = kernel();
        let result = begin(&guest, &mut domain, &mut kernel);
        assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        assert!(kernel.answers.is_empty());
    }
}

#[test]
fn a_function_that_has_gone_on_in_the_guest_answers_when_the_call_comes_back() {
    let (guest, mut domain) = guest(false);
    guest.write(WAITS, 1);
    let mut kernel = kernel();
    let result = begin(&guest, &mut domain, &mut kernel);
    let CallEnd::Spilled(_, spilled) = &result.end else {
        panic!("{result:?}")
    };
    assert!(kernel.answers.is_empty());
    let back = kvm_regs {
        rsp: spilled.returns_with(),
        rip: GATE,
        rax: 0x4321,
        ..result.regs
    };
    // The second call of it waits, too.
    let mut call = spilled.clone();
    let second = domain
        .go_on(&mut call, &request(&guest, back), &mut kernel)
        .unwrap();
    assert_eq!(kernel.answers, [answer(0x4321)]);
    let CallEnd::Spilled(_, again) = &second.end else {
        panic!("{second:?}")
    };
    // What it was answered with before is still its own.
    assert!(kernel.was_answered.is_empty());
    let back = kvm_regs {
        rsp: again.returns_with(),
        rip: GATE,
        rax: 0x99,
        ..second.regs
    };
    let mut call = again.clone();
    let end = domain
        .go_on(&mut call, &request(&guest, back), &mut kernel)
        .unwrap();
    assert!(matches!(end.end, CallEnd::Committed), "{end:?}");
    assert_eq!(kernel.was_answered, [answer(0x4321)]);
    assert_eq!(kernel.answers, [answer(0x4321), answer(0x99)]);
    assert_eq!(end.regs.rax, 0x4321);
}

#[test]
fn what_a_call_back_calls_with_the_stack_pointer_of_a_function_is_no_return_of_that_one() {
    /// Words below the function's stack pointer that are in use.
    const WORDS: u64 = 16;
    const CALLED_BACK: u64 = DRIVER_TEXT + 0x100;
    const AGAIN: u64 = DRIVER_DATA + 0x100;
    const SAVED: u64 = DRIVER_DATA + 0x200;
    let guest = Guest::new();
    // Calls the driver back the first time, and returns its first argument.
    guest.code(ANSWERS, |a| {
        let mut end = a.create_label();
        a.test(rsi, rsi).unwrap();
        a.je(end).unwrap();
        a.push(rdi).unwrap();
        a.mov(rax, CALLED_BACK).unwrap();
        a.call(rax).unwrap();
        a.pop(rdi).unwrap();
        a.set_label(&mut end).unwrap();
        a.mov(rax, rdi).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rax, AGAIN).unwrap();
        a.mov(qword_ptr(rax), rsp).unwrap();
        a.mov(rax, ANSWERS).unwrap();
        a.call(rax).unwrap();
        a.ret().unwrap();
    });
    // Keeps what is below, calls the function from where it was called, and puts it back.
    guest.code(CALLED_BACK, |a| {
        a.mov(rdx, AGAIN).unwrap();
        a.mov(rdx, qword_ptr(rdx)).unwrap();
        a.mov(rcx, SAVED).unwrap();
        for word in 1..=WORDS as i32 {
            a.mov(rax, qword_ptr(rdx - 8 * word)).unwrap();
            a.mov(qword_ptr(rcx + 8 * word), rax).unwrap();
        }
        a.mov(qword_ptr(rcx), rsp).unwrap();
        a.mov(rsp, rdx).unwrap();
        a.mov(edi, 0x666).unwrap();
        a.xor(esi, esi).unwrap();
        a.mov(rax, ANSWERS).unwrap();
        a.call(rax).unwrap();
        a.mov(rdx, rsp).unwrap();
        a.mov(rcx, SAVED).unwrap();
        for word in 1..=WORDS as i32 {
            a.mov(rax, qword_ptr(rcx + 8 * word)).unwrap();
            a.mov(qword_ptr(rdx - 8 * word), rax).unwrap();
        }
        a.mov(rsp, qword_ptr(rcx)).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.tell_answers([ANSWERS].into_iter());
    let mut kernel = Kernel {
        driver_functions: [CALLED_BACK].into(),
        writable: vec![(DRIVER_DATA, 0x1000)],
        ..kernel()
    };
    let result = begin(&guest, &mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.stats.callbacks, 1);
    assert_eq!(kernel.answers, [answer(0x666), answer(0x1234)]);
}
