//! Calls of a hand-made guest with gigabytes of memory, on the host's real KVM: so many places that
//! the roots are built anew in the middle of a call.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::host_memory::HostMemory;
use isolation::domain::transaction::CallEnd;
use isolation::domain::violation::ViolationKind;
use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress};

const LARGE: u64 = 2 << 20;
/// Below the devices.
const MEMORY: u64 = 3 << 30;
/// Each 2 MiB takes a table of its own in the driver's root, and there is room for 1,024.
const PLACES: u64 = 1100;
const FIRST: u64 = 2;

/// A word in each 2 MiB of the direct map, behind what the guest uses.
fn place(index: u64) -> (u64, GuestAddress) {
    let gpa = (FIRST + index) * LARGE + PAGE;
    (DIRECT_MAP + gpa, GuestAddress(gpa))
}

fn guest() -> Guest {
    let mut guest = Guest::with_memory(MEMORY / PAGE);
    for index in 0..PLACES {
        let (va, gpa) = place(index);
        guest.map_large(va - PAGE, gpa.0 - PAGE);
    }
    guest
}

fn kernel() -> Kernel {
    Kernel {
        writable: vec![(DRIVER_DATA, 0x40), (place(0).0, MEMORY)],
        ..Default::default()
    }
}

/// Adds 1 in all places, twice, with `r11` in use meanwhile.
fn add_everywhere(a: &mut CodeAssembler) {
    for _ in 0..2 {
        a.mov(r11, 0x1111_2222_3333u64).unwrap();
        a.mov(rcx, place(0).0).unwrap();
        a.mov(eax, PLACES as i32).unwrap();
        let mut next = a.create_label();
        a.set_label(&mut next).unwrap();
        a.inc(qword_ptr(rcx)).unwrap();
        a.add(rcx, LARGE as i32).unwrap();
        a.dec(eax).unwrap();
        a.jnz(next).unwrap();
    }
}

fn words(guest: &Guest) -> Vec<u64> {
    let word = |index| guest.memory.read_obj(place(index).1).unwrap();
    (0..PLACES).map(word).collect()
}

#[test]
fn roots_that_are_built_anew_in_mid_call_are_loaded_and_the_call_goes_on() {
    let guest = guest();
    guest.code(DRIVER_TEXT, |a| {
        add_everywhere(a);
        a.mov(rax, r11).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut kernel());
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.regs.rax, 0x1111_2222_3333);
    assert!(words(&guest).iter().all(|word| *word == 2));
    let stats = result.stats;
    assert!(stats.rebuilds >= 2, "{stats:?}");
    assert_eq!(stats.rebuilds, stats.root_loads, "{stats:?}");
}

#[test]
fn stores_that_are_looked_at_one_by_one_go_on_when_the_roots_are_built_anew() {
    let mut guest = guest();
    guest.each_store = true;
    guest.code(DRIVER_TEXT, |a| {
        add_everywhere(a);
        a.mov(rax, r11).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    // A word of each page, which others have the rest of.
    let mut kernel = Kernel {
        writable: (0..PLACES).map(|index| (place(index).0, 8)).collect(),
        ..Default::default()
    };
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!(result.regs.rax, 0x1111_2222_3333);
    assert!(words(&guest).iter().all(|word| *word == 2));
    assert!(result.stats.rebuilds >= 2, "{:?}", result.stats);
}

#[test]
fn a_call_that_fails_after_its_roots_were_built_anew_leaves_nothing() {
    let guest = guest();
    guest.code(DRIVER_TEXT, |a| {
        add_everywhere(a);
        a.mov(rcx, DEVICE).unwrap();
        a.mov(eax, dword_ptr(rcx)).unwrap();
        add_everywhere(a);
        a.ud2().unwrap();
    });
    let mut domain = guest.domain();
    let regs = guest.entry_regs();
    let before = guest.all();
    let result = guest.call_with(&mut domain, &mut kernel(), regs);
    let kind = violation_kind(&result);
    assert!(
        matches!(kind, ViolationKind::Exception { vector: 6, .. }),
        "{kind:?}"
    );
    assert!(violation(&result).reached_device && result.stats.root_loads >= 3);
    assert!(words(&guest).iter().all(|word| *word == 0));
    assert!(guest.all() == before);
}

#[test]
fn bytes_of_others_are_found_on_pages_that_were_opened_before_the_roots_were_built_anew() {
    let guest = guest();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DRIVER_DATA).unwrap();
        a.mov(qword_ptr(rcx), 1).unwrap();
        a.mov(qword_ptr(rcx + 0x80), -1).unwrap();
        add_everywhere(a);
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut kernel());
    let expected = ViolationKind::StrayBytes {
        address: DRIVER_DATA + 0x80,
        bytes: 8,
    };
    assert_eq!(violation_kind(&result), expected);
    assert!(result.stats.root_loads >= 1, "{:?}", result.stats);
}

