//! Calls that print, and what they wait for.

use super::*;

/// The console of the kernel: its word says who writes to it, another counts how often it was put
/// off.
const TAKE_CONSOLE: u64 = KERNEL_TEXT + 0x300;

const DEFER_CONSOLE: u64 = KERNEL_TEXT + 0x400;

const WRITER: u64 = KERNEL_DATA + 0x100;

const DEFERRED: u64 = KERNEL_DATA + 0x108;

/// A driver that calls a kernel function that prints, and returns whether it took the console.
fn prints(guest: &Guest) -> Domain {
    let print = KERNEL_TEXT + 0x100;
    guest.code(print, |a| {
        a.call(TAKE_CONSOLE).unwrap();
        a.ret().unwrap();
    });
    // The guest's own takes it.
    guest.code(TAKE_CONSOLE, |a| {
        for _ in 0..Console::CODE_BYTES {
            a.nop().unwrap();
        }
        a.mov(eax, 1).unwrap();
        a.ret().unwrap();
    });
    guest.code(DEFER_CONSOLE, |a| {
        a.mov(rcx, DEFERRED).unwrap();
        a.inc(qword_ptr(rcx)).unwrap();
        a.mov(eax, 0x77).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.call(print).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT, print).unwrap();
    let console = Console::new(TAKE_CONSOLE, WRITER, DEFER_CONSOLE).unwrap();
    domain.defer_console(&console).unwrap();
    domain
}

#[test]
fn what_a_call_prints_is_written_to_the_console_after_it() {
    let guest = Guest::new();
    let mut domain = prints(&guest);
    guest.write(WRITER, 0);
    let regs = guest.entry_regs();
    let result = begin(&guest, &mut domain, &mut Kernel::with_data(), regs);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!((result.regs.rax, guest.read(DEFERRED)), (0, 1));
}

#[test]
fn a_call_that_would_wait_for_who_writes_to_the_console_goes_on_in_the_guest() {
    let guest = Guest::new();
    let mut domain = prints(&guest);
    guest.write(WRITER, 0xffff_8880_0000_1000);
    let regs = guest.entry_regs();
    let mut kernel = Kernel::with_data();
    let result = begin(&guest, &mut domain, &mut kernel, regs);
    assert_eq!(result.regs.rip, TAKE_CONSOLE);
    assert_eq!(guest.read(result.regs.rsp + 8), RETURN_GATE);
    let end = go_on(&guest, &mut domain, &mut kernel, &result);
    assert!(matches!(end.end, CallEnd::Committed), "{end:?}");
    assert_eq!((end.regs.rax, guest.read(DEFERRED)), (100, 0));
}

#[test]
fn a_call_waits_for_others_in_the_guest_and_not_at_all_where_nothing_is_under_way() {
    let (function, under_way) = (KERNEL_TEXT + 0x300, 1 << 18);
    for word in [0, 1, under_way, under_way | 1] {
        let guest = Guest::new();
        // The kernel's own would wait for ever while others stand still.
        guest.code(function, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again).unwrap();
            a.nop().unwrap();
            a.test(dword_ptr(rdi + 0x38), under_way).unwrap();
            a.jne(again).unwrap();
            a.ret().unwrap();
        });
        guest.code(DRIVER_TEXT, |a| {
            a.call(function).unwrap();
            a.ret().unwrap();
        });
        guest.write(KERNEL_DATA + 0x38, word as u64);
        let mut domain = guest.domain();
        domain.redirect(DRIVER_TEXT, function).unwrap();
        let waiting = Waiting::new(function, 0x38, under_way as u32).unwrap();
        domain.wait_in_guest(&waiting).unwrap();
        let mut regs = guest.entry_regs();
        regs.rdi = KERNEL_DATA;
        let mut kernel = Kernel::with_data();
        let result = begin(&guest, &mut domain, &mut kernel, regs);
        if word & under_way == 0 {
            assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
            continue;
        }
        // From its beginning, with its arguments.
        assert_eq!((result.regs.rip, result.regs.rdi), (function, KERNEL_DATA));
        assert_eq!(guest.read(result.regs.rsp), RETURN_GATE);
        let end = go_on(&guest, &mut domain, &mut kernel, &result);
        assert!(matches!(end.end, CallEnd::Committed), "{end:?}");
    }
}
