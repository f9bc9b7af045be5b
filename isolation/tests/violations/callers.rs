//! Frames of the callers: who changes them where kernel functions ran in the same call.

use super::*;

const NOTHING: u64 = KERNEL_TEXT + 0x100;
const WRITES: u64 = KERNEL_TEXT + 0x140;
/// Where calls enter with more than a page of their callers' frames above.
const DEEP: u64 = STACK + PAGE + 0x7f8;

/// A kernel with a function that does nothing and one that adds one to a word, and a driver with
/// this code.
fn guest_with(driver: impl FnOnce(&mut CodeAssembler)) -> (Guest, Domain) {
    let guest = Guest::new();
    guest.code(NOTHING, |a| a.ret().unwrap());
    guest.code(WRITES, |a| {
        a.inc(qword_ptr(rdi)).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, driver);
    let mut domain = guest.domain();
    let bytes: Vec<u8> = (0..32)
        .flat_map(|word| guest.read(DRIVER_TEXT + word * 8).to_le_bytes())
        .collect();
    for (at, code) in (DRIVER_TEXT..).zip(bytes.windows(5)) {
        let displacement = i32::from_le_bytes(code[1..].try_into().unwrap());
        let target = (at + 5).wrapping_add_signed(displacement.into());
        if code[0] == 0xe8 && [NOTHING, WRITES].contains(&target) {
            domain.redirect(at, target).unwrap();
        }
    }
    (guest, domain)
}

/// Registers of a call that enters at `DEEP`.
fn deep(guest: &Guest) -> kvm_regs {
    guest.write(DEEP, CALLER);
    kvm_regs {
        rsp: DEEP,
        ..guest.entry_regs()
    }
}

fn committed(result: &CallResult) {
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
}

#[test]
fn a_callers_frame_that_the_driver_changes_between_crossings_is_found() {
    // On the page of the return address, and two pages above.
    for offset in [0x20u64, 0x1a00] {
        for after in [false, true] {
            let (guest, mut domain) = guest_with(|a| {
                a.call(NOTHING).unwrap();
                if !after {
                    a.mov(byte_ptr(rsp + offset as i32), 1).unwrap();
                }
                a.call(NOTHING).unwrap();
                if after {
                    a.mov(byte_ptr(rsp + offset as i32), 1).unwrap();
                }
                a.ret().unwrap();
            });
            let mut kernel = Kernel::default();
            let regs = deep(&guest);
            let before = guest.all();
            let result = guest.call_with(&mut domain, &mut kernel, regs);
            let address = DEEP + offset;
            assert_eq!(
                violation_kind(&result),
                ViolationKind::StackSmash { address }
            );
            // Before the second call, or at the return.
            let store = if offset < 0x80 { 5 } else { 8 };
            let rip = DRIVER_TEXT + if after { 0 } else { 5 + store };
            assert_eq!(violation(&result).rip, rip);
            assert_eq!(kernel.begun_again, 1);
            assert!(guest.all() == before);
        }
    }
}

#[test]
fn a_callers_frame_on_another_page_is_found_without_a_crossing_too() {
    let (guest, mut domain) = guest_with(|a| {
        a.mov(byte_ptr(rsp + 0x1a03), 1).unwrap();
        a.ret().unwrap();
    });
    let mut kernel = Kernel::default();
    let regs = deep(&guest);
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    let address = DEEP + 0x1a03;
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StackSmash { address }
    );
    assert_eq!((kernel.begun_again, guest.read(DEEP + 0x1a00)), (0, 0));
}

#[test]
fn what_kernel_functions_write_there_is_theirs_and_is_not_looked_at_each_time() {
    let (guest, mut domain) = guest_with(|a| {
        a.call(WRITES).unwrap();
        // If it is told to, the driver does so as well, elsewhere.
        a.add(qword_ptr(rsp + 0x80), rsi).unwrap();
        a.ret().unwrap();
    });
    let mut kernel = Kernel::default();
    let mut regs = deep(&guest);
    regs.rdi = DEEP + 0x1a00;
    for _ in 0..100 {
        committed(&guest.call_with(&mut domain, &mut kernel, regs));
    }
    assert_eq!(guest.read(regs.rdi), 100);
    assert!(
        (1..20).contains(&kernel.begun_again),
        "{}",
        kernel.begun_again
    );
    regs.rsi = 1;
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    let address = DEEP + 0x80;
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StackSmash { address }
    );
    assert_eq!((guest.read(regs.rdi), guest.read(address)), (100, 0));
}

