//! What a call may do on its stack, and what it may not.

use super::*;

#[test]
fn a_smashed_caller_frame_is_found_at_commit() {
    let (guest, result) = one_call(|a| {
        a.mov(qword_ptr(rsp + 0x20), 1).unwrap();
        a.ret().unwrap();
    });
    let address = STACK_TOP - 0x108 + 0x20;
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StackSmash { address }
    );
    assert_eq!(guest.read(address), 0);
}

#[test]
fn a_kernel_function_may_write_an_object_on_the_callers_stack() {
    let guest = Guest::new();
    let completes = KERNEL_TEXT + 0x100;
    guest.code(completes, |a| {
        a.mov(qword_ptr(rdi), 1).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.call(completes).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT, completes).unwrap();
    let mut regs = guest.entry_regs();
    regs.rdi = regs.rsp + 0x40;
    let result = guest.call_with(&mut domain, &mut Kernel::default(), regs);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(guest.read(regs.rdi), 1);
}

#[test]
fn an_overflow_on_the_stack_ends_at_the_return_address() {
    let guest = Guest::new();
    let nothing = KERNEL_TEXT + 0x100;
    guest.code(nothing, |a| a.ret().unwrap());
    guest.code(DRIVER_TEXT, |a| {
        a.call(nothing).unwrap();
        a.mov(dword_ptr(rsp), 0x4141_4141).unwrap();
        a.mov(dword_ptr(rsp + 4), 0x4141_4141).unwrap();
        a.mov(dword_ptr(rsp + 8), 0x4141_4141).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT, nothing).unwrap();
    let regs = guest.entry_regs();
    let before = guest.all();
    let result = guest.call_with(&mut domain, &mut Kernel::default(), regs);
    assert!(
        !matches!(result.end, CallEnd::Committed | CallEnd::PassThrough(_)),
        "{result:?}"
    );
    assert!(guest.all() == before);
}

#[test]
fn a_callers_local_that_was_passed_to_the_call_may_be_written() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(qword_ptr(rsp + 0x20), 1).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let address = STACK_TOP - 0x108 + 0x20;
    let mut kernel = Kernel {
        writable: vec![(address, 8)],
        ..Default::default()
    };
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(guest.read(address), 1);
}

#[test]
fn a_wild_stack_pointer_ends_in_a_report_not_in_a_triple_fault() {
    let (_, result) = one_call(|a| {
        a.mov(esp, 0x10).unwrap();
        a.push(rax).unwrap();
        a.ret().unwrap();
    });
    let ViolationKind::Exception {
        vector: 14,
        address: 8,
        ..
    } = violation_kind(&result)
    else {
        panic!("{result:?}")
    };
}

/// A call on the stack that is not aligned to its size.
fn on_the_other_stack(guest: &Guest) -> kvm_regs {
    let at = OTHER_STACK_TOP - 0x108;
    guest.write(at, CALLER);
    kvm_regs {
        rsp: at,
        ..guest.entry_regs()
    }
}

#[test]
fn all_of_a_stack_is_the_calls_own_however_it_is_aligned() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        // A frame as deep as the stack, written at its bottom.
        a.mov(rax, OTHER_STACK).unwrap();
        a.mov(qword_ptr(rax), 1).unwrap();
        a.mov(qword_ptr(rax + 0x1000), 2).unwrap();
        a.mov(qword_ptr(rax + 0x2000), 3).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let regs = on_the_other_stack(&guest);
    let result = guest.call_with(&mut domain, &mut Kernel::default(), regs);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(
        [0, 1, 2].map(|page| guest.read(OTHER_STACK + page * PAGE)),
        [1, 2, 3]
    );
}

#[test]
fn what_is_behind_a_stacks_guard_page_is_not_the_calls() {
    let guest = Guest::new();
    // In the same aligned 16 KiB as the stack's upper end.
    assert_eq!(BEHIND / (4 * PAGE), (OTHER_STACK_TOP - 8) / (4 * PAGE));
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rax, BEHIND).unwrap();
        a.mov(qword_ptr(rax), 1).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let regs = on_the_other_stack(&guest);
    let result = guest.call_with(&mut domain, &mut Kernel::default(), regs);
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StrayWrite { address: BEHIND }
    );
}

#[test]
fn a_call_back_on_the_stack_for_interrupts_may_use_that_one_too() {
    let guest = Guest::new();
    // The kernel switches stacks for what interrupts have left to be done, and polls the driver
    // there.
    let softirq = KERNEL_TEXT + 0x100;
    let poll = DRIVER_TEXT + 0x400;
    guest.code(softirq, |a| {
        a.push(rbp).unwrap();
        a.mov(rbp, rsp).unwrap();
        a.mov(rsp, OTHER_STACK_TOP - 8).unwrap();
        a.mov(rax, poll).unwrap();
        a.call(rax).unwrap();
        a.mov(rsp, rbp).unwrap();
        a.pop(rbp).unwrap();
        a.ret().unwrap();
    });
    guest.code(poll, |a| {
        a.push(r15).unwrap();
        a.sub(rsp, 0x2000).unwrap();
        a.mov(qword_ptr(rsp), 5).unwrap();
        a.mov(eax, dword_ptr(rsp)).unwrap();
        a.add(rsp, 0x2000).unwrap();
        a.pop(r15).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.call(softirq).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT, softirq).unwrap();
    let mut kernel = Kernel {
        driver_functions: [poll].into(),
        interrupt_stack: Some(guest.stack_around(OTHER_STACK_TOP - 8)),
        ..Default::default()
    };
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.regs.rax, 5);
    // Any other stack is somebody else's.
    kernel.interrupt_stack = None;
    let result = {
        let mut domain = guest.domain();
        domain.redirect(DRIVER_TEXT, softirq).unwrap();
        guest.call(&mut domain, &mut kernel)
    };
    assert!(
        matches!(violation_kind(&result), ViolationKind::StrayWrite { .. }),
        "{result:?}"
    );
}
