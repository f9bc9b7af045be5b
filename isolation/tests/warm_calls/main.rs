//! What a warm call of a hand-made guest costs the host, on the host's real KVM: pages looked at,
//! system calls and allocations, by their numbers.

#![allow(clippy::unwrap_used, reason = "test code")]

#[path = "../common/mod.rs"]
mod common;
mod counting;

use common::*;
use counting::allocations;
use iced_x86::code_asm::*;
use isolation::domain::Domain;
use isolation::domain::transaction::{CallEnd, CallRequest, CallResult};
use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress};

/// Where the pages are that drivers write, present, writable and not executable.
const WRITTEN: u64 = 0xffff_c900_0080_0000;
const WRITTEN_GPA: u64 = 0x30_0000;
const WRITTEN_FLAGS: u64 = 2 | 1 << 63;
/// The second of them once more.
const ALIAS: u64 = 0xffff_c900_0090_0000;
/// Offset in the kernel's text of a function that writes to the second one.
const KERNEL_WRITES: u64 = KERNEL_TEXT + 0x100;
/// Calls after which pages are kept and nothing is grown any more.
const UNTIL_WARM: u32 = 40;

/// A guest with this many pages to write, and a kernel that lets its driver.
fn guest_with(pages: u64) -> (Guest, Kernel) {
    let mut guest = Guest::new();
    for at in (0..pages).map(|page| page * PAGE) {
        guest.map(WRITTEN + at, WRITTEN_GPA + at, WRITTEN_FLAGS);
    }
    guest.map(ALIAS, WRITTEN_GPA + PAGE, WRITTEN_FLAGS);
    let kernel = Kernel {
        writable: vec![(WRITTEN, pages * PAGE), (ALIAS, PAGE)],
        ..Kernel::default()
    };
    (guest, kernel)
}

/// The word that a driver counts up in page `page`.
fn word(guest: &Guest, page: u64) -> u64 {
    let at = GuestAddress(WRITTEN_GPA + page * PAGE);
    guest.memory.read_obj(at).unwrap()
}

fn committed(result: &CallResult) {
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
}

#[test]
fn a_warm_call_allocates_nothing_and_asks_the_host_for_nothing() {
    const PAGES: u64 = 9;
    let (guest, mut kernel) = guest_with(PAGES);
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, WRITTEN).unwrap();
        for _ in 0..PAGES {
            a.inc(qword_ptr(rcx)).unwrap();
            a.add(rcx, PAGE as i32).unwrap();
        }
        a.mov(rdx, DEVICE).unwrap();
        a.mov(dword_ptr(rdx), eax).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    kernel.device_writes.reserve(4096);
    let mut call = || guest.call(&mut domain, &mut kernel);
    (0..UNTIL_WARM).for_each(|_| committed(&call()));
    for _ in 0..UNTIL_WARM {
        let mut result = None;
        assert_eq!(allocations(|| result = Some(call())), 0);
        let result = result.unwrap();
        committed(&result);
        // The store to the device, and the return; a signal may end a run early.
        assert!(result.stats.runs >= 2);
        assert_eq!(result.stats.other_syscalls, 0);
        assert_eq!(u64::from(result.stats.dirty_pages), PAGES + 1);
    }
    assert_eq!(word(&guest, PAGES - 1), u64::from(2 * UNTIL_WARM));
}

/// The guest's vCPUs have other GS bases, which P's would have to be given anew if they had one for
/// all: two system calls, and before Linux 6.13 a grace period of RCU.
#[test]
fn calls_of_two_processors_by_turns_are_warm_too() {
    let (guest, mut kernel) = guest_with(1);
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, WRITTEN).unwrap();
        a.inc(qword_ptr(rcx)).unwrap();
        a.rdgsbase(rax).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let of_vcpu = |vcpu: u8| {
        let mut sregs = guest.sregs;
        // CR4.FSGSBASE.
        sregs.cr4 |= 1 << 16;
        sregs.gs.base = WRITTEN + u64::from(vcpu) * 64;
        sregs
    };
    let sregs: Vec<_> = (0..VCPUS).map(of_vcpu).collect();
    kernel.memory = Some(guest.memory.clone());
    let mut by_turns = |each: fn(CallResult)| {
        for (vcpu, sregs) in (0..VCPUS).zip(&sregs) {
            let request = CallRequest {
                sregs,
                vcpu,
                ..guest.request(guest.entry_regs())
            };
            let result = domain.call(&request, &mut kernel).unwrap();
            committed(&result);
            assert_eq!(result.regs.rax, sregs.gs.base);
            each(result);
        }
    };
    (0..UNTIL_WARM).for_each(|_| by_turns(drop));
    for _ in 0..UNTIL_WARM {
        by_turns(|result| assert_eq!(result.stats.other_syscalls, 0));
    }
    assert_eq!(
        word(&guest, 0),
        u64::from(2 * UNTIL_WARM) * u64::from(VCPUS)
    );
    let unknown = CallRequest {
        vcpu: VCPUS,
        ..guest.request(guest.entry_regs())
    };
    assert!(domain.call(&unknown, &mut kernel).is_err());
}