#[test]
fn an_object_there_that_the_call_was_given_may_be_written_and_nothing_behind_it() {
    let (guest, mut domain) = guest_with(|a| {
        a.call(NOTHING).unwrap();
        a.mov(rcx, rsi).unwrap();
        a.mov(al, 0x41).unwrap();
        a.rep().stosb().unwrap();
        a.ret().unwrap();
    });
    let mut regs = deep(&guest);
    regs.rdi = DEEP + 0x100;
    let mut kernel = Kernel {
        writable: vec![(regs.rdi, 40)],
        ..Kernel::default()
    };
    regs.rsi = 40;
    committed(&guest.call_with(&mut domain, &mut kernel, regs));
    assert_eq!(guest.read(regs.rdi + 32), 0x4141_4141_4141_4141);
    regs.rsi = 41;
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    let address = regs.rdi + 40;
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StackSmash { address }
    );
}

#[test]
fn lists_that_link_something_on_a_callers_stack_may_be_changed() {
    for crosses in [false, true] {
        let (guest, mut domain) = guest_with(|a| {
            if crosses {
                a.call(NOTHING).unwrap();
            }
            // `__list_del` of the object in the driver's data.
            a.mov(rcx, qword_ptr(rdi)).unwrap();
            a.mov(rdx, qword_ptr(rdi + 8)).unwrap();
            a.mov(qword_ptr(rcx + 8), rdx).unwrap();
            a.mov(qword_ptr(rdx), rcx).unwrap();
            a.ret().unwrap();
        });
        let mut kernel = Kernel::with_data();
        let mut regs = deep(&guest);
        let head = DEEP + 0x1a00;
        regs.rdi = DRIVER_DATA + 0x40;
        for (at, value) in [
            (head, regs.rdi),
            (head + 8, regs.rdi),
            (regs.rdi, head),
            (regs.rdi + 8, head),
        ] {
            guest.write(at, value);
        }
        committed(&guest.call_with(&mut domain, &mut kernel, regs));
        assert_eq!([guest.read(head), guest.read(head + 8)], [head; 2]);
        // A word that nothing links is no link.
        guest.write(head, 0);
        guest.write(regs.rdi + 8, head);
        let result = guest.call_with(&mut domain, &mut kernel, regs);
        let address = head;
        assert_eq!(
            violation_kind(&result),
            ViolationKind::StackSmash { address }
        );
    }
}

#[test]
fn a_changed_frame_is_found_before_the_device_sees_it() {
    let (guest, mut domain) = guest_with(|a| {
        a.call(NOTHING).unwrap();
        a.mov(qword_ptr(rsp + 0x20), 1).unwrap();
        a.mov(rdx, DEVICE).unwrap();
        a.mov(eax, dword_ptr(rdx)).unwrap();
        // As if nothing had been.
        a.mov(qword_ptr(rsp + 0x20), 0).unwrap();
        a.ret().unwrap();
    });
    let mut kernel = Kernel::default();
    let regs = deep(&guest);
    let before = guest.all();
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    let address = DEEP + 0x20;
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StackSmash { address }
    );
    assert_eq!(kernel.device_writes, []);
    assert_eq!(kernel.begun_again, 1);
    assert!(guest.all() == before);
}

#[test]
fn a_call_back_that_changes_the_frame_of_the_outermost_caller_is_found() {
    let poll = DRIVER_TEXT + 0x400;
    let calls_back = KERNEL_TEXT + 0x180;
    for smashes in [false, true] {
        let guest = Guest::new();
        guest.code(calls_back, |a| {
            // Its own too, which is nobody's business.
            a.inc(qword_ptr(rdi)).unwrap();
            a.mov(rax, poll).unwrap();
            a.call(rax).unwrap();
            a.inc(qword_ptr(rdi)).unwrap();
            a.ret().unwrap();
        });
        guest.code(poll, |a| {
            if smashes {
                a.mov(qword_ptr(rdi + 0x40), 1).unwrap();
            }
            a.ret().unwrap();
        });
        guest.code(DRIVER_TEXT, |a| {
            a.call(calls_back).unwrap();
            a.ret().unwrap();
        });
        let mut domain = guest.domain();
        domain.redirect(DRIVER_TEXT, calls_back).unwrap();
        let mut kernel = Kernel {
            driver_functions: [poll].into(),
            ..Kernel::default()
        };
        let mut regs = deep(&guest);
        regs.rdi = DEEP + 0x200;
        let result = guest.call_with(&mut domain, &mut kernel, regs);
        let address = regs.rdi + 0x40;
        if smashes {
            let kind = ViolationKind::StackSmash { address };
            assert_eq!(
                (violation_kind(&result), violation(&result).rip),
                (kind, poll)
            );
        } else {
            committed(&result);
            assert_eq!((guest.read(regs.rdi), guest.read(address)), (2, 0));
        }
    }
}
