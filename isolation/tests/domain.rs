//! Isolated calls of a hand-made guest, on the host's real KVM.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::roots::Root;
use isolation::domain::transaction::{CallEnd, CallRequest, PassThroughReason};
use isolation::domain::violation::ViolationKind;
use std::time::Duration;

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
fn a_stray_write_is_caught_before_it_happens_at_its_instruction() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, KERNEL_DATA + 0x10).unwrap();
        a.mov(qword_ptr(rcx), 1).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StrayWrite {
            address: KERNEL_DATA + 0x10
        }
    );
    assert_eq!(violation(&result).rip, DRIVER_TEXT + 10);
    assert_eq!(violation(&result).root, Root::Driver);
}

#[test]
fn kernel_functions_may_write_what_the_driver_may_not() {
    let guest = Guest::new();
    let kernel_function = KERNEL_TEXT + 0x100;
    guest.code(kernel_function, |a| {
        a.mov(rcx, KERNEL_DATA).unwrap();
        a.mov(qword_ptr(rcx), 9).unwrap();
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
    let result = guest.call(&mut domain, &mut Kernel::default());
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(guest.read(KERNEL_DATA), 9);
}

#[test]
fn bytes_of_others_on_an_opened_page_are_found_at_commit() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DRIVER_DATA).unwrap();
        a.mov(qword_ptr(rcx), 1).unwrap();
        a.mov(qword_ptr(rcx + 0x80), -1).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let mut kernel = Kernel {
        writable: vec![(DRIVER_DATA, 0x40)],
        ..Default::default()
    };
    let result = guest.call(&mut domain, &mut kernel);
    let expected = ViolationKind::StrayBytes {
        address: DRIVER_DATA + 0x80,
        bytes: 8,
    };
    assert_eq!(violation_kind(&result), expected);
    assert_eq!(
        (guest.read(DRIVER_DATA), guest.read(DRIVER_DATA + 0x80)),
        (0, 0)
    );
}

#[test]
fn a_smashed_caller_frame_is_found_at_commit() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(qword_ptr(rsp + 0x20), 1).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut Kernel::with_data());
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
fn a_wild_jump_into_kernel_text_is_an_illegal_control_transfer() {
    let guest = Guest::new();
    let inside = KERNEL_TEXT + 0x204;
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rax, inside).unwrap();
        a.jmp(rax).unwrap();
    });
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    assert_eq!(
        violation_kind(&result),
        ViolationKind::IllegalControlTransfer { target: inside }
    );
}

#[test]
fn a_jump_to_unmapped_memory_is_an_illegal_control_transfer() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.xor(eax, eax).unwrap();
        a.call(rax).unwrap();
    });
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    assert_eq!(
        violation_kind(&result),
        ViolationKind::IllegalControlTransfer { target: 0 }
    );
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
fn a_kernel_function_that_would_oops_is_the_drivers_failure() {
    let guest = Guest::new();
    let kernel_function = KERNEL_TEXT + 0x100;
    guest.code(kernel_function, |a| {
        a.mov(rax, qword_ptr(rdi)).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.mov(edi, 0x40).unwrap();
        a.call(kernel_function).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 5, kernel_function).unwrap();
    let result = guest.call(&mut domain, &mut Kernel::default());
    let ViolationKind::KernelException {
        vector: 14,
        address: 0x40,
        ..
    } = violation_kind(&result)
    else {
        panic!("{result:?}")
    };
    assert_eq!(violation(&result).root, Root::Kernel);
    let mut kernel = Kernel {
        kernel_exception_expected: true,
        ..Default::default()
    };
    let result = guest.call(&mut domain, &mut kernel);
    assert!(
        matches!(
            result.end,
            CallEnd::PassThrough(PassThroughReason::KernelException)
        ),
        "{result:?}"
    );
}

#[test]
fn device_stores_wait_for_commit_and_keep_their_order() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DEVICE).unwrap();
        a.mov(dword_ptr(rcx + 0x18), 1).unwrap();
        a.mov(dword_ptr(rcx + 0x10), 2).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let mut kernel = Kernel::default();
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(
        kernel.device_writes,
        [(DEVICE_GPA + 0x18, 1, 4), (DEVICE_GPA + 0x10, 2, 4)]
    );
    assert_eq!(
        kernel.checkpoints, 0,
        "nothing left the queue before commit"
    );
}

#[test]
fn an_aborted_call_never_reaches_the_device() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DEVICE).unwrap();
        a.mov(dword_ptr(rcx), 1).unwrap();
        a.ud2().unwrap();
    });
    let mut domain = guest.domain();
    let mut kernel = Kernel::default();
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(
        violation_kind(&result),
        ViolationKind::Exception { vector: 6, .. }
    ));
    assert_eq!((kernel.device_writes.len(), kernel.restores), (0, 0));
}

