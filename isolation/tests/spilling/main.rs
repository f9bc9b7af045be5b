//! Calls that go on in the guest, of a hand-made guest, on the host's real KVM. The guest's vCPU is
//! played by the tests: they look at the registers and the stack that it would go on with and write
//! what it would.

#![allow(clippy::unwrap_used, reason = "test code")]

#[path = "../common/mod.rs"]
mod common;
mod console;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::Domain;
use isolation::domain::console::Console;
use isolation::domain::transaction::{
    CallEnd, CallRequest, CallResult, PassThroughReason, SpilledCall,
};
use isolation::domain::violation::ViolationKind;
use isolation::domain::waiting::Waiting;
use kvm_bindings::kvm_regs;
use std::time::Duration;

/// A kernel function that counts in the kernel's data and then calls the scheduler.
const WAITS: u64 = KERNEL_TEXT + 0x100;
const SCHEDULER: u64 = KERNEL_TEXT + 0x200;
/// Where the guest's vCPU comes back to the domain.
const RETURN_GATE: u64 = DRIVER_TEXT + 2;

fn waits(guest: &Guest) {
    guest.code(WAITS, |a| {
        a.mov(rcx, KERNEL_DATA).unwrap();
        a.inc(qword_ptr(rcx)).unwrap();
        a.call(SCHEDULER).unwrap();
        a.ret().unwrap();
    });
    guest.code(SCHEDULER, |a| a.ret().unwrap());
}

/// A driver that adds 1 to its data, waits, and adds what the wait returned; then it runs `then`.
fn driver(guest: &Guest, then: impl FnOnce(&mut CodeAssembler)) -> Domain {
    waits(guest);
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DRIVER_DATA).unwrap();
        a.add(qword_ptr(rcx), 1).unwrap();
        a.call(WAITS).unwrap();
        a.mov(rcx, DRIVER_DATA).unwrap();
        a.add(qword_ptr(rcx), rax).unwrap();
        then(a);
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 14, WAITS).unwrap();
    domain.trap_function(SCHEDULER).unwrap();
    domain
}

fn request<'a>(guest: &'a Guest, regs: kvm_regs) -> CallRequest<'a> {
    CallRequest {
        regs,
        sregs: &guest.sregs,
        stack: guest.stack_around(regs.rsp),
        clock: None,
        vcpu: 0,
        function: DRIVER_TEXT,
        return_gate: Some(RETURN_GATE),
        effects: None,
        budget: Duration::from_secs(5),
        sleep_limit: Duration::ZERO,
    }
}

fn begin(guest: &Guest, domain: &mut Domain, kernel: &mut Kernel, regs: kvm_regs) -> CallResult {
    domain.call(&request(guest, regs), kernel).unwrap()
}

fn spilled(result: &CallResult) -> &SpilledCall {
    match &result.end {
        CallEnd::Spilled(PassThroughReason::TrappedFunction, call) => call,
        other => panic!("expected a spilled call, got {other:?}"),
    }
}

/// The guest's vCPU when `WAITS` has returned `value` to the return gate.
fn back(result: &CallResult, value: u64) -> kvm_regs {
    kvm_regs {
        rax: value,
        rip: RETURN_GATE + 2,
        rsp: spilled(result).returns_with(),
        ..result.regs
    }
}

fn go_on(
    guest: &Guest,
    domain: &mut Domain,
    kernel: &mut Kernel,
    before: &CallResult,
) -> CallResult {
    let regs = back(before, 100);
    let mut call = spilled(before).clone();
    domain
        .go_on(&mut call, &request(guest, regs), kernel)
        .unwrap()
}

