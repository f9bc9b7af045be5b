//! Calls of a hand-made guest whose device writes memory by itself meanwhile, on the host's real
//! KVM.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::Domain;
use isolation::domain::transaction::{CallEnd, CallResult};
use isolation::domain::violation::ViolationKind;
use isolation::guest::addr::{Gva, GvaRange};

/// Guest physical address of a page that driver, kernel and device write.
const RING: u64 = 0x10_0000;
/// Where all of them have it.
const RING_VA: u64 = DIRECT_MAP + RING;
/// What the device writes, and where.
const COMPLETION: (u64, u8) = (RING + 0x800, 0xd0);
const KERNEL_FUNCTION: u64 = KERNEL_TEXT + 0x100;
/// Flags of a page of data: writable, not executable.
const WRITE_DATA: u64 = 2 | 1 << 63;

/// A guest whose device writes memory while calls run; the isolator knows of it, or does not.
fn guest(knows: bool) -> Guest {
    let mut guest = Guest::new();
    guest.moving = knows
        .then(|| GvaRange::new(Gva(DIRECT_MAP), 512 * PAGE))
        .flatten();
    guest
}

fn kernel() -> Kernel {
    Kernel {
        writable: vec![(DRIVER_DATA, PAGE), (RING_VA, PAGE)],
        dma: vec![COMPLETION],
        ..Default::default()
    }
}

/// Stores to the ring, then to the device, which moves data at once.
fn posts(a: &mut CodeAssembler) {
    a.mov(rcx, RING_VA).unwrap();
    a.add(qword_ptr(rcx), 1).unwrap();
    a.mov(rcx, DEVICE).unwrap();
    a.mov(dword_ptr(rcx), 1).unwrap();
    a.ret().unwrap();
}

fn completed(guest: &Guest) -> u64 {
    guest.read(RING_VA + 0x800)
}

/// The device's next completion, which a call that is at it must not take back.
fn clear(guest: &Guest) {
    guest.write(RING_VA + 0x800, 0);
}

fn assert_committed(result: &CallResult) {
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
}

/// The driver's store has the kernel function do it instead.
fn with_kernel_function(guest: &Guest) -> Domain {
    guest.code(KERNEL_FUNCTION, |a| {
        a.mov(rcx, RING_VA).unwrap();
        a.add(qword_ptr(rcx), 1).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.call(KERNEL_FUNCTION).unwrap();
        a.mov(rcx, DEVICE).unwrap();
        a.mov(dword_ptr(rcx), 1).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT, KERNEL_FUNCTION).unwrap();
    domain
}

#[test]
fn what_a_device_writes_during_a_call_stays() {
    for knows in [true, false] {
        let guest = guest(knows);
        guest.code(DRIVER_TEXT, posts);
        let mut domain = guest.domain();
        let mut kernel = kernel();
        for round in 1..=6 {
            clear(&guest);
            let result = guest.call(&mut domain, &mut kernel);
            assert_committed(&result);
            assert_eq!(guest.read(RING_VA), round);
            // Who does not know of it takes it for what the driver has left of the page.
            let stays = if knows { u64::from(COMPLETION.1) } else { 0 };
            assert_eq!(completed(&guest), stays, "round {round}");
        }
    }
}

#[test]
fn it_stays_on_a_page_that_a_kernel_function_writes_too() {
    for knows in [true, false] {
        let guest = guest(knows);
        let mut domain = with_kernel_function(&guest);
        let mut kernel = kernel();
        for round in 1..=6 {
            clear(&guest);
            let result = guest.call(&mut domain, &mut kernel);
            assert_committed(&result);
            assert_eq!(guest.read(RING_VA), round);
            let stays = if knows { u64::from(COMPLETION.1) } else { 0 };
            assert_eq!(completed(&guest), stays, "round {round}");
        }
    }
}

#[test]
fn warm_calls_need_no_further_exit() {
    let runs = |knows| {
        let guest = guest(knows);
        let mut domain = with_kernel_function(&guest);
        let mut kernel = kernel();
        for _ in 0..4 {
            guest.call(&mut domain, &mut kernel);
        }
        let stats = guest.call(&mut domain, &mut kernel).stats;
        (stats.runs, stats.opened, stats.other_syscalls)
    };
    assert_eq!(runs(true), runs(false));
}

#[test]
fn a_load_shows_what_the_device_had_written_before() {
    for registers_alone in [vec![], vec![8]] {
        let guest = guest(true);
        guest.code(DRIVER_TEXT, |a| {
            a.mov(rdx, RING_VA).unwrap();
            a.add(qword_ptr(rdx), 1).unwrap();
            a.mov(rcx, DEVICE).unwrap();
            a.mov(eax, dword_ptr(rcx + 8)).unwrap();
            a.mov(rax, qword_ptr(rdx + 0x800)).unwrap();
            a.ret().unwrap();
        });
        let mut domain = guest.domain();
        let mut kernel = Kernel {
            registers_alone,
            ..kernel()
        };
        for round in 1..=6 {
            clear(&guest);
            let result = guest.call(&mut domain, &mut kernel);
            assert_committed(&result);
            assert_eq!(result.regs.rax, u64::from(COMPLETION.1));
            assert_eq!(
                (guest.read(RING_VA), completed(&guest)),
                (round, result.regs.rax)
            );
        }
    }
}

#[test]
fn a_call_that_fails_takes_back_its_own_bytes_alone() {
    let guest = guest(true);
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rdx, RING_VA).unwrap();
        a.mov(qword_ptr(rdx), 7).unwrap();
        a.mov(rcx, DEVICE).unwrap();
        a.mov(dword_ptr(rcx), 1).unwrap();
        a.ud2().unwrap();
    });
    let mut domain = guest.domain();
    let mut kernel = kernel();
    guest.write(RING_VA, 5);
    for _ in 0..4 {
        clear(&guest);
        let result = guest.call(&mut domain, &mut kernel);
        let kind = violation_kind(&result);
        assert!(matches!(kind, ViolationKind::Exception { vector: 6, .. }));
        assert_eq!(guest.read(RING_VA), 5);
        assert_eq!(completed(&guest), u64::from(COMPLETION.1));
        assert!(kernel.device_writes.is_empty());
    }
}

