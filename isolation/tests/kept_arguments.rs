//! What kernel functions are given to keep, on the host's real KVM.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::time::Duration;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::Domain;
use isolation::domain::effects::{KeptArgument, KernelEffects, Required};
use isolation::domain::transaction::{CallEnd, CallRequest, CallResult};
use isolation::domain::violation::ViolationKind;
use kvm_bindings::kvm_regs;

/// Keeps an object of a list, its second argument, and a work, its third, whose second word is a
/// function.
const QUEUES: u64 = KERNEL_TEXT + 0x100;
const HEAD: u64 = KERNEL_DATA + 0x800;
const OBJECT: u64 = KERNEL_DATA + 0x900;
/// Offset of the links in an object.
const LINKS: u64 = 16;
const WORK: u64 = DRIVER_DATA + 0x40;
const WORKER: u64 = DRIVER_TEXT + 0x400;

fn effects() -> KernelEffects {
    let (listed, function) = (
        Required::Listed {
            head: HEAD,
            links: LINKS,
        },
        Required::Function,
    );
    let kept = |argument, offset, is| KeptArgument {
        argument,
        offset,
        is,
    };
    KernelEffects {
        keeps: [(
            QUEUES,
            vec![kept(1, None, listed), kept(2, Some(8), function)],
        )]
        .into(),
        ..KernelEffects::default()
    }
}

/// A driver that has its second argument and its third kept, by a direct call or by a pointer.
fn guest(by_pointer: bool) -> (Guest, Domain) {
    let guest = Guest::new();
    guest.code(QUEUES, |a| {
        a.mov(rcx, KERNEL_DATA).unwrap();
        a.inc(qword_ptr(rcx)).unwrap();
        // As the driver had it.
        a.mov(rax, r11).unwrap();
        a.ret().unwrap();
    });
    guest.code(WORKER, |a| a.ret().unwrap());
    guest.code(DRIVER_TEXT, |a| {
        a.sub(rsp, 8).unwrap();
        a.mov(r11d, 1000).unwrap();
        a.mov(rax, QUEUES).unwrap();
        match by_pointer {
            true => a.call(rax).unwrap(),
            false => a.call(QUEUES).unwrap(),
        }
        a.add(rsp, 8).unwrap();
        a.ret().unwrap();
    });
    // Two objects, the second of which is the one.
    let other = OBJECT + 0x100;
    guest.write(HEAD, other + LINKS);
    guest.write(other + LINKS, OBJECT + LINKS);
    guest.write(OBJECT + LINKS, HEAD);
    guest.write(WORK + 8, WORKER);
    let mut domain = guest.domain();
    domain.look_at_arguments(effects().keeps.into_keys());
    if !by_pointer {
        domain.redirect(DRIVER_TEXT + 20, QUEUES).unwrap();
    }
    (guest, domain)
}

fn call(guest: &Guest, domain: &mut Domain, object: u64, work: u64) -> CallResult {
    let regs = kvm_regs {
        rsi: object,
        rdx: work,
        ..guest.entry_regs()
    };
    let effects = effects();
    let request = CallRequest {
        regs,
        sregs: &guest.sregs,
        stack: guest.stack_around(regs.rsp),
        clock: None,
        vcpu: 0,
        function: DRIVER_TEXT,
        return_gate: None,
        effects: Some(&effects),
        sleep_limit: Duration::ZERO,
        budget: Duration::from_secs(300),
    };
    let mut kernel = Kernel::with_data();
    kernel.kernel_functions.insert(QUEUES);
    kernel.driver_functions.insert(WORKER);
    domain.call(&request, &mut kernel).unwrap()
}

#[test]
fn what_a_kernel_function_may_keep_is_kept_and_the_call_is_as_any_other() {
    for by_pointer in [false, true] {
        let (guest, mut domain) = guest(by_pointer);
        for count in 1..=3 {
            let result = call(&guest, &mut domain, OBJECT, WORK);
            assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
            assert_eq!((result.regs.rax, guest.read(KERNEL_DATA)), (1000, count));
            assert_eq!(result.stats.crossings, 1);
        }
    }
}

#[test]
fn what_it_may_not_is_a_violation_where_the_driver_calls_and_nothing_is_kept() {
    for by_pointer in [false, true] {
        let (guest, mut domain) = guest(by_pointer);
        let at = DRIVER_TEXT + if by_pointer { 22 } else { 20 };
        guest.entry_regs();
        let before = guest.all();
        let kept = |argument, value| ViolationKind::KeptArgument {
            function: QUEUES,
            argument,
            value,
        };
        let result = call(&guest, &mut domain, 0x1234, WORK);
        assert_eq!(violation_kind(&result), kept(1, 0x1234));
        assert_eq!(violation(&result).rip, at);
        assert_eq!(violation(&result).touched(), Some(QUEUES));
        // The list's head is no object, nor is what an object's links are in.
        let result = call(&guest, &mut domain, HEAD, WORK);
        assert_eq!(violation_kind(&result), kept(1, HEAD));
        let result = call(&guest, &mut domain, OBJECT + LINKS, WORK);
        assert_eq!(violation_kind(&result), kept(1, OBJECT + LINKS));
        // One behind the work: its function is none.
        let result = call(&guest, &mut domain, OBJECT, WORK + 8);
        assert_eq!(violation_kind(&result), kept(2, 0));
        assert!(guest.all() == before);
        // A work that is not there the function meets itself.
        let result = call(&guest, &mut domain, OBJECT, 0x10);
        assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    }
}

#[test]
fn a_list_without_an_end_says_nothing() {
    let (guest, mut domain) = guest(false);
    guest.write(OBJECT + LINKS, OBJECT + LINKS);
    let result = call(&guest, &mut domain, 0x1234, WORK);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    guest.write(HEAD, 0x10);
    let result = call(&guest, &mut domain, 0x1234, WORK);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
}
