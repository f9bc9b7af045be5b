//! The private VM run once before there is a call, on the host's real KVM with a hand-made guest:
//! nobody notices, but for the time that the first call takes.

#![allow(clippy::unwrap_used, reason = "test code")]

#[path = "common/mod.rs"]
mod common;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::transaction::CallEnd;

/// A guest whose function returns 7.
fn guest() -> Guest {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(eax, 7).unwrap();
        a.ret().unwrap();
    });
    guest
}

#[test]
fn what_was_patched_before_stays_and_the_guest_is_as_it_was() {
    let guest = guest();
    let mut domain = guest.domain();
    domain.patch(DRIVER_TEXT + 1, &[6]).unwrap();
    domain.patch(DRIVER_TEXT + PAGE, &[5]).unwrap();
    let before = guest.all();
    domain.rehearse().unwrap();
    assert!(guest.all() == before);
    for _ in 0..3 {
        let result = guest.call(&mut domain, &mut Kernel::with_data());
        assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        assert_eq!(result.regs.rax, 6);
        for (at, byte) in [(DRIVER_TEXT + 1, 6), (DRIVER_TEXT + PAGE, 5)] {
            let mut patched = [0];
            domain.code(at, &mut patched).unwrap();
            assert_eq!(patched, [byte]);
        }
    }
    // It may be done at any time before the first call, also twice.
    let mut again = guest.domain();
    again.rehearse().unwrap();
    again.rehearse().unwrap();
    let result = guest.call(&mut again, &mut Kernel::with_data());
    assert_eq!(result.regs.rax, 7);
}

/// What the guest does meanwhile is what calls see.
#[test]
fn code_that_was_read_before_is_that_of_the_guest_in_the_call() {
    let guest = guest();
    let mut domain = guest.domain();
    domain.rehearse().unwrap();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(eax, 8).unwrap();
        a.ret().unwrap();
    });
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    assert_eq!(result.regs.rax, 8);
}

/// Pages of code that the guest has taken away: they are left to the calls.
#[test]
fn code_that_is_not_there_is_no_error() {
    let mut guest = guest();
    guest.map(DRIVER_TEXT + PAGE, 0, 0);
    guest.unmap(DRIVER_TEXT + PAGE);
    let mut domain = guest.domain();
    domain.rehearse().unwrap();
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.regs.rax, 7);
}
