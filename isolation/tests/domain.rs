//! Isolated calls of a hand-made guest, on the host's real KVM.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::error::DomainError;
use isolation::domain::transaction::{CallEnd, PassThroughReason};
use isolation::domain::violation::ViolationKind;

/// Driver code that adds 5 to its data and returns 7.
fn add_five(a: &mut CodeAssembler) {
    a.mov(rcx, DRIVER_DATA).unwrap();
    a.add(qword_ptr(rcx), 5).unwrap();
    a.mov(eax, 7).unwrap();
    a.ret().unwrap();
}

#[test]
fn a_call_commits_what_it_wrote_and_returns_its_result() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, add_five);
    guest.write(DRIVER_DATA, 37);
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(guest.read(DRIVER_DATA), 42);
    assert_eq!((result.regs.rax, result.regs.rip), (7, CALLER));
    assert_eq!(result.regs.rsp, STACK_TOP - 0x100);
    assert_eq!(result.stats.committed_bytes, 1);
}

#[test]
fn a_warm_call_takes_one_run_and_no_other_system_call() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, add_five);
    let mut domain = guest.domain();
    let mut kernel = Kernel::with_data();
    for _ in 0..3 {
        guest.call(&mut domain, &mut kernel);
    }
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.stats.runs, 1, "{:?}", result.stats);
    assert_eq!(result.stats.other_syscalls, 0, "{:?}", result.stats);
    assert_eq!(guest.read(DRIVER_DATA), 20);
}

#[test]
fn the_guests_own_writes_between_calls_are_seen() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, add_five);
    let mut domain = guest.domain();
    let mut kernel = Kernel::with_data();
    for round in 0..5u64 {
        guest.write(DRIVER_DATA, round * 100);
        guest.call(&mut domain, &mut kernel);
        assert_eq!(guest.read(DRIVER_DATA), round * 100 + 5);
    }
}

#[test]
fn a_fault_after_writes_and_a_kernel_call_leaves_every_byte_as_it_was() {
    let guest = Guest::new();
    let kernel_function = KERNEL_TEXT + 0x100;
    guest.code(kernel_function, |a| {
        a.mov(rcx, KERNEL_DATA).unwrap();
        a.inc(qword_ptr(rcx)).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DRIVER_DATA).unwrap();
        a.mov(qword_ptr(rcx), 1).unwrap();
        a.call(kernel_function).unwrap();
        a.xor(eax, eax).unwrap();
        a.mov(rax, qword_ptr(rax)).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 17, kernel_function).unwrap();
    let regs = guest.entry_regs();
    let before = guest.all();
    for _ in 0..3 {
        let result = guest.call_with(&mut domain, &mut Kernel::with_data(), regs);
        let ViolationKind::Exception {
            vector: 14,
            address: 0,
            ..
        } = violation_kind(&result)
        else {
            panic!("{result:?}")
        };
        assert_eq!(violation(&result).rip, DRIVER_TEXT + 24);
        assert_eq!(result.stats.crossings, 1);
        assert_eq!((result.regs.rip, result.regs.rsp), (CALLER, regs.rsp + 8));
        assert!(
            guest.all() == before,
            "an aborted call changed guest memory"
        );
    }
}

#[test]
fn crossings_need_no_exit_and_keep_every_register() {
    let guest = Guest::new();
    let kernel_function = KERNEL_TEXT + 0x100;
    guest.code(kernel_function, |a| {
        // Reads its seventh argument, which lies on the stack above the return address.
        a.mov(rax, qword_ptr(rsp + 8)).unwrap();
        a.add(rax, r11).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.mov(r11d, 1000).unwrap();
        a.push(77).unwrap();
        a.call(kernel_function).unwrap();
        a.add(rsp, 8).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 8, kernel_function).unwrap();
    let mut kernel = Kernel::default();
    guest.call(&mut domain, &mut kernel);
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.regs.rax, 1077);
    assert_eq!(result.regs.r11, 1000);
    assert_eq!((result.stats.crossings, result.stats.runs), (1, 1));
}