#[test]
fn a_call_that_must_wait_goes_on_in_the_guest_and_comes_back() {
    let guest = Guest::new();
    let mut domain = driver(&guest, |a| {
        a.mov(eax, 7).unwrap();
        a.ret().unwrap();
    });
    let mut kernel = Kernel::with_data();
    let regs = guest.entry_regs();
    let result = begin(&guest, &mut domain, &mut kernel, regs);
    // The guest enters the scheduler with all that was done so far, and comes back through the
    // gate.
    assert_eq!(result.regs.rip, SCHEDULER);
    assert_eq!(guest.read(DRIVER_DATA), 1);
    assert_eq!(guest.read(KERNEL_DATA), 1);
    assert_eq!(guest.read(result.regs.rsp), WAITS + 18, "inside WAITS");
    assert_eq!(guest.read(result.regs.rsp + 8), RETURN_GATE);
    assert_eq!(guest.read(regs.rsp), CALLER, "for whoever walks the stack");
    // Meanwhile others change memory.
    guest.write(DRIVER_DATA, 1000);
    let end = go_on(&guest, &mut domain, &mut kernel, &result);
    assert!(matches!(end.end, CallEnd::Committed), "{end:?}");
    assert_eq!(guest.read(DRIVER_DATA), 1100);
    assert_eq!((end.regs.rax, end.regs.rip), (7, CALLER));
    assert_eq!(end.regs.rsp, regs.rsp + 8);
    assert_eq!((end.regs.rbx, end.regs.r15), (0xb0b0, 15));
}

#[test]
fn without_a_return_gate_the_call_is_given_back_whole() {
    let guest = Guest::new();
    let mut domain = driver(&guest, |a| a.ret().unwrap());
    let regs = guest.entry_regs();
    let before = guest.all();
    let result = guest.call_with(&mut domain, &mut Kernel::with_data(), regs);
    assert!(
        matches!(
            result.end,
            CallEnd::PassThrough(PassThroughReason::TrappedFunction)
        ),
        "{result:?}"
    );
    assert!(guest.all() == before);
}

#[test]
fn a_fault_after_a_spill_undoes_what_came_after_it_and_says_so() {
    let guest = Guest::new();
    let mut domain = driver(&guest, |a| {
        a.xor(eax, eax).unwrap();
        a.mov(rax, qword_ptr(rax)).unwrap();
        a.ret().unwrap();
    });
    let mut kernel = Kernel::with_data();
    let regs = guest.entry_regs();
    let result = begin(&guest, &mut domain, &mut kernel, regs);
    let before = guest.all();
    let end = go_on(&guest, &mut domain, &mut kernel, &result);
    assert!(
        matches!(
            violation_kind(&end),
            ViolationKind::Exception { vector: 14, .. }
        ),
        "{end:?}"
    );
    assert_eq!(violation(&end).spills, 1);
    assert!(guest.all() == before);
    assert_eq!((end.regs.rip, end.regs.rsp), (CALLER, regs.rsp + 8));
    assert_eq!((end.regs.rbx, end.regs.r15), (0xb0b0, 15));
}

#[test]
fn several_calls_on_several_stacks_are_open_at_once() {
    let guest = Guest::new();
    let mut domain = driver(&guest, |a| a.ret().unwrap());
    let mut kernel = Kernel::with_data();
    let first = guest.entry_regs();
    let second = kvm_regs {
        rsp: STACK + 2 * PAGE - 0x208,
        rbx: 0xc0c0,
        ..first
    };
    guest.write(second.rsp, CALLER + 0x10);
    let one = begin(&guest, &mut domain, &mut kernel, first);
    let two = begin(&guest, &mut domain, &mut kernel, second);
    assert_ne!(spilled(&one).returns_with(), spilled(&two).returns_with());
    // They come back in the order in which they began, not in that of a stack.
    let one = go_on(&guest, &mut domain, &mut kernel, &one);
    let two = go_on(&guest, &mut domain, &mut kernel, &two);
    assert!(matches!(one.end, CallEnd::Committed), "{one:?}");
    assert!(matches!(two.end, CallEnd::Committed), "{two:?}");
    assert_eq!((one.regs.rip, one.regs.rbx), (CALLER, 0xb0b0));
    assert_eq!((two.regs.rip, two.regs.rbx), (CALLER + 0x10, 0xc0c0));
    assert_eq!(guest.read(DRIVER_DATA), 202);
}