/// A driver that counts up the first page, and as `rdi` says: 1, the second; 2, the second by its
/// other address; 3, the second by a kernel function.
fn chooses() -> (Guest, Domain, Kernel) {
    let (guest, kernel) = guest_with(2);
    guest.code(KERNEL_WRITES, |a| {
        a.mov(rcx, WRITTEN + PAGE).unwrap();
        a.inc(qword_ptr(rcx)).unwrap();
        a.ret().unwrap();
    });
    let mut code = CodeAssembler::new(64).unwrap();
    let mut ways = [(); 3].map(|()| code.create_label());
    code.mov(rcx, WRITTEN).unwrap();
    code.inc(qword_ptr(rcx)).unwrap();
    // What is on the second page is seen in any case.
    code.mov(rax, qword_ptr(rcx + PAGE as i32)).unwrap();
    for (number, way) in (1..).zip(ways) {
        code.cmp(rdi, number).unwrap();
        code.je(way).unwrap();
    }
    code.ret().unwrap();
    code.set_label(&mut ways[0]).unwrap();
    code.inc(qword_ptr(rcx + PAGE as i32)).unwrap();
    code.ret().unwrap();
    code.set_label(&mut ways[1]).unwrap();
    code.mov(rcx, ALIAS).unwrap();
    code.inc(qword_ptr(rcx)).unwrap();
    code.ret().unwrap();
    code.set_label(&mut ways[2]).unwrap();
    code.call(KERNEL_WRITES).unwrap();
    code.ret().unwrap();
    let bytes = code.assemble(DRIVER_TEXT).unwrap();
    guest.code(DRIVER_TEXT, |a| a.db(&bytes).unwrap());
    let mut domain = guest.domain();
    let call = bytes.iter().rposition(|byte| *byte == 0xe8).unwrap();
    domain
        .redirect(DRIVER_TEXT + call as u64, KERNEL_WRITES)
        .unwrap();
    (guest, domain, kernel)
}

#[test]
fn only_pages_that_a_call_has_written_are_looked_at_and_all_of_them() {
    let (guest, mut domain, mut kernel) = chooses();
    let mut second = 0;
    let mut call = |way: u64| {
        // The guest changes the page between two calls, too.
        guest
            .memory
            .write_obj(second, GuestAddress(WRITTEN_GPA + PAGE))
            .unwrap();
        let regs = kvm_regs {
            rdi: way,
            ..guest.entry_regs()
        };
        let result = guest.call_with(&mut domain, &mut kernel, regs);
        committed(&result);
        assert_eq!(result.regs.rax, second);
        second += u64::from(way != 0);
        assert_eq!(word(&guest, 1), second, "way {way}");
        second += 100;
        result.stats.dirty_pages
    };
    for way in [1, 2, 3, 0, 1, 2, 3] {
        call(way);
    }
    // The stack, which has the return address, and the first page.
    assert_eq!(call(0), 2);
    for (way, pages) in [(1, 3), (0, 2), (2, 3), (0, 2), (1, 3), (2, 3)] {
        assert_eq!(call(way), pages, "way {way}");
    }
    // In the kernel root all pages that are kept are, tables of the guest's among them where the
    // processor has marked their entries as used.
    assert!(call(3) >= 3);
    for way in [0, 1, 2, 0, 3, 2, 0] {
        call(way);
    }
    assert_eq!(call(0), 2);
}
