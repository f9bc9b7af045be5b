//! What calls of a hand-made guest may not do, on the host's real KVM.

#![allow(clippy::unwrap_used, reason = "test code")]

mod callers;
#[path = "../common/mod.rs"]
mod common;
mod red_zones;
mod stack;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::Domain;
use isolation::domain::roots::Root;
use isolation::domain::transaction::{CallEnd, CallRequest, CallResult, PassThroughReason};
use isolation::domain::violation::ViolationKind;
use kvm_bindings::kvm_regs;
use std::time::Duration;

#[test]
fn a_stray_write_is_caught_before_it_happens_at_its_instruction() {
    let (_, result) = one_call(|a| {
        a.mov(rcx, KERNEL_DATA + 0x10).unwrap();
        a.mov(qword_ptr(rcx), 1).unwrap();
        a.ret().unwrap();
    });
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

/// A guest whose driver calls a kernel function in the pages that both roots may execute: it fills
/// as many bytes as `RSI` says from `RDI` on.
fn guest_that_fills() -> (Guest, Kernel) {
    let guest = Guest::new();
    guest.code(THUNKS, |a| {
        a.push(rbx).unwrap();
        a.mov(rcx, rsi).unwrap();
        a.mov(al, 0x41).unwrap();
        a.rep().stosb().unwrap();
        a.pop(rbx).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.sub(rsp, 8).unwrap();
        a.call(THUNKS).unwrap();
        a.add(rsp, 8).unwrap();
        a.ret().unwrap();
    });
    (guest, Kernel::with_data())
}

#[test]
fn a_kernel_function_that_only_fills_what_it_is_told_may_not_write_what_the_driver_may_not() {
    let (guest, mut kernel) = guest_that_fills();
    let mut domain = guest.domain();
    let mut regs = guest.entry_regs();
    (regs.rdi, regs.rsi) = (KERNEL_DATA + PAGE - 8, 8);
    let before = guest.all();
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    let violation = violation(&result);
    let address = regs.rdi;
    assert_eq!(violation.kind, ViolationKind::StrayWrite { address });
    assert_eq!(violation.root, Root::Driver);
    // Behind push, mov and mov; below it the saved register and where the driver called it from.
    assert_eq!(violation.rip, THUNKS + 6);
    assert_eq!(violation.rsp, regs.rsp - 24);
    assert_eq!(violation.crossings, [DRIVER_TEXT + 9]);
    assert!(guest.all() == before);
}

#[test]
fn a_kernel_function_that_only_fills_stops_where_what_the_driver_may_write_ends() {
    let (mut guest, mut kernel) = guest_that_fills();
    // What is behind the driver's page belongs to somebody else.
    guest.map(DRIVER_DATA + PAGE, gpa_of(KERNEL_DATA), 2);
    let mut domain = guest.domain();
    let mut regs = guest.entry_regs();
    (regs.rdi, regs.rsi) = (DRIVER_DATA, PAGE + 1);
    let before = guest.all();
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    let address = DRIVER_DATA + PAGE;
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StrayWrite { address }
    );
    assert!(guest.all() == before);

    regs.rsi = PAGE;
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.stats.crossings, 0);
    assert_eq!(guest.read(DRIVER_DATA + PAGE - 8), 0x4141_4141_4141_4141);
    assert_eq!(guest.read(KERNEL_DATA), 0);
}