#[test]
fn one_call_may_go_on_in_the_guest_again_and_again() {
    let guest = Guest::new();
    waits(&guest);
    guest.code(DRIVER_TEXT, |a| {
        a.call(WAITS).unwrap();
        a.call(WAITS).unwrap();
        a.jmp(WAITS).unwrap();
    });
    let mut domain = guest.domain();
    for offset in [0, 5, 10] {
        domain.redirect(DRIVER_TEXT + offset, WAITS).unwrap();
    }
    domain.trap_function(SCHEDULER).unwrap();
    let mut kernel = Kernel::default();
    let regs = guest.entry_regs();
    let mut result = begin(&guest, &mut domain, &mut kernel, regs);
    for time in 1..3 {
        assert_eq!(spilled(&result).spills(), time);
        result = go_on(&guest, &mut domain, &mut kernel, &result);
    }
    // The last one was called in the function's place: it returns to the function's caller.
    assert_eq!(guest.read(regs.rsp), RETURN_GATE);
    assert_eq!(spilled(&result).returns_with(), regs.rsp + 8);
    let end = go_on(&guest, &mut domain, &mut kernel, &result);
    assert!(matches!(end.end, CallEnd::Committed), "{end:?}");
    assert_eq!((end.regs.rip, end.regs.rax), (CALLER, 100));
    assert_eq!(guest.read(KERNEL_DATA), 3);
}

/// A kernel function that calls the driver back, which waits.
fn waits_in_a_call_back(guest: &Guest) -> Domain {
    waits(guest);
    let calls_back = KERNEL_TEXT + 0x300;
    let callback = DRIVER_TEXT + 0x100;
    guest.code(calls_back, |a| {
        a.mov(rax, callback).unwrap();
        a.call(rax).unwrap();
        a.mov(rcx, KERNEL_DATA).unwrap();
        a.add(qword_ptr(rcx), rax).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.call(calls_back).unwrap();
        a.mov(eax, 9).unwrap();
        a.ret().unwrap();
    });
    guest.code(callback, |a| {
        a.call(WAITS).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT, calls_back).unwrap();
    domain.redirect(callback, WAITS).unwrap();
    domain.trap_function(SCHEDULER).unwrap();
    domain
}

#[test]
fn a_call_back_may_wait() {
    let guest = Guest::new();
    let mut domain = waits_in_a_call_back(&guest);
    let mut kernel = Kernel {
        driver_functions: [DRIVER_TEXT + 0x100].into(),
        ..Default::default()
    };
    let regs = guest.entry_regs();
    let result = begin(&guest, &mut domain, &mut kernel, regs);
    let end = go_on(&guest, &mut domain, &mut kernel, &result);
    assert!(matches!(end.end, CallEnd::Committed), "{end:?}");
    assert_eq!(guest.read(KERNEL_DATA), 101);
    assert_eq!((end.regs.rax, end.regs.rip), (9, CALLER));
}

/// `mount_bdev`, in which `fill_super` waits.
#[test]
fn what_a_kernel_function_writes_after_a_call_back_that_waited_is_not_laid_at_the_drivers_door() {
    let guest = Guest::new();
    let mut domain = waits_in_a_call_back(&guest);
    // The driver writes beside what the kernel function does then.
    guest.code(DRIVER_TEXT + 0x100, |a| {
        a.call(WAITS).unwrap();
        a.mov(rcx, KERNEL_DATA + 0x100).unwrap();
        a.inc(qword_ptr(rcx)).unwrap();
        a.ret().unwrap();
    });
    let mut kernel = Kernel {
        driver_functions: [DRIVER_TEXT + 0x100].into(),
        writable: vec![(KERNEL_DATA + 0x100, 8)],
        ..Default::default()
    };
    for times in 1..=2 {
        let result = begin(&guest, &mut domain, &mut kernel, guest.entry_regs());
        let end = go_on(&guest, &mut domain, &mut kernel, &result);
        assert!(matches!(end.end, CallEnd::Committed), "{end:?}");
        assert_eq!(guest.read(KERNEL_DATA + 0x100), times);
    }
}

#[test]
fn a_call_that_is_handed_over_has_the_drivers_own_return_addresses() {
    let guest = Guest::new();
    let mut domain = waits_in_a_call_back(&guest);
    let mut kernel = Kernel {
        driver_functions: [DRIVER_TEXT + 0x100].into(),
        ..Default::default()
    };
    let regs = guest.entry_regs();
    let result = begin(&guest, &mut domain, &mut kernel, regs);
    let resume_at = domain.hand_over(spilled(&result));
    assert_eq!(resume_at, DRIVER_TEXT + 0x105);
    // From the scheduler outwards: WAITS, the call-back, the kernel function, the driver, its
    // caller.
    let expected = [
        WAITS + 18,
        DRIVER_TEXT + 0x105,
        KERNEL_TEXT + 0x300 + 12,
        DRIVER_TEXT + 5,
        CALLER,
    ];
    for (at, address) in (result.regs.rsp..).step_by(8).zip(expected) {
        assert_eq!(guest.read(at), address);
    }
}

#[test]
fn what_the_driver_got_while_the_call_was_in_the_guest_is_told() {
    let guest = Guest::new();
    let mut domain = driver(&guest, |a| a.ret().unwrap());
    let mut kernel = Kernel::with_data();
    let result = begin(&guest, &mut domain, &mut kernel, guest.entry_regs());
    go_on(&guest, &mut domain, &mut kernel, &result);
    assert_eq!(kernel.returned, [100]);
}

#[test]
fn what_the_call_holds_when_it_goes_on_in_the_guest_is_told() {
    let guest = Guest::new();
    waits(&guest);
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rbx, 0x1111_u64).unwrap();
        a.mov(rax, 0x2222_u64).unwrap();
        a.push(rax).unwrap();
        a.call(WAITS).unwrap();
        a.pop(rax).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 21, WAITS).unwrap();
    domain.trap_function(SCHEDULER).unwrap();
    let mut kernel = Kernel::with_data();
    let result = begin(&guest, &mut domain, &mut kernel, guest.entry_regs());
    spilled(&result);
    for value in [0x1111, 0x2222] {
        assert!(kernel.held.contains(&value), "{:x?}", kernel.held);
    }
}