#[test]
fn kernel_functions_go_on_in_their_root_when_the_roots_were_built_anew() {
    let guest = guest();
    let kernel_function = KERNEL_TEXT + 0x100;
    let callback = DRIVER_TEXT + 0x400;
    guest.code(kernel_function, |a| {
        a.push(rbx).unwrap();
        a.mov(rbx, r11).unwrap();
        a.call(rdi).unwrap();
        // Writes where the driver may not.
        a.mov(rcx, KERNEL_DATA).unwrap();
        a.add(qword_ptr(rcx), rax).unwrap();
        a.mov(rax, rbx).unwrap();
        a.pop(rbx).unwrap();
        a.ret().unwrap();
    });
    guest.code(callback, |a| {
        add_everywhere(a);
        a.mov(eax, 5).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rdi, callback).unwrap();
        a.mov(r11d, 77).unwrap();
        a.call(kernel_function).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 16, kernel_function).unwrap();
    let mut kernel = kernel();
    kernel.driver_functions.insert(callback);
    let regs = kvm_regs {
        r12: 1,
        ..guest.entry_regs()
    };
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
    assert_eq!((result.regs.rax, guest.read(KERNEL_DATA)), (77, 5));
    assert!(words(&guest).iter().all(|word| *word == 2));
    assert!(result.stats.root_loads >= 2, "{:?}", result.stats);
}

#[test]
fn a_call_that_copies_more_pages_than_the_host_keeps_is_stopped() {
    let mut guest = guest();
    guest.host_memory = HostMemory::new(16 << 20);
    let kernel_function = KERNEL_TEXT + 0x100;
    guest.code(kernel_function, |a| {
        // A word in each page of 2 MiB.
        a.mov(eax, (LARGE / PAGE) as i32).unwrap();
        let mut next = a.create_label();
        a.set_label(&mut next).unwrap();
        a.mov(qword_ptr(rcx), 1).unwrap();
        a.add(rcx, PAGE as i32).unwrap();
        a.dec(eax).unwrap();
        a.jnz(next).unwrap();
        a.ret().unwrap();
    });
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, place(0).0).unwrap();
        a.mov(edx, 40).unwrap();
        let mut next = a.create_label();
        a.set_label(&mut next).unwrap();
        a.call(kernel_function).unwrap();
        // An exit now and then: a KVM that emulates the guest's kernel mode looks at its ring too
        // late otherwise.
        a.mov(rsi, DEVICE).unwrap();
        a.mov(dword_ptr(rsi), edx).unwrap();
        a.dec(edx).unwrap();
        a.jnz(next).unwrap();
        a.ret().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 15, kernel_function).unwrap();
    let result = guest.call(&mut domain, &mut kernel());
    assert_eq!(violation_kind(&result), ViolationKind::HostMemory);
    assert!(words(&guest).iter().all(|word| *word == 0));
    assert_eq!(guest.host_memory.used(), 0);
}