#[test]
fn what_was_shown_to_the_device_is_taken_back_without_what_it_wrote() {
    let guest = guest(true);
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rdx, RING_VA).unwrap();
        a.mov(qword_ptr(rdx), 7).unwrap();
        a.mov(rcx, DEVICE).unwrap();
        a.mov(dword_ptr(rcx), 1).unwrap();
        a.mov(eax, dword_ptr(rcx + 8)).unwrap();
        a.mov(qword_ptr(rdx + 8), 9).unwrap();
        a.ud2().unwrap();
    });
    let mut domain = guest.domain();
    // The device moves data between its checkpoint and its being put back, so memory is not as it
    // was then.
    let mut kernel = Kernel {
        moves_data: true,
        ..kernel()
    };
    for _ in 0..4 {
        clear(&guest);
        let result = guest.call(&mut domain, &mut kernel);
        assert!(violation(&result).reached_device);
        assert_eq!((guest.read(RING_VA), guest.read(RING_VA + 8)), (0, 0));
        assert_eq!(completed(&guest), u64::from(COMPLETION.1));
    }
}

/// Linux begins its areas of memory at any GiB, so that stacks are below the same entry of the
/// first table as memory.
#[test]
fn what_is_beside_such_memory_is_written_as_before() {
    const BESIDE: u64 = 0xffff_88a0_0000_0000;
    let mut guest = guest(true);
    guest.map(BESIDE, 0x24_0000, WRITE_DATA);
    guest.code(KERNEL_FUNCTION, |a| {
        a.mov(rcx, BESIDE).unwrap();
        a.add(qword_ptr(rcx), 1).unwrap();
        a.mov(rcx, RING_VA).unwrap();
        a.add(qword_ptr(rcx), 1).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.call(KERNEL_FUNCTION).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT, KERNEL_FUNCTION).unwrap();
    for round in 1..4 {
        assert_committed(&guest.call(&mut domain, &mut kernel()));
        // By its first address.
        assert_eq!((guest.read(STACK), guest.read(RING_VA)), (round, round));
    }
}

/// A driver that resets its device, waits for that, and looks.
#[test]
fn a_device_does_what_it_was_told_before_the_call_waits() {
    let guest = guest(true);
    let wait = KERNEL_TEXT + 0x200;
    guest.code(wait, |a| a.ret().unwrap());
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rdx, RING_VA).unwrap();
        a.mov(qword_ptr(rdx), 7).unwrap();
        a.mov(rcx, DEVICE).unwrap();
        a.mov(dword_ptr(rcx), 1).unwrap();
        a.mov(edi, 1).unwrap();
        a.call(wait).unwrap();
        a.mov(rdx, RING_VA).unwrap();
        a.mov(rax, qword_ptr(rdx + 0x800)).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let unit = std::time::Duration::from_micros(1);
    domain.sleep_function(wait, unit).unwrap();
    domain.redirect(DRIVER_TEXT + 38, wait).unwrap();
    let result = guest.call(&mut domain, &mut kernel());
    assert_committed(&result);
    assert_eq!(result.stats.sleeps, 1);
    assert_eq!(result.regs.rax, u64::from(COMPLETION.1));
}

#[test]
fn what_the_kernel_has_closed_stays_closed() {
    let mut guest = guest(true);
    // The guest's own tables say that nobody writes it.
    guest.map(0xffff_8880_0030_0000, RING, 0);
    guest.moving = GvaRange::new(Gva(DIRECT_MAP), 1024 * PAGE);
    guest.code(KERNEL_FUNCTION, |a| {
        a.mov(rcx, 0xffff_8880_0030_0000u64).unwrap();
        a.mov(qword_ptr(rcx), 1).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.call(KERNEL_FUNCTION).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT, KERNEL_FUNCTION).unwrap();
    let result = guest.call(&mut domain, &mut kernel());
    let kind = violation_kind(&result);
    assert!(
        matches!(kind, ViolationKind::KernelException { vector: 14, .. }),
        "{result:?}"
    );
}