#[test]
fn an_indirect_call_of_an_imported_function_gets_a_trampoline() {
    let guest = Guest::new();
    let kernel_function = KERNEL_TEXT + 0x100;
    guest.code(kernel_function, |a| {
        a.mov(eax, 5).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rax, kernel_function).unwrap();
        a.call(rax).unwrap();
        a.inc(rax).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let mut kernel = Kernel::default();
    kernel.kernel_functions.insert(kernel_function);
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!((result.regs.rax, result.stats.indirect_calls), (6, 1));
}

#[test]
fn a_tail_call_of_a_kernel_function_returns_to_the_caller() {
    let guest = Guest::new();
    let kernel_function = KERNEL_TEXT + 0x100;
    guest.code(kernel_function, |a| {
        a.mov(eax, 5).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.jmp(kernel_function).unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT, kernel_function).unwrap();
    let result = guest.call(&mut domain, &mut Kernel::default());
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!((result.regs.rax, result.stats.crossings), (5, 1));
}

#[test]
fn the_kernel_may_call_back_into_the_driver() {
    let guest = Guest::new();
    let kernel_function = KERNEL_TEXT + 0x100;
    let callback = DRIVER_TEXT + 0x400;
    guest.code(kernel_function, |a| {
        a.call(rdi).unwrap();
        a.add(rax, 1).unwrap();
        a.ret().unwrap();
    });
    guest.code(callback, |a| {
        a.mov(rcx, DRIVER_DATA).unwrap();
        a.mov(qword_ptr(rcx), 3).unwrap();
        a.mov(eax, 10).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rdi, callback).unwrap();
        a.call(kernel_function).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 10, kernel_function).unwrap();
    let mut kernel = Kernel::with_data();
    kernel.driver_functions.insert(callback);
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!((result.regs.rax, result.stats.callbacks), (11, 1));
    assert_eq!(guest.read(DRIVER_DATA), 3);
}

#[test]
fn a_fault_inside_a_call_back_takes_everything_back() {
    let guest = Guest::new();
    let kernel_function = KERNEL_TEXT + 0x100;
    let callback = DRIVER_TEXT + 0x400;
    guest.code(kernel_function, |a| {
        a.mov(rcx, KERNEL_DATA).unwrap();
        a.inc(qword_ptr(rcx)).unwrap();
        a.jmp(rdi).unwrap();
    });
    guest.code(callback, |a| a.ud2().unwrap());
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rdi, callback).unwrap();
        a.call(kernel_function).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 10, kernel_function).unwrap();
    let mut kernel = Kernel::with_data();
    kernel.driver_functions.insert(callback);
    let regs = guest.entry_regs();
    let before = guest.all();
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    assert!(matches!(
        violation_kind(&result),
        ViolationKind::Exception { vector: 6, .. }
    ));
    assert_eq!(violation(&result).crossings, [DRIVER_TEXT + 15]);
    assert!(guest.all() == before);
}