#[test]
fn a_device_load_flushes_the_queue_and_an_abort_after_it_restores_the_device() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rdx, DRIVER_DATA).unwrap();
        a.mov(qword_ptr(rdx), 8).unwrap();
        a.mov(rcx, DEVICE).unwrap();
        a.mov(dword_ptr(rcx), 1).unwrap();
        a.mov(eax, dword_ptr(rcx + 8)).unwrap();
        a.cmp(eax, 0x55).unwrap();
        let mut good = a.create_label();
        a.je(good).unwrap();
        a.ud2().unwrap();
        a.set_label(&mut good).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let mut kernel = Kernel {
        device_value: 0x55,
        ..Kernel::with_data()
    };
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.regs.rax, 0x55);
    assert_eq!(kernel.device_writes.len(), 1);
    guest.write(DRIVER_DATA, 0);
    let regs = guest.entry_regs();
    let before = guest.all();
    let mut kernel = Kernel {
        device_value: 0x66,
        ..Kernel::with_data()
    };
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    assert!(violation(&result).reached_device);
    assert_eq!((kernel.checkpoints, kernel.restores), (1, 1));
    assert!(
        guest.all() == before,
        "memory published for the device was not taken back"
    );
}

#[test]
fn the_devices_ports_are_written_at_commit_and_read_at_once() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(edx, 0xc000).unwrap();
        a.mov(eax, 0x11).unwrap();
        a.out(dx, eax).unwrap();
        a.mov(edx, 0xc004).unwrap();
        a.in_(eax, dx).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let mut kernel = Kernel {
        device_value: 0x5566_7788,
        ..Default::default()
    };
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.regs.rax, 0x5566_7788);
    assert_eq!(kernel.device_writes, [(0xc000, 0x11, 4)]);
}

#[test]
fn another_devices_registers_are_a_violation() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, OTHER_DEVICE).unwrap();
        a.mov(dword_ptr(rcx), 1).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    let expected = ViolationKind::ForeignMmio {
        gpa: OTHER_DEVICE_GPA,
        write: true,
    };
    assert_eq!(violation_kind(&result), expected);
}

#[test]
fn ports_and_halts_are_violations_of_the_driver() {
    for (code, expected) in [
        (
            &[0xe6u8, 0x80, 0xc3][..],
            ViolationKind::ForeignPort {
                port: 0x80,
                write: true,
            },
        ),
        (
            &[0xe4, 0x71, 0xc3],
            ViolationKind::ForeignPort {
                port: 0x71,
                write: false,
            },
        ),
        (&[0xf4, 0xc3], ViolationKind::PrivilegedInstruction),
        // The port of the monitor's own stubs, used by the driver.
        (
            &[0xe6, 0xf1, 0xc3],
            ViolationKind::ForeignPort {
                port: 0xf1,
                write: true,
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
fn a_call_that_hangs_is_ended_by_its_budget() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        let mut top = a.create_label();
        a.set_label(&mut top).unwrap();
        a.jmp(top).unwrap();
    });
    let mut domain = guest.domain();
    let request = CallRequest {
        regs: guest.entry_regs(),
        sregs: &guest.sregs,
        clock: None,
        function: DRIVER_TEXT,
        return_gate: None,
        sleep_limit: Duration::ZERO,
        budget: Duration::from_millis(20),
    };
    let result = domain.call(&request, &mut Kernel::with_data()).unwrap();
    assert_eq!(violation_kind(&result), ViolationKind::TimeBudget);
}

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
    ] {
        let guest = Guest::new();
        guest.code(DRIVER_TEXT, |a| a.db(code).unwrap());
        let mut domain = guest.domain();
        let result = guest.call(&mut domain, &mut Kernel::with_data());
        assert_eq!(violation_kind(&result), expected);
    }
}

#[test]
fn a_wild_stack_pointer_ends_in_a_report_not_in_a_triple_fault() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(esp, 0x10).unwrap();
        a.push(rax).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    let ViolationKind::Exception {
        vector: 14,
        address: 8,
        ..
    } = violation_kind(&result)
    else {
        panic!("{result:?}")
    };
}

#[test]
fn writing_the_drivers_own_text_is_a_stray_write() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DRIVER_TEXT).unwrap();
        a.mov(byte_ptr(rcx), 0).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StrayWrite {
            address: DRIVER_TEXT
        }
    );
}

#[test]
fn page_tables_reached_through_the_direct_map_cannot_be_written() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DIRECT_MAP + 0x1000).unwrap();
        a.mov(rax, qword_ptr(rcx)).unwrap();
        a.mov(qword_ptr(rcx), 0).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StrayWrite {
            address: DIRECT_MAP + 0x1000
        }
    );
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