#[test]
fn what_only_passed_through_a_call_is_asked_about_again_at_the_next() {
    for passes in [true, false] {
        let guest = Guest::new();
        let kernel_function = KERNEL_TEXT + 0x100;
        guest.code(kernel_function, |a| a.ret().unwrap());
        guest.code(DRIVER_TEXT, |a| {
            a.sub(rsp, 8).unwrap();
            a.mov(qword_ptr(rdi), 1).unwrap();
            a.mov(qword_ptr(rdi + 8), 1).unwrap();
            // Bytes are not looked at one by one after this.
            a.call(kernel_function).unwrap();
            a.add(rsp, 8).unwrap();
            a.ret().unwrap();
        });
        let mut domain = guest.domain();
        let call = DRIVER_TEXT + 4 + 7 + 8;
        domain.redirect(call, kernel_function).unwrap();
        let mut kernel = Kernel {
            passes,
            ..Kernel::with_data()
        };
        let mut regs = guest.entry_regs();
        regs.rdi = DRIVER_DATA;
        for _ in 0..3 {
            let result = guest.call_with(&mut domain, &mut kernel, regs);
            assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        }
        // It is somebody else's now.
        kernel.writable.clear();
        let result = guest.call_with(&mut domain, &mut kernel, regs);
        if passes {
            let address = DRIVER_DATA;
            assert_eq!(
                violation_kind(&result),
                ViolationKind::StrayWrite { address }
            );
        } else {
            assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        }
    }
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
fn code_that_the_kernel_has_made_is_called_with_the_kernels_rights_where_it_is_told_by_its_argument()
 {
    let (program, instructions) = (KERNEL_TEXT + 0x200, KERNEL_DATA + 0x40);
    for (second, is_one) in [(instructions, true), (instructions + 8, false)] {
        let guest = Guest::new();
        guest.code(DRIVER_TEXT, |a| {
            a.mov(rax, program).unwrap();
            a.mov(rsi, second).unwrap();
            a.call(rax).unwrap();
            a.ret().unwrap();
        });
        guest.code(program, |a| {
            // What the driver may not write.
            a.mov(rcx, KERNEL_DATA).unwrap();
            a.inc(qword_ptr(rcx)).unwrap();
            a.mov(eax, 7).unwrap();
            a.ret().unwrap();
        });
        let mut kernel = Kernel {
            programs: vec![(program, instructions)],
            ..Kernel::default()
        };
        let result = guest.call(&mut guest.domain(), &mut kernel);
        if is_one {
            assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
            assert_eq!((result.regs.rax, guest.read(KERNEL_DATA)), (7, 1));
        } else {
            let kind = ViolationKind::IllegalControlTransfer { target: program };
            assert_eq!(violation_kind(&result), kind);
            assert_eq!(guest.read(KERNEL_DATA), 0);
        }
    }
}

#[test]
fn a_jump_to_unmapped_memory_is_an_illegal_control_transfer() {
    let (_, result) = one_call(|a| {
        a.xor(eax, eax).unwrap();
        a.call(rax).unwrap();
    });
    assert_eq!(
        violation_kind(&result),
        ViolationKind::IllegalControlTransfer { target: 0 }
    );
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
fn a_driver_may_look_for_a_device_where_there_is_none() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(edx, u32::from(NOBODYS_PORT)).unwrap();
        a.xor(eax, eax).unwrap();
        a.out(dx, eax).unwrap();
        a.in_(eax, dx).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.regs.rax, u64::from(u32::MAX));
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
    let regs = guest.entry_regs();
    let request = CallRequest {
        regs,
        sregs: &guest.sregs,
        stack: guest.stack_around(regs.rsp),
        clock: None,
        vcpu: 0,
        function: DRIVER_TEXT,
        return_gate: None,
        effects: None,
        sleep_limit: Duration::ZERO,
        budget: Duration::from_millis(20),
    };
    let result = domain.call(&request, &mut Kernel::with_data()).unwrap();
    assert_eq!(violation_kind(&result), ViolationKind::TimeBudget);
}

#[test]
fn exceptions_of_the_driver_are_its_own_whatever_their_vector() {
    // int 2; int 7; int 18
    for vector in [2u8, 7, 18] {
        let (_, result) = one_call(|a| a.db(&[0xcd, vector, 0xc3]).unwrap());
        // A KVM that emulates kernel mode cannot carry the instruction out and stops at it instead:
        // only others can fail this.
        let seen = match violation_kind(&result) {
            ViolationKind::Exception { vector, .. } => vector,
            ViolationKind::PrivilegedInstruction => vector,
            other => panic!("{other:?}"),
        };
        assert_eq!((seen, violation(&result).root), (vector, Root::Driver));
    }
}

#[test]
fn writing_the_drivers_own_text_is_a_stray_write() {
    let (_, result) = one_call(|a| {
        a.mov(rcx, DRIVER_TEXT).unwrap();
        a.mov(byte_ptr(rcx), 0).unwrap();
        a.ret().unwrap();
    });
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StrayWrite {
            address: DRIVER_TEXT
        }
    );
}

#[test]
fn page_tables_reached_through_the_direct_map_cannot_be_written() {
    let (_, result) = one_call(|a| {
        a.mov(rcx, DIRECT_MAP + 0x1000).unwrap();
        a.mov(rax, qword_ptr(rcx)).unwrap();
        a.mov(qword_ptr(rcx), 0).unwrap();
        a.ret().unwrap();
    });
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StrayWrite {
            address: DIRECT_MAP + 0x1000
        }
    );
}

#[test]
fn where_a_call_is_expected_to_store_it_may_without_an_exit_if_it_may_at_all() {
    for (expects, may) in [(false, true), (true, true), (true, false)] {
        let guest = Guest::new();
        guest.code(DRIVER_TEXT, |a| {
            a.inc(qword_ptr(rdi)).unwrap();
            a.ret().unwrap();
        });
        let mut domain = guest.domain();
        let mut kernel = Kernel {
            passes: true,
            ..Kernel::with_data()
        };
        let mut regs = guest.entry_regs();
        regs.rdi = DRIVER_DATA + 8;
        for _ in 0..3 {
            guest.call_with(&mut domain, &mut kernel, regs);
        }
        assert_eq!(kernel.stored, [DRIVER_DATA + 8; 3]);
        if expects {
            kernel.expected = vec![DRIVER_DATA + 8, KERNEL_DATA, 8];
        }
        if !may {
            kernel.writable.clear();
        }
        let result = guest.call_with(&mut domain, &mut kernel, regs);
        if may {
            assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
            // It can be read from the last call, so that one exit is for the store and one for the
            // return.
            assert_eq!(result.stats.runs, if expects { 1 } else { 2 });
            assert_eq!(kernel.stored.len(), if expects { 3 } else { 4 });
        } else {
            let ViolationKind::StrayWrite { address } = violation_kind(&result) else {
                panic!("{result:?}")
            };
            assert_eq!(address, DRIVER_DATA + 8);
        }
    }
}