#[test]
fn fpu_use_and_kernel_halts_are_given_back_to_the_guest() {
    let guest = Guest::new();
    let kernel_function = KERNEL_TEXT + 0x100;
    guest.code(kernel_function, |a| {
        a.pxor(xmm0, xmm0).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.sub(rsp, 8).unwrap();
        a.call(kernel_function).unwrap();
        a.add(rsp, 8).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 4, kernel_function).unwrap();
    let regs = guest.entry_regs();
    let before = guest.all();
    let result = guest.call_with(&mut domain, &mut Kernel::with_data(), regs);
    // A KVM that emulates kernel mode cannot carry the instruction out and stops at it instead.
    let (fpu, halt) = (PassThroughReason::Fpu, PassThroughReason::Halt);
    assert!(
        matches!(result.end, CallEnd::PassThrough(reason) if reason == fpu || reason == halt),
        "{result:?}"
    );
    assert_eq!(result.regs, regs);
    guest.code(kernel_function, |a| a.hlt().unwrap());
    let result = guest.call_with(&mut domain, &mut Kernel::with_data(), regs);
    assert!(
        matches!(result.end, CallEnd::PassThrough(PassThroughReason::Halt)),
        "{result:?}"
    );
    guest.code(kernel_function, |a| {
        a.pxor(xmm0, xmm0).unwrap();
        a.ret().unwrap();
    });
    assert!(guest.all() == before);
}

#[test]
fn a_page_that_the_guest_moved_is_found_at_the_next_call() {
    let mut guest = Guest::new();
    guest.code(DRIVER_TEXT, add_five);
    guest.write(DRIVER_DATA, 1);
    let mut domain = guest.domain();
    let mut kernel = Kernel::with_data();
    guest.call(&mut domain, &mut kernel);
    guest.call(&mut domain, &mut kernel);
    let moved = gpa_of(KERNEL_DATA + PAGE);
    guest.map(DRIVER_DATA, moved, 2 | 1 << 63);
    guest.write(KERNEL_DATA + PAGE, 100);
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.stats.rebuilds, 1);
    assert_eq!(
        (guest.read(DRIVER_DATA), guest.read(KERNEL_DATA + PAGE)),
        (11, 105)
    );
}

#[test]
fn a_trapped_kernel_function_gives_the_call_back_to_the_guest() {
    let guest = Guest::new();
    let scheduler = KERNEL_TEXT + 0x100;
    guest.code(scheduler, |a| a.ret().unwrap());
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DRIVER_DATA).unwrap();
        a.mov(qword_ptr(rcx), 1).unwrap();
        a.call(scheduler).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 17, scheduler).unwrap();
    domain.trap_function(scheduler).unwrap();
    let regs = guest.entry_regs();
    let before = guest.all();
    let result = guest.call_with(&mut domain, &mut Kernel::with_data(), regs);
    let reason = PassThroughReason::TrappedFunction;
    assert!(
        matches!(result.end, CallEnd::PassThrough(why) if why == reason),
        "{result:?}"
    );
    assert_eq!(result.regs, regs);
    assert!(guest.all() == before);
}

#[test]
fn a_gate_in_the_guest_is_not_in_the_domain_and_text_patched_later_is_followed() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.db(&[0x0f, 0x1f, 0x44, 0, 0]).unwrap();
        a.mov(eax, 7).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain
        .patch(DRIVER_TEXT, &[0x0f, 0x1f, 0x44, 0, 0])
        .unwrap();
    guest.code(DRIVER_TEXT, |a| {
        a.db(&[0xe6, 0xe0, 0xe6, 0xe1, 0x90]).unwrap();
        a.mov(eax, 8).unwrap();
        a.ret().unwrap();
    });
    let result = guest.call(&mut domain, &mut Kernel::default());
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.regs.rax, 8);
}

#[test]
fn a_domain_is_told_from_one_whose_guest_has_changed_since() {
    let mut guest = Guest::new();
    guest.code(DRIVER_TEXT, add_five);
    let mut domain = guest.domain();
    domain.patch(DRIVER_TEXT + 0x800, &[0xcc]).unwrap();
    let tables = guest.sregs.cr3;
    assert!(domain.is_current(tables).unwrap());
    // Other code on a patched page is taken over, and the patch stays.
    guest.code(DRIVER_TEXT, |a| {
        a.mov(eax, 9).unwrap();
        a.ret().unwrap();
    });
    assert!(domain.is_current(tables).unwrap());
    let mut patched = [0];
    domain.code(DRIVER_TEXT + 0x800, &mut patched).unwrap();
    assert_eq!(patched, [0xcc]);
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    assert_eq!(result.regs.rax, 9);
    // Text that lies elsewhere now is not what was patched.
    guest.map(DRIVER_TEXT, gpa_of(KERNEL_TEXT), 0);
    assert!(!domain.is_current(tables).unwrap());
}

