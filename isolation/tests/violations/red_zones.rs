//! Memory behind what a call asked for, in the slot of an allocator that hands out 64 bytes.

use super::*;
use isolation::domain::monitor::{Asked, MAX_ASKED, Measure};

const ALLOCATES: u64 = KERNEL_TEXT + 0x100;
const FREES: u64 = KERNEL_TEXT + 0x300;
const SLOT: u64 = DRIVER_DATA + 0x40;
const ZEROED: u64 = 0x100;

/// A driver with this code behind a call that asks for 40 bytes at `SLOT`, which are zeroed.
fn asks_for_40(code: impl FnOnce(&mut CodeAssembler)) -> (Guest, Domain, Kernel) {
    let guest = Guest::new();
    guest.code(ALLOCATES, |a| {
        // All that it may, but for what it returns.
        a.mov(rax, SLOT).unwrap();
        for word in 0..8 {
            a.mov(qword_ptr(rax + word * 8), 0).unwrap();
        }
        for register in [rdi, rsi, rdx, rcx, r8, r9, r10, r11] {
            a.mov(register, -1i64).unwrap();
        }
        a.ret().unwrap();
    });
    guest.code(FREES, |a| {
        a.xor(eax, eax).unwrap();
        a.xor(edi, edi).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.push(rbx).unwrap();
        a.mov(edi, 40).unwrap();
        a.mov(esi, ZEROED as i32).unwrap();
        a.call(ALLOCATES).unwrap();
        code(a);
        a.pop(rbx).unwrap();
        a.ret().unwrap();
    });
    // What was there before is nobody's.
    guest.write(SLOT + 56, 0x7777);
    let mut domain = guest.domain();
    let measured = Measure::HandsOut {
        size: 0,
        flags: Some(1),
    };
    domain.measure([(ALLOCATES, measured), (FREES, Measure::Forgets)].into());
    for at in DRIVER_TEXT..DRIVER_TEXT + 0x80 {
        let code: Vec<u8> = (at..at + 5)
            .map(|at| (guest.read(at & !7) >> (at % 8 * 8)) as u8)
            .collect();
        let displacement = i32::from_le_bytes(code[1..].try_into().unwrap());
        let target = (at + 5).wrapping_add_signed(displacement.into());
        if code[0] == 0xe8 && [ALLOCATES, FREES].contains(&target) {
            domain.redirect(at, target).unwrap();
        }
    }
    let kernel = Kernel {
        slot_bytes: 64,
        ..Kernel::with_data()
    };
    (guest, domain, kernel)
}

const ASKED: Asked = Asked {
    at: SLOT,
    bytes: Some(40),
    flags: Some(ZEROED),
};

#[test]
fn bytes_behind_what_was_asked_for_are_found_though_a_kernel_function_ran() {
    for (offset, byte) in [(40, 1), (63, 0xff)] {
        let (guest, mut domain, mut kernel) = asks_for_40(|a| {
            a.mov(byte_ptr(rax + offset), byte).unwrap();
        });
        let regs = guest.entry_regs();
        let before = guest.all();
        let result = guest.call_with(&mut domain, &mut kernel, regs);
        let kind = ViolationKind::StrayBytes {
            address: SLOT + offset as u64,
            bytes: 1,
        };
        assert_eq!(violation_kind(&result), kind);
        assert_eq!(kernel.asked, [ASKED]);
        assert_eq!(result.stats.crossings, 1);
        assert!(guest.all() == before);
    }
}

#[test]
fn what_was_asked_for_may_be_written_to_its_last_byte_and_another_call_knows_nothing_of_it() {
    let (guest, mut domain, mut kernel) = asks_for_40(|a| {
        for word in 0..5 {
            a.mov(qword_ptr(rax + word * 8), -1).unwrap();
        }
    });
    for _ in 0..3 {
        kernel.asked.clear();
        let result = guest.call(&mut domain, &mut kernel);
        assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        assert_eq!(kernel.asked, [ASKED]);
    }
    assert_eq!(
        [32, 40, 56].map(|at| guest.read(SLOT + at)),
        [u64::MAX, 0, 0]
    );
}

#[test]
fn what_was_given_back_or_made_longer_is_not_looked_at() {
    let (guest, mut domain, mut kernel) = asks_for_40(|a| {
        a.mov(rbx, rax).unwrap();
        a.mov(rdi, rax).unwrap();
        a.call(FREES).unwrap();
        a.mov(qword_ptr(rbx + 48), -1).unwrap();
    });
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    let forgotten = Asked {
        bytes: None,
        flags: None,
        ..ASKED
    };
    assert_eq!(kernel.asked, [ASKED, forgotten]);
}

#[test]
fn a_call_that_asks_more_often_than_is_noted_is_not_looked_at() {
    let (guest, mut domain, mut kernel) = asks_for_40(|a| {
        let mut top = a.create_label();
        a.mov(ebx, MAX_ASKED as i32 + 3).unwrap();
        a.set_label(&mut top).unwrap();
        a.mov(edi, 40).unwrap();
        a.mov(esi, ZEROED as i32).unwrap();
        a.call(ALLOCATES).unwrap();
        a.dec(ebx).unwrap();
        a.jnz(top).unwrap();
        a.mov(qword_ptr(rax + 48), -1).unwrap();
    });
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(kernel.asked.len(), MAX_ASKED);
    assert!(kernel.asked.iter().all(|asked| asked.bytes.is_none()));
}

#[test]
fn a_red_zone_of_the_kernels_may_have_what_the_kernel_fills_it_with_and_nothing_else() {
    for (fill, found) in [(0xcc, false), (0xbb, false), (0, true), (0x6b, true)] {
        let (guest, mut domain, mut kernel) = asks_for_40(|a| {
            // In the place of the kernel, which the test's supervisor cannot tell.
            a.mov(rdi, rax).unwrap();
            a.add(rdi, 40).unwrap();
            a.mov(ecx, 24).unwrap();
            a.mov(eax, fill).unwrap();
            a.rep().stosb().unwrap();
        });
        kernel.slots_are_red = true;
        let result = guest.call(&mut domain, &mut kernel);
        if found {
            let kind = ViolationKind::StrayBytes {
                address: SLOT + 40,
                bytes: 24,
            };
            assert_eq!(violation_kind(&result), kind);
        } else {
            assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        }
    }
}
