//! Calls that wait, of a hand-made guest, on the host's real KVM.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::transaction::{CallEnd, CallRequest, PassThroughReason};
use std::time::Duration;

const SLEEP: u64 = KERNEL_TEXT + 0x100;
const YIELD: u64 = KERNEL_TEXT + 0x200;

/// A driver that calls `SLEEP` with `count`, `times` times, and then adds 5 to its data.
fn sleeper(guest: &Guest, count: u32, times: u32) -> isolation::domain::Domain {
    // The guest's own function would never return.
    guest.code(SLEEP, |a| a.hlt().unwrap());
    guest.code(DRIVER_TEXT, |a| {
        let mut again = a.create_label();
        a.mov(ebx, times).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(edi, count).unwrap();
        a.call(SLEEP).unwrap();
        a.dec(ebx).unwrap();
        a.jne(again).unwrap();
        a.mov(rcx, DRIVER_DATA).unwrap();
        a.add(qword_ptr(rcx), 5).unwrap();
        a.mov(ebx, 0xb0b0).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 10, SLEEP).unwrap();
    domain
        .sleep_function(SLEEP, Duration::from_micros(100))
        .unwrap();
    domain
}

#[test]
fn a_call_that_waits_a_little_stays_atomic() {
    let guest = Guest::new();
    let mut domain = sleeper(&guest, 7, 3);
    let start = std::time::Instant::now();
    // Timers are late on a busy host.
    let regs = guest.entry_regs();
    let request = CallRequest {
        regs,
        sregs: &guest.sregs,
        clock: None,
        vcpu: 0,
        stack: guest.stack_around(regs.rsp),
        function: DRIVER_TEXT,
        return_gate: None,
        effects: None,
        budget: Duration::from_secs(5),
        sleep_limit: Duration::from_secs(10),
    };
    let result = domain.call(&request, &mut Kernel::with_data()).unwrap();
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!((result.stats.sleeps, result.stats.slept_us), (3, 2100));
    assert!(start.elapsed() >= Duration::from_micros(2100));
    assert_eq!(guest.read(DRIVER_DATA), 5);
}

#[test]
fn a_call_that_waits_too_long_is_given_back_to_the_guest() {
    let guest = Guest::new();
    for (count, times) in [(u32::MAX, 1), (100, 3), (1, 17)] {
        let mut domain = sleeper(&guest, count, times);
        let regs = guest.entry_regs();
        let before = guest.all();
        let result = guest.call_with(&mut domain, &mut Kernel::with_data(), regs);
        assert!(
            matches!(result.end, CallEnd::PassThrough(PassThroughReason::Sleeps)),
            "{result:?}"
        );
        assert!(guest.all() == before);
    }
}

#[test]
fn nobody_else_is_let_run_inside_a_call() {
    let guest = Guest::new();
    guest.code(YIELD, |a| a.hlt().unwrap());
    guest.code(DRIVER_TEXT, |a| {
        a.mov(eax, 1).unwrap();
        a.call(YIELD).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 5, YIELD).unwrap();
    domain.skip_function(YIELD).unwrap();
    let result = guest.call(&mut domain, &mut Kernel::default());
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.regs.rax, 0);
}

/// A kernel function that sets up an interrupt: it stores to the interrupt controller, reads it
/// back, and writes the timer's register.
fn sets_up_an_interrupt(guest: &Guest) -> isolation::domain::Domain {
    let function = KERNEL_TEXT + 0x300;
    guest.code(function, |a| {
        a.mov(rcx, OTHER_DEVICE + 0x10).unwrap();
        a.mov(dword_ptr(rcx), 0x1234).unwrap();
        a.mov(eax, dword_ptr(rcx)).unwrap();
        a.push(rax).unwrap();
        a.mov(ecx, 0x6e0).unwrap();
        a.mov(eax, 0x77).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.pop(rax).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.call(function).unwrap();
        a.mov(rcx, DRIVER_DATA).unwrap();
        a.mov(rdx, qword_ptr(rcx)).unwrap();
        a.mov(rdx, qword_ptr(rdx)).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT, function).unwrap();
    domain
}

#[test]
fn the_interrupt_controller_is_written_when_the_call_commits() {
    let guest = Guest::new();
    let mut domain = sets_up_an_interrupt(&guest);
    guest.write(DRIVER_DATA, DRIVER_DATA);
    let mut kernel = Kernel {
        platform: true,
        ..Kernel::with_data()
    };
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.regs.rax, 0x1234);
    let written = [(OTHER_DEVICE_GPA + 0x10, 0x1234), (0x6e0, 0x77)];
    assert_eq!(kernel.platform_written, written);
}

#[test]
fn an_aborted_call_never_reaches_the_interrupt_controller() {
    let guest = Guest::new();
    let mut domain = sets_up_an_interrupt(&guest);
    guest.write(DRIVER_DATA, 0);
    let mut kernel = Kernel {
        platform: true,
        ..Kernel::with_data()
    };
    let result = guest.call(&mut domain, &mut kernel);
    assert_eq!(violation(&result).rip, DRIVER_TEXT + 18, "{result:?}");
    assert_eq!(kernel.platform_written, []);
}

#[test]
fn without_an_interrupt_controller_of_ours_the_guest_runs_the_call() {
    let guest = Guest::new();
    let mut domain = sets_up_an_interrupt(&guest);
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    assert!(
        matches!(
            result.end,
            CallEnd::PassThrough(PassThroughReason::OtherDevice)
        ),
        "{result:?}"
    );
}
