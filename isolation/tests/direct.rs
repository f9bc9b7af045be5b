//! Kernel functions that run with the driver's rights: a hand-made guest on the host's real KVM.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::Domain;
use isolation::domain::transaction::{CallEnd, PassThroughReason};
use isolation::domain::violation::ViolationKind;

/// The function, in a page that both roots may execute.
const LOOKS: u64 = THUNKS + 0x100;
/// Another one, which needs the kernel's rights.
const NEEDS: u64 = KERNEL_TEXT + 0x100;

/// A guest whose driver calls [`LOOKS`] and adds 1 to what it answers, with a domain in which that
/// runs with the driver's rights.
fn guest_with(looks: impl FnOnce(&mut CodeAssembler)) -> (Guest, Domain) {
    let guest = Guest::new();
    guest.code(LOOKS, looks);
    guest.code(DRIVER_TEXT, |a| {
        a.call(LOOKS).unwrap();
        a.inc(rax).unwrap();
        a.ret().unwrap();
    });
    guest.code(NEEDS, |a| {
        a.mov(rcx, KERNEL_DATA).unwrap();
        a.add(qword_ptr(rcx), 3).unwrap();
        a.mov(rax, qword_ptr(rcx)).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.call_directly([LOOKS].into_iter());
    domain.redirect(DRIVER_TEXT, LOOKS).unwrap();
    (guest, domain)
}

#[test]
fn a_function_that_only_looks_is_called_without_a_crossing() {
    let (guest, mut domain) = guest_with(|a| {
        a.mov(rcx, KERNEL_DATA).unwrap();
        a.mov(rax, qword_ptr(rcx)).unwrap();
        a.ret().unwrap();
    });
    guest.write(KERNEL_DATA, 41);
    let mut kernel = Kernel::default();
    guest.call(&mut domain, &mut kernel);
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.regs.rax, 42);
    assert_eq!((result.stats.crossings, result.stats.runs), (0, 1));
}

#[test]
fn what_a_function_that_looks_stores_is_judged_as_the_drivers() {
    let (guest, mut domain) = guest_with(|a| {
        a.mov(rcx, KERNEL_DATA).unwrap();
        a.mov(qword_ptr(rcx), 1).unwrap();
        a.ret().unwrap();
    });
    let regs = guest.entry_regs();
    let before = guest.all();
    let result = guest.call_with(&mut domain, &mut Kernel::default(), regs);
    let ViolationKind::StrayWrite { address } = violation_kind(&result) else {
        panic!("{result:?}")
    };
    assert_eq!(address, KERNEL_DATA);
    assert!(guest.all() == before);
}

#[test]
fn what_it_calls_has_the_kernels_rights_again() {
    let (guest, mut domain) = guest_with(|a| {
        a.push(rbx).unwrap();
        a.call(NEEDS).unwrap();
        a.pop(rbx).unwrap();
        a.ret().unwrap();
    });
    guest.write(KERNEL_DATA, 10);
    let mut kernel = Kernel::default();
    kernel.kernel_functions.insert(NEEDS);
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!((result.regs.rax, guest.read(KERNEL_DATA)), (14, 13));
    assert_eq!(
        (result.stats.crossings, result.stats.indirect_calls),
        (1, 1)
    );
}

#[test]
fn a_call_in_which_it_runs_code_that_is_no_function_is_the_guests() {
    let (guest, mut domain) = guest_with(|a| {
        a.push(rbx).unwrap();
        a.call(NEEDS).unwrap();
        a.pop(rbx).unwrap();
        a.ret().unwrap();
    });
    let regs = guest.entry_regs();
    let before = guest.all();
    // To who asks, nothing that has a name is at `NEEDS`.
    let result = guest.call_with(&mut domain, &mut Kernel::default(), regs);
    let CallEnd::PassThrough(PassThroughReason::TrappedFunction) = result.end else {
        panic!("{result:?}")
    };
    assert!(guest.all() == before);
}