#[test]
fn pages_that_were_opened_after_a_mark_are_closed_by_the_rewind() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, add_five);
    let mut domain = guest.domain();
    let kept = domain.keep();
    let mut kernel = Kernel::with_data();
    let opened = guest.call(&mut domain, &mut kernel).stats.opened;
    assert!(opened > 0);
    assert_eq!(guest.call(&mut domain, &mut kernel).stats.opened, 0);
    for _ in 0..3 {
        domain.put_back(&kept).unwrap();
        let result = guest.call(&mut domain, &mut kernel);
        assert_eq!(result.stats.opened, opened);
        assert_eq!(result.stats.rebuilds, 0, "its tables have not changed");
    }
    let kept = domain.keep();
    domain.put_back(&kept).unwrap();
    assert_eq!(guest.call(&mut domain, &mut kernel).stats.opened, 0);
}

#[test]
fn a_monitor_area_where_guest_memory_is_is_refused() {
    let guest = Guest::new();
    let end = MEMORY_PAGES * PAGE;
    // One page of it is enough, at either end.
    for place in [0, end - PAGE, u64::MAX - PAGE + 1] {
        let refused = guest.domain_with(place);
        assert!(
            matches!(refused, Err(DomainError::MonitorPlace(at)) if at == place),
            "{place:#x}"
        );
    }
    for place in [end, vmm::layout::UNUSED.0] {
        guest.domain_with(place).unwrap();
    }
}

#[test]
fn a_domain_that_failed_in_a_call_knows_nothing_of_it_after_a_rewind() {
    let guest = Guest::new();
    let kernel_function = KERNEL_TEXT + 0x100;
    guest.code(kernel_function, |a| a.ret().unwrap());
    guest.code(DRIVER_TEXT, |a| {
        let mut honest = a.create_label();
        a.mov(rcx, DRIVER_DATA).unwrap();
        a.add(qword_ptr(rcx), 5).unwrap();
        a.test(rdx, rdx).unwrap();
        a.je(honest).unwrap();
        a.mov(rax, kernel_function).unwrap();
        a.call(rax).unwrap();
        a.set_label(&mut honest).unwrap();
        a.mov(eax, 7).unwrap();
        a.ret().unwrap();
    });
    guest.write(DRIVER_DATA, 37);
    let mut domain = guest.domain();
    use_up_trampolines(&mut domain);
    let mut kernel = Kernel::with_data();
    kernel.kernel_functions.insert(kernel_function);
    let kept = domain.keep();
    let mut regs = guest.entry_regs();
    regs.rdx = 1;
    assert!(guest.try_call(&mut domain, &mut kernel, regs).is_err());
    guest.write(DRIVER_DATA, 100);
    domain.put_back(&kept).unwrap();
    for expected in [105, 110, 115] {
        let result = guest.call(&mut domain, &mut kernel);
        assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        assert_eq!(guest.read(DRIVER_DATA), expected);
    }
}

#[test]
fn what_the_guest_changes_where_a_fault_was_is_followed() {
    let guest = Guest::new();
    let returns = |value: i32| {
        guest.code(DRIVER_TEXT, |a| {
            a.mov(eax, value).unwrap();
            a.ret().unwrap();
        });
    };
    returns(7);
    let mut domain = guest.domain();
    let mut kernel = Kernel::with_data();
    domain.set_strike(DRIVER_TEXT, &[0xb8, 9, 0, 0, 0]).unwrap();
    assert_eq!(guest.call(&mut domain, &mut kernel).regs.rax, 9);
    assert!(domain.clear_strike().unwrap().is_some());
    assert_eq!(guest.call(&mut domain, &mut kernel).regs.rax, 7);
    returns(8);
    assert_eq!(guest.call(&mut domain, &mut kernel).regs.rax, 8);
}

#[test]
fn what_was_patched_where_a_fault_was_is_patched_again() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(eax, 7).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.patch(DRIVER_TEXT + 1, &[6]).unwrap();
    domain.set_strike(DRIVER_TEXT, &[0xb8, 9, 0, 0, 0]).unwrap();
    domain.clear_strike().unwrap();
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    assert_eq!(result.regs.rax, 6);
}
