//! What a call leaves in the processor, or in the middle of something, on the host's real KVM.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::transaction::{CallEnd, CallResult};
use isolation::domain::violation::ViolationKind;

#[test]
fn what_the_callee_must_keep_is_checked() {
    for (code, expected) in [
        // cli; ret
        (&[0xfau8, 0xc3][..], ViolationKind::InterruptFlag),
        // inc rbx; ret
        (
            &[0x48, 0xff, 0xc3, 0xc3],
            ViolationKind::CalleeSavedRegister,
        ),
        // std; ret
        (
            &[0xfd, 0xc3],
            ViolationKind::SystemFlags { changed: 1 << 10 },
        ),
        // pushfq; or dword [rsp], 0x44000; popfq; ret
        (
            &[0x9c, 0x81, 0x0c, 0x24, 0, 0x40, 4, 0, 0x9d, 0xc3],
            ViolationKind::SystemFlags {
                changed: 1 << 18 | 1 << 14,
            },
        ),
    ] {
        let guest = Guest::new();
        guest.code(DRIVER_TEXT, |a| a.db(code).unwrap());
        let mut domain = guest.domain();
        let result = guest.call(&mut domain, &mut Kernel::with_data());
        assert_eq!(violation_kind(&result), expected);
    }
}

#[test]
fn what_a_call_back_must_keep_is_checked() {
    let (calls_back, callback) = (KERNEL_TEXT + 0x100, DRIVER_TEXT + 0x400);
    // std; ret - inc rbx; ret
    for (code, expected) in [
        (
            &[0xfdu8, 0xc3][..],
            ViolationKind::SystemFlags { changed: 1 << 10 },
        ),
        (
            &[0x48, 0xff, 0xc3, 0xc3],
            ViolationKind::CalleeSavedRegister,
        ),
    ] {
        let guest = guest_that_calls_back(calls_back, callback);
        guest.code(callback, |a| a.db(code).unwrap());
        let result = call_back(&guest, calls_back, callback);
        assert_eq!(violation_kind(&result), expected);
        assert_eq!(violation(&result).rip, callback);
    }
}

/// A guest whose driver has the kernel function `calls_back` call `callback`.
fn guest_that_calls_back(calls_back: u64, callback: u64) -> Guest {
    let guest = Guest::new();
    guest.code(calls_back, |a| {
        a.sub(rsp, 8).unwrap();
        a.call(rdi).unwrap();
        a.add(rsp, 8).unwrap();
        a.cld().unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.push(rbx).unwrap();
        a.mov(rdi, callback).unwrap();
        a.call(calls_back).unwrap();
        a.pop(rbx).unwrap();
        a.ret().unwrap();
    });
    guest
}

fn call_back(guest: &Guest, calls_back: u64, callback: u64) -> CallResult {
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 11, calls_back).unwrap();
    let mut kernel = Kernel::with_data();
    kernel.driver_functions.insert(callback);
    guest.call(&mut domain, &mut kernel)
}

#[test]
fn a_stack_that_the_kernel_cannot_call_back_on_is_the_drivers_fault() {
    let (calls_back, callback) = (KERNEL_TEXT + 0x100, DRIVER_TEXT + 0x400);
    for wild in [4, DEVICE - STACK_TOP + 0x108] {
        let guest = guest_that_calls_back(calls_back, callback);
        guest.code(calls_back, |a| {
            a.mov(rax, wild).unwrap();
            a.add(rsp, rax).unwrap();
            a.jmp(rdi).unwrap();
        });
        guest.code(callback, |a| a.ret().unwrap());
        let result = call_back(&guest, calls_back, callback);
        let ViolationKind::UnbalancedStack { .. } = violation_kind(&result) else {
            panic!("{result:?}")
        };
    }
}

#[test]
fn the_kernel_never_runs_with_the_direction_flag_of_the_driver() {
    let guest = Guest::new();
    let fills = KERNEL_TEXT + 0x100;
    guest.code(fills, |a| {
        a.mov(rdi, KERNEL_DATA + 8).unwrap();
        a.mov(ecx, 8).unwrap();
        a.mov(al, 0x41).unwrap();
        a.rep().stosb().unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.std().unwrap();
        a.call(fills).unwrap();
        a.cld().unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 1, fills).unwrap();
    let result = guest.call(&mut domain, &mut Kernel::default());
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(guest.read(KERNEL_DATA), 0);
    assert_eq!(guest.read(KERNEL_DATA + 8), 0x4141_4141_4141_4141);
}

#[test]
fn control_registers_that_a_failed_call_changed_are_the_guests_again() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.db(&[0xeb, 0x3e]).unwrap();
    });
    // Clears CR0.WP, and faults.
    guest.code(DRIVER_TEXT + 0x40, |a| {
        a.mov(rax, cr0).unwrap();
        a.and(eax, !(1 << 16)).unwrap();
        a.mov(cr0, rax).unwrap();
        a.xor(eax, eax).unwrap();
        a.mov(rax, qword_ptr(rax)).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut Kernel::default());
    assert_eq!(
        violation_kind(&result),
        ViolationKind::PrivilegedInstruction
    );
    // With it clear the next call could write wherever it likes.
    guest.code(DRIVER_TEXT + 0x40, |a| {
        a.mov(rcx, KERNEL_DATA + 0x10).unwrap();
        a.mov(qword_ptr(rcx), 1).unwrap();
        a.ret().unwrap();
    });
    let result = guest.call(&mut domain, &mut Kernel::default());
    let address = KERNEL_DATA + 0x10;
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StrayWrite { address }
    );
}

/// A KVM that carries out such an instruction in parts can fail this; one that does not leaves
/// nothing behind anyway.
#[test]
fn a_repeated_access_that_a_call_was_stopped_in_is_not_the_next_calls() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.test(rdx, rdx).unwrap();
        let mut honest = a.create_label();
        a.je(honest).unwrap();
        a.rep().movsb().unwrap();
        a.set_label(&mut honest).unwrap();
        a.mov(eax, 7).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let mut kernel = Kernel::with_data();
    let mut regs = guest.entry_regs();
    (regs.rdi, regs.rsi, regs.rcx, regs.rdx) = (DRIVER_DATA, OTHER_DEVICE, 900, 1);
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    assert_eq!(
        violation_kind(&result),
        ViolationKind::ForeignMmio {
            gpa: OTHER_DEVICE_GPA,
            write: false
        }
    );
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!((result.regs.rax, result.stats.runs), (7, 1));
}
