//! Calls of a hand-made guest that reach their device, on the host's real KVM.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::host_memory::HostMemory;
use isolation::domain::transaction::CallEnd;
use isolation::domain::violation::ViolationKind;
use kvm_bindings::kvm_regs;

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
    assert!(kernel.published.contains(&(gpa_of(DRIVER_DATA), 0)));
    assert!(result.stats.committed_bytes > 0, "{:?}", result.stats);
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
fn a_load_that_only_flushes_stores_does_not_reach_the_device() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DEVICE).unwrap();
        a.mov(dword_ptr(rcx + 0x10), 1).unwrap();
        a.mov(eax, dword_ptr(rcx + 8)).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    for (past, checkpoints) in [(vec![0x10], 0), (vec![0x18], 1)] {
        let mut kernel = Kernel {
            device_value: 0x55,
            flushes: vec![8],
            flushes_past: past,
            ..Default::default()
        };
        let result = guest.call(&mut domain, &mut kernel);
        assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        assert_eq!(result.regs.rax, 0x55);
        assert_eq!(kernel.device_writes, [(DEVICE_GPA + 0x10, 1, 4)]);
        assert_eq!(kernel.checkpoints, checkpoints);
    }
}

#[test]
fn memory_is_shown_to_a_device_only_where_it_may_look_at_it() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rdx, DRIVER_DATA).unwrap();
        a.mov(qword_ptr(rdx), 8).unwrap();
        a.mov(rcx, DEVICE).unwrap();
        a.mov(dword_ptr(rcx + 0x10), 1).unwrap();
        a.mov(eax, dword_ptr(rcx + 8)).unwrap();
        a.mov(dword_ptr(rcx + 0x18), 2).unwrap();
        a.cmp(eax, 0x55).unwrap();
        let mut good = a.create_label();
        a.je(good).unwrap();
        a.ud2().unwrap();
        a.set_label(&mut good).unwrap();
        a.mov(eax, dword_ptr(rcx + 8)).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let kernel = |alone: &[u64], device_value| Kernel {
        device_value,
        registers_alone: alone.to_vec(),
        ..Kernel::with_data()
    };
    // Neither store, the first one, both: when the data is there, and how often.
    for (alone, published) in [(vec![], 1), (vec![0x10], 1), (vec![0x10, 0x18], 0)] {
        guest.write(DRIVER_DATA, 0);
        let mut kernel = kernel(&alone, 0x55);
        let result = guest.call(&mut domain, &mut kernel);
        assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        let data = kernel.published.iter();
        let data = data.filter(|(gpa, _)| *gpa == gpa_of(DRIVER_DATA));
        assert_eq!(data.count(), published, "{alone:x?}");
        assert_eq!(guest.read(DRIVER_DATA), 8);
        assert_eq!(
            kernel.device_writes,
            [(DEVICE_GPA + 0x10, 1, 4), (DEVICE_GPA + 0x18, 2, 4)]
        );
        assert_eq!(kernel.checkpoints, 1);
    }
    // One that fails after the first load has changed registers alone, and they are put back.
    guest.write(DRIVER_DATA, 0);
    let regs = guest.entry_regs();
    let before = guest.all();
    let mut kernel = kernel(&[0x10, 0x18], 0x66);
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    assert!(violation(&result).reached_device);
    assert_eq!((kernel.checkpoints, kernel.restores), (1, 1));
    assert!(kernel.published.is_empty(), "{:x?}", kernel.published);
    assert!(guest.all() == before);
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
fn string_instructions_are_as_many_port_accesses_as_they_say() {
    const STORES: u64 = 5;
    const LOADS: u64 = 3;
    let guest = Guest::new();
    guest.write(DRIVER_DATA, 0x0807_0605_0403_0201);
    guest.code(DRIVER_TEXT, |a| {
        a.mov(edx, 0xc000).unwrap();
        a.mov(rsi, DRIVER_DATA).unwrap();
        a.mov(ecx, STORES as u32).unwrap();
        a.rep().outsb().unwrap();
        a.mov(ecx, 1).unwrap();
        a.rep().outsw().unwrap();
        a.mov(edx, 0xc004).unwrap();
        a.mov(rdi, DRIVER_DATA + 8).unwrap();
        a.mov(ecx, LOADS as u32).unwrap();
        a.rep().insw().unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let mut kernel = Kernel {
        device_value: 0x5566_7788,
        ..Kernel::with_data()
    };
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    let stores: Vec<_> = (1..=STORES).map(|value| (0xc000, value, 1)).collect();
    assert_eq!(kernel.device_writes[..5], stores);
    assert_eq!(kernel.device_writes[5..], [(0xc000, 0x0706, 2)]);
    assert_eq!(guest.read(DRIVER_DATA + 8), 0x7788_7788_7788);
    assert_eq!((result.regs.rcx, result.regs.rdi), (0, DRIVER_DATA + 14));
}

#[test]
fn another_devices_registers_are_a_violation() {
    let (_, result) = one_call(|a| {
        a.mov(rcx, OTHER_DEVICE).unwrap();
        a.mov(dword_ptr(rcx), 1).unwrap();
        a.ret().unwrap();
    });
    let expected = ViolationKind::ForeignMmio {
        gpa: OTHER_DEVICE_GPA,
        write: true,
    };
    assert_eq!(violation_kind(&result), expected);
}

#[test]
fn a_load_in_two_parts_that_was_stopped_leaves_nothing_to_the_next_call() {
    let mut guest = Guest::new();
    guest.map(
        OTHER_DEVICE + PAGE,
        OTHER_DEVICE_GPA + PAGE,
        1 << 1 | 1 << 63,
    );
    guest.code(DRIVER_TEXT, |a| {
        let mut good = a.create_label();
        a.mov(rcx, OTHER_DEVICE + PAGE - 4).unwrap();
        a.test(edi, edi).unwrap();
        a.je(good).unwrap();
        a.mov(rbx, qword_ptr(rcx)).unwrap();
        a.set_label(&mut good).unwrap();
        a.mov(eax, 7).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let mut kernel = Kernel::default();
    for argument in [1, 0, 1, 0] {
        let regs = kvm_regs {
            rdi: argument,
            ..guest.entry_regs()
        };
        let result = guest.call_with(&mut domain, &mut kernel, regs);
        if argument == 1 {
            let kind = violation_kind(&result);
            assert!(
                matches!(kind, ViolationKind::ForeignMmio { .. }),
                "{kind:?}"
            );
        } else {
            assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
            assert_eq!((result.regs.rax, result.regs.rbx), (7, regs.rbx));
        }
    }
}

#[test]
fn bytes_that_are_not_the_drivers_are_found_before_a_device_sees_them() {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DRIVER_DATA).unwrap();
        a.mov(qword_ptr(rcx), 1).unwrap();
        a.mov(qword_ptr(rcx + 0x80), -1).unwrap();
        a.mov(rdx, DEVICE).unwrap();
        a.mov(dword_ptr(rdx), 1).unwrap();
        a.mov(eax, dword_ptr(rdx + 8)).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let mut kernel = Kernel {
        writable: vec![(DRIVER_DATA, 0x40)],
        ..Default::default()
    };
    let regs = guest.entry_regs();
    let before = guest.all();
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    let expected = ViolationKind::StrayBytes {
        address: DRIVER_DATA + 0x80,
        bytes: 8,
    };
    assert_eq!(violation_kind(&result), expected);
    assert!(!violation(&result).reached_device);
    assert_eq!((kernel.checkpoints, kernel.device_writes.len()), (0, 0));
    assert!(guest.all() == before);
}

#[test]
fn a_domain_that_fails_after_a_device_load_leaves_neither_memory_nor_device_changed() {
    let kernel_function = KERNEL_TEXT + 0x100;
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rdx, DRIVER_DATA).unwrap();
        a.mov(qword_ptr(rdx), 8).unwrap();
        a.mov(rcx, DEVICE).unwrap();
        a.mov(dword_ptr(rcx), 1).unwrap();
        a.mov(eax, dword_ptr(rcx + 8)).unwrap();
        a.mov(qword_ptr(rdx + 8), 9).unwrap();
        a.mov(dword_ptr(rcx), 2).unwrap();
        a.mov(rax, kernel_function).unwrap();
        a.call(rax).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    use_up_trampolines(&mut domain);
    let mut kernel = Kernel::with_data();
    kernel.kernel_functions.insert(kernel_function);
    let regs = guest.entry_regs();
    let before = guest.all();
    let error = guest.try_call(&mut domain, &mut kernel, regs).unwrap_err();
    assert!(
        error.to_string().contains("more kernel functions"),
        "{error}"
    );
    assert_eq!((kernel.checkpoints, kernel.restores), (1, 1));
    assert_eq!(kernel.device_writes, []);
    assert!(guest.all() == before);
}

#[test]
fn a_call_that_would_have_the_host_keep_too_much_for_its_device_is_stopped_before_it() {
    let mut guest = Guest::new();
    guest.host_memory = HostMemory::new(4 * PAGE);
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rdx, DRIVER_DATA).unwrap();
        a.mov(qword_ptr(rdx), 8).unwrap();
        // A page of the stack as well, if there is an argument.
        a.test(edi, edi).unwrap();
        let mut few = a.create_label();
        a.je(few).unwrap();
        a.mov(qword_ptr(rsp - 0x1800), 9).unwrap();
        a.set_label(&mut few).unwrap();
        a.mov(rcx, DEVICE).unwrap();
        a.mov(eax, dword_ptr(rcx + 8)).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let mut kernel = Kernel::with_data();
    let call = |domain: &mut _, kernel: &mut _, argument| {
        let regs = kvm_regs {
            rdi: argument,
            ..guest.entry_regs()
        };
        let before = guest.all();
        (before, guest.call_with(domain, kernel, regs))
    };
    let (_, result) = call(&mut domain, &mut kernel, 0);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(guest.host_memory.used(), 0, "it is over");
    guest.write(DRIVER_DATA, 0);
    let (before, result) = call(&mut domain, &mut kernel, 1);
    assert_eq!(violation_kind(&result), ViolationKind::HostMemory);
    assert_eq!((kernel.checkpoints, kernel.restores), (1, 0));
    assert!(guest.all() == before && guest.host_memory.used() == 0);
}

#[test]
fn the_guest_does_not_run_a_call_whose_device_is_lost() {
    let guest = Guest::new();
    let scheduler = KERNEL_TEXT + 0x100;
    guest.code(scheduler, |a| a.ret().unwrap());
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DEVICE).unwrap();
        a.mov(eax, dword_ptr(rcx)).unwrap();
        a.call(scheduler).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 12, scheduler).unwrap();
    domain.trap_function(scheduler).unwrap();
    for is_lost in [false, true] {
        let mut kernel = Kernel {
            device_is_lost: is_lost,
            ..Kernel::with_data()
        };
        let regs = guest.entry_regs();
        let before = guest.all();
        let result = guest.call_with(&mut domain, &mut kernel, regs);
        match is_lost {
            false => assert!(matches!(result.end, CallEnd::PassThrough(_)), "{result:?}"),
            true => {
                assert_eq!(violation_kind(&result), ViolationKind::DeviceLost);
                assert!(violation(&result).reached_device);
                assert_eq!((result.regs.rip, result.regs.rsp), (CALLER, regs.rsp + 8));
            }
        }
        assert_eq!(kernel.restores, 1);
        assert!(guest.all() == before);
    }
}