#[test]
fn an_exception_that_the_kernel_expects_is_taken_by_the_guest_at_its_instruction() {
    let guest = Guest::new();
    let function = KERNEL_TEXT + 0x400;
    guest.code(function, |a| {
        a.push(rbp).unwrap();
        a.xor(eax, eax).unwrap();
        a.mov(rax, qword_ptr(rax)).unwrap();
        a.pop(rbp).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.call(function).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT, function).unwrap();
    let mut kernel = Kernel {
        kernel_exception_expected: true,
        ..Default::default()
    };
    let regs = guest.entry_regs();
    let result = begin(&guest, &mut domain, &mut kernel, regs);
    assert!(
        matches!(
            result.end,
            CallEnd::Spilled(PassThroughReason::KernelException, _)
        ),
        "{result:?}"
    );
    assert_eq!(
        (result.regs.rip, result.regs.rsp),
        (function + 3, regs.rsp - 16)
    );
    assert_eq!(guest.read(regs.rsp - 8), RETURN_GATE);
}

#[test]
fn an_access_to_another_device_is_made_by_the_guest() {
    let guest = Guest::new();
    let function = KERNEL_TEXT + 0x400;
    guest.code(function, |a| {
        a.mov(rcx, OTHER_DEVICE).unwrap();
        a.mov(eax, dword_ptr(rcx)).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.call(function).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT, function).unwrap();
    let mut kernel = Kernel::default();
    let result = begin(&guest, &mut domain, &mut kernel, guest.entry_regs());
    assert!(
        matches!(
            result.end,
            CallEnd::Spilled(PassThroughReason::OtherDevice, _)
        ),
        "{result:?}"
    );
    assert_eq!(
        (result.regs.rip, result.regs.rcx),
        (function + 10, OTHER_DEVICE)
    );
}

#[test]
fn a_breakpoint_in_the_kernels_code_is_met_by_the_guest() {
    let guest = Guest::new();
    let function = KERNEL_TEXT + 0x400;
    guest.code(function, |a| {
        a.mov(eax, 1).unwrap();
        a.int3().unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.call(function).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT, function).unwrap();
    let mut kernel = Kernel {
        kernel_exception_expected: true,
        ..Default::default()
    };
    let result = begin(&guest, &mut domain, &mut kernel, guest.entry_regs());
    assert!(
        matches!(
            result.end,
            CallEnd::Spilled(
                PassThroughReason::KernelException | PassThroughReason::Halt,
                _
            )
        ),
        "{result:?}"
    );
    assert_eq!(
        result.regs.rip,
        function + 5,
        "at the breakpoint, not behind it"
    );
}
