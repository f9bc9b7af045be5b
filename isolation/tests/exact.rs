//! Stores that are looked at one by one, on the host's real KVM.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::transaction::{CallEnd, CallResult};
use isolation::domain::violation::ViolationKind;
use kvm_bindings::kvm_regs;

/// Where the driver's object lies: amid a page that others have objects on.
const OBJECT: u64 = DRIVER_DATA + 0x100;
const OBJECT_BYTES: u64 = 0x80;
const KERNEL_FUNCTION: u64 = KERNEL_TEXT + 0x100;

fn guest() -> Guest {
    let mut guest = Guest::new();
    guest.each_store = true;
    guest.code(KERNEL_FUNCTION, |a| {
        a.mov(rax, DRIVER_DATA).unwrap();
        a.inc(qword_ptr(rax)).unwrap();
        a.ret().unwrap();
    });
    guest
}

fn kernel() -> Kernel {
    Kernel {
        writable: vec![(OBJECT, OBJECT_BYTES)],
        ..Default::default()
    }
}

struct Called {
    /// The guest's memory before the call.
    before: Vec<u8>,
    result: CallResult,
}

/// A call of this code, after a kernel function that writes somebody else's object on the same
/// page.
fn call(
    guest: &Guest,
    set: impl FnOnce(&mut kvm_regs),
    code: impl FnOnce(&mut CodeAssembler),
) -> Called {
    guest.code(DRIVER_TEXT, |a| {
        a.sub(rsp, 8).unwrap();
        a.call(KERNEL_FUNCTION).unwrap();
        a.add(rsp, 8).unwrap();
        code(a);
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 4, KERNEL_FUNCTION).unwrap();
    let mut regs = guest.entry_regs();
    (regs.rbx, regs.rdi) = (0, OBJECT);
    set(&mut regs);
    let before = guest.all();
    let result = guest.call_with(&mut domain, &mut kernel(), regs);
    Called { before, result }
}

fn assert_committed(called: &Called) {
    let result = &called.result;
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
}

fn assert_stray(guest: &Guest, called: &Called, address: u64) {
    assert_eq!(
        violation_kind(&called.result),
        ViolationKind::StrayWrite { address }
    );
    assert!(guest.all() == called.before);
}

#[test]
fn each_store_is_carried_out_and_the_first_to_bytes_of_others_is_stopped() {
    for (offset, is_own) in [(0, true), (0x78, true), (0x79, false), (0x80, false)] {
        let guest = guest();
        let result = call(
            &guest,
            |_| (),
            |a| {
                a.mov(qword_ptr(rdi + 8), 7).unwrap();
                a.mov(rcx, 0x4142_4344_4546_4748u64).unwrap();
                a.mov(qword_ptr(rdi + offset), rcx).unwrap();
            },
        );
        if is_own {
            assert_committed(&result);
            let at = OBJECT + offset as u64;
            assert_eq!(guest.read(at), 0x4142_4344_4546_4748);
            // The kernel's function may write there.
            assert_eq!(guest.read(DRIVER_DATA), 1);
        } else {
            assert_stray(&guest, &result, OBJECT + OBJECT_BYTES);
        }
    }
}

#[test]
fn one_store_over_and_over_is_each_time_the_same() {
    let guest = guest();
    let result = call(
        &guest,
        |_| (),
        |a| {
            let mut again = a.create_label();
            a.mov(ecx, 1000).unwrap();
            a.set_label(&mut again).unwrap();
            a.lock().inc(qword_ptr(rdi)).unwrap();
            a.dec(ecx).unwrap();
            a.jnz(again).unwrap();
        },
    );
    assert_committed(&result);
    assert_eq!(guest.read(OBJECT), 1000);
}

#[test]
fn flags_that_an_instruction_leaves_are_the_next_ones() {
    let guest = guest();
    let result = call(
        &guest,
        |_| (),
        |a| {
            a.mov(qword_ptr(rdi), -1).unwrap();
            a.stc().unwrap();
            a.adc(qword_ptr(rdi), 0).unwrap();
            // Carry is set: 0 + 0 + 1.
            a.adc(qword_ptr(rdi + 8), 0).unwrap();
            a.pushfq().unwrap();
            a.pop(rax).unwrap();
            a.mov(qword_ptr(rdi + 16), rax).unwrap();
        },
    );
    assert_committed(&result);
    assert_eq!((guest.read(OBJECT), guest.read(OBJECT + 8)), (0, 1));
    // RFLAGS.TF is nobody's to see.
    assert_eq!(guest.read(OBJECT + 16) & 0x100, 0);
}

#[test]
fn a_bit_is_set_where_its_number_says() {
    for (bit, is_own) in [(0u64, true), (65, true), (1023, true), (1024, false)] {
        let guest = guest();
        let result = call(
            &guest,
            |_| (),
            |a| {
                a.mov(rax, bit).unwrap();
                a.lock().bts(qword_ptr(rdi), rax).unwrap();
            },
        );
        if is_own {
            assert_committed(&result);
            assert_eq!(guest.read(OBJECT + bit / 64 * 8), 1 << (bit % 64));
        } else {
            assert_stray(&guest, &result, OBJECT + bit / 8);
        }
    }
}

/// Registers for a string instruction: where to, where from, how often.
fn string(to: u64, from: u64, times: u64) -> impl FnOnce(&mut kvm_regs) {
    move |regs| (regs.rdi, regs.rsi, regs.rcx) = (to, from, times)
}

#[test]
fn a_string_instruction_fills_as_much_as_is_the_calls() {
    let guest = guest();
    let result = call(&guest, string(OBJECT, 0, OBJECT_BYTES / 8), |a| {
        a.mov(rax, 0x0102_0304_0506_0708u64).unwrap();
        a.rep().stosq().unwrap();
        // Behind the last one, with none left.
        a.mov(qword_ptr(rdi - 8), rdi).unwrap();
        a.mov(qword_ptr(rdi - 16), rcx).unwrap();
    });
    assert_committed(&result);
    for at in (OBJECT..OBJECT + OBJECT_BYTES - 16).step_by(8) {
        assert_eq!(guest.read(at), 0x0102_0304_0506_0708);
    }
    let last = OBJECT + OBJECT_BYTES;
    assert_eq!((guest.read(last - 8), guest.read(last - 16)), (last, 0));
    assert_eq!(guest.read(last), 0);

    let guest = self::guest();
    let result = call(&guest, string(OBJECT, 0, OBJECT_BYTES + 1), |a| {
        a.rep().stosb().unwrap();
    });
    assert_stray(&guest, &result, OBJECT + OBJECT_BYTES);
}

#[test]
fn a_string_instruction_copies_also_onto_itself_and_downwards() {
    let bytes = |guest: &Guest| -> Vec<u8> {
        let words = (OBJECT..OBJECT + 32).step_by(8).map(|at| guest.read(at));
        words.flat_map(u64::to_le_bytes).collect()
    };
    let source = KERNEL_DATA + 0x10;
    let filled = || {
        let guest = guest();
        for at in (0..32).step_by(8) {
            guest.write(
                OBJECT + at,
                0x0706_0504_0302_0100 + at * 0x0101_0101_0101_0101,
            );
            guest.write(source + at, 0x2222_2222_2222_2200 + at);
        }
        guest
    };
    let guest = filled();
    let copied = call(&guest, string(OBJECT, source, 32), |a| {
        a.rep().movsb().unwrap();
    });
    assert_committed(&copied);
    let expected: Vec<u64> = (0..32)
        .step_by(8)
        .map(|at| 0x2222_2222_2222_2200 + at)
        .collect();
    assert_eq!(
        bytes(&guest),
        expected
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<u8>>()
    );
    // Each byte is loaded after the one before it was stored.
    let guest = filled();
    let spread = call(&guest, string(OBJECT + 1, OBJECT, 16), |a| {
        a.rep().movsb().unwrap();
    });
    assert_committed(&spread);
    assert_eq!(bytes(&guest)[..17], [0; 17]);
    assert_eq!(bytes(&guest)[17], 17);
    // From the last on.
    let guest = filled();
    let down = call(&guest, string(OBJECT + 16, OBJECT + 15, 16), |a| {
        a.std().unwrap();
        a.rep().movsb().unwrap();
        a.cld().unwrap();
    });
    assert_committed(&down);
    assert_eq!(bytes(&guest)[1..17], (0..16).collect::<Vec<u8>>());
}

#[test]
fn all_bytes_of_a_wide_string_store_count() {
    type Store = fn(&mut CodeAssembler);
    let stores: [(&str, u64, Store); 3] = [
        ("downwards", 1, |a| {
            a.std().unwrap();
            a.rep().stosq().unwrap();
            a.cld().unwrap();
        }),
        ("one", 7, |a| a.stosq().unwrap()),
        ("downwards with the other prefix", 1, |a| {
            a.std().unwrap();
            a.repne().stosq().unwrap();
            a.cld().unwrap();
        }),
    ];
    for (name, times, store) in stores {
        for (offset, is_own) in [(OBJECT_BYTES - 8, true), (OBJECT_BYTES - 7, false)] {
            let guest = guest();
            let result = call(&guest, string(OBJECT + offset, 0, times), |a| {
                a.mov(rax, 0x0102_0304_0506_0708u64).unwrap();
                store(a);
            });
            match is_own {
                true => {
                    assert_committed(&result);
                    assert_eq!(guest.read(OBJECT + offset), 0x0102_0304_0506_0708, "{name}");
                }
                false => assert_stray(&guest, &result, OBJECT + OBJECT_BYTES),
            }
        }
    }
    // Downwards over the first byte that is the call's.
    let guest = guest();
    let result = call(&guest, string(OBJECT + 8, 0, 3), |a| {
        a.std().unwrap();
        a.rep().stosq().unwrap();
        a.cld().unwrap();
    });
    assert_stray(&guest, &result, OBJECT - 8);
}

#[test]
fn what_is_loaded_from_a_port_is_looked_at_as_a_whole() {
    for (times, is_own) in [(4, true), (5, false)] {
        let guest = guest();
        let to = OBJECT + OBJECT_BYTES - 16;
        let result = call(&guest, string(to, 0, times), |a| {
            a.mov(edx, u32::from(DEVICE_PORTS.start)).unwrap();
            a.rep().insd().unwrap();
        });
        match is_own {
            true => assert_committed(&result),
            false => assert_stray(&guest, &result, OBJECT + OBJECT_BYTES),
        }
    }
}

#[test]
fn a_store_that_goes_over_the_end_of_a_page_is_one() {
    let mut guest = guest();
    guest.map(DRIVER_DATA + PAGE, gpa_of(KERNEL_DATA), 2);
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, 0x1122_3344_5566_7788u64).unwrap();
        a.mov(qword_ptr(rdi), rcx).unwrap();
        a.ret().unwrap();
    });
    let mut regs = guest.entry_regs();
    regs.rdi = DRIVER_DATA + PAGE - 4;
    let mut kernel = Kernel {
        writable: vec![(regs.rdi, 7)],
        ..Default::default()
    };
    let mut domain = guest.domain();
    let mut call = |kernel: &mut Kernel| Called {
        before: guest.all(),
        result: guest.call_with(&mut domain, kernel, regs),
    };
    assert_stray(&guest, &call(&mut kernel), DRIVER_DATA + PAGE + 3);
    kernel.writable = vec![(regs.rdi, 8)];
    assert_committed(&call(&mut kernel));
    assert_eq!(guest.read(regs.rdi) & 0xffff_ffff, 0x5566_7788);
    assert_eq!(guest.read(KERNEL_DATA) & 0xffff_ffff, 0x1122_3344);
}

#[test]
fn a_page_that_is_all_the_calls_costs_one_exit() {
    let guest = guest();
    guest.code(DRIVER_TEXT, |a| {
        for offset in 0..100 {
            a.mov(byte_ptr(rdi + offset), 1).unwrap();
        }
        a.ret().unwrap();
    });
    let exits = |writable| {
        let mut domain = guest.domain();
        let mut kernel = Kernel {
            writable: vec![writable],
            ..Default::default()
        };
        let mut regs = guest.entry_regs();
        regs.rdi = DRIVER_DATA;
        let result = guest.call_with(&mut domain, &mut kernel, regs);
        assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        result.stats.runs
    };
    let whole = exits((DRIVER_DATA, PAGE));
    assert!(whole < 10, "{whole}");
    assert!(exits((DRIVER_DATA, PAGE - 1)) >= whole + 198);
}
