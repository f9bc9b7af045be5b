//! The loop that calls kernel functions in the guest, run by a processor.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

mod common;

use common::{DRIVER_TEXT, Guest, KERNEL_DATA, KERNEL_TEXT, PAGE, STACK, STACK_TOP, gpa_of};
use devices::dma::GuestMemory;
use iced_x86::code_asm::{al, qword_ptr, r8, r9, r10, r11, rax, rbx, rcx, rdi, rdx, rsi};
use isolation::compensation::call_loop::{CallLoop, LITTLE_STACK, MAX_ROWS, MUCH_STACK, Row};
use isolation::guest::addr::{Gva, GvaRange};
use isolation::guest::modules::ModuleLayout;
use isolation::guest::paging::{AddressSpace, VirtMemory};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const FUNCTION: u64 = KERNEL_TEXT + 0x100;
const GATE: u64 = DRIVER_TEXT + 0x10;
const LOG: u64 = KERNEL_DATA + 8;

/// A guest whose kernel function writes its arguments down, and ruins what a callee may ruin.
fn guest() -> Guest {
    let guest = Guest::new();
    guest.write(KERNEL_DATA, LOG);
    guest.code(FUNCTION, |a| {
        a.push(rbx).unwrap();
        a.mov(rbx, KERNEL_DATA).unwrap();
        a.mov(rax, qword_ptr(rbx)).unwrap();
        for (at, register) in [rdi, rsi, rdx, rcx, r8, r9].into_iter().enumerate() {
            a.mov(qword_ptr(rax + at as i32 * 8), register).unwrap();
        }
        a.add(rax, 48).unwrap();
        a.mov(qword_ptr(rbx), rax).unwrap();
        for register in [rax, rdi, rsi, rdx, rcx, r8, r9, r10, r11] {
            a.mov(register, 0xdead_beef_u64).unwrap();
        }
        a.pop(rbx).unwrap();
        a.ret().unwrap();
    });
    guest.code(GATE, |a| a.out(0xe1, al).unwrap());
    guest
}

fn virt(guest: &Guest) -> VirtMemory<'_, GuestMemory> {
    let sregs = &guest.sregs;
    VirtMemory {
        space: AddressSpace::from_registers(sregs.cr3, sregs.cr4, sregs.efer, 46),
        memory: &*guest.memory,
    }
}

fn layout(guest: &Guest) -> ModuleLayout {
    let sections = [(".text".to_owned(), DRIVER_TEXT)];
    ModuleLayout::new("nic", &sections, None, &virt(guest)).unwrap()
}

fn rows(count: usize) -> Vec<Row> {
    let row = |n: u64| [FUNCTION, n, n + 100, n + 200, n + 300, n + 400, n << 40];
    (1..).map(row).take(count).collect()
}

/// Registers of a caller whose stack ends at `rsp`.
fn caller(rsp: u64) -> kvm_regs {
    kvm_regs {
        rsp,
        rax: 0xa,
        rbx: 0xb,
        rbp: 0xbb,
        r12: 0xc,
        r13: 0xd,
        r14: 0xe,
        r15: 0xf,
        rflags: 2,
        ..kvm_regs::default()
    }
}

/// Runs the guest until it writes to a port.
fn run(guest: &Guest, regs: &kvm_regs) -> (u16, kvm_regs) {
    let vm = guest.kvm.create_vm().unwrap();
    let at = guest.memory.get_host_address(GuestAddress(0)).unwrap();
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: common::MEMORY_PAGES * PAGE,
        userspace_addr: at as u64,
    };
    // SAFETY: the memory lives longer than the VM, and nobody else looks at it meanwhile.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = guest.sregs;
    // A flat 64-bit code segment, and data to match.
    (sregs.cs.base, sregs.cs.selector, sregs.cs.type_) = (0, 0x10, 0xb);
    (sregs.cs.l, sregs.cs.db, sregs.cs.g, sregs.cs.limit) = (1, 0, 1, u32::MAX);
    (sregs.ss.base, sregs.ss.selector, sregs.ss.type_) = (0, 0x18, 0x3);
    (sregs.ss.db, sregs.ss.g, sregs.ss.limit) = (1, 1, u32::MAX);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(regs).unwrap();
    let port = match vcpu.run().unwrap() {
        VcpuExit::IoOut(port, _) => port,
        other => panic!("{other:?}"),
    };
    (port, vcpu.get_regs().unwrap())
}

#[test]
fn a_row_of_returns_leads_over_what_is_on_a_stack() {
    let guest = guest();
    let call_loop = CallLoop::place(&layout(&guest), &virt(&guest)).unwrap();
    let top = STACK_TOP - 0x80;
    for slot in (top - 0x100..top).step_by(8) {
        guest.write(slot, call_loop.returns());
    }
    guest.write(top, GATE);
    let regs = kvm_regs {
        rip: call_loop.returns(),
        ..caller(top - 0x100)
    };
    let (port, after) = run(&guest, &regs);
    assert_eq!((port, after.rsp), (0xe1, top + 8));
}

#[test]
fn each_function_is_called_once_and_in_order_and_the_caller_finds_its_registers() {
    let guest = guest();
    let call_loop = CallLoop::place(&layout(&guest), &virt(&guest)).unwrap();
    for count in [1, 2, 64] {
        guest.write(KERNEL_DATA, LOG);
        let (rows, caller) = (rows(count), caller(STACK_TOP - 0x80));
        let begun = call_loop.begin(&rows, &caller, GATE, virt(&guest));
        let (regs, progress) = begun.unwrap();
        assert_eq!(progress.function(&guest.memory), FUNCTION);
        let (port, after) = run(&guest, &regs);
        assert_eq!((port, after.rsp), (0xe1, caller.rsp));
        let kept = |regs: &kvm_regs| [regs.rbx, regs.rbp, regs.r12, regs.r13, regs.r14, regs.r15];
        assert_eq!(kept(&after), kept(&caller));
        assert_eq!(after.rax, caller.rax, "what it is told");
        assert_eq!(after.rflags & 0x200, 0);
        assert_eq!(guest.read(KERNEL_DATA), LOG + count as u64 * 48);
        for (index, row) in rows.iter().enumerate() {
            for (argument, value) in row[1..].iter().enumerate() {
                let at = LOG + (index * 48 + argument * 8) as u64;
                assert_eq!(guest.read(at), *value, "call {index}, argument {argument}");
            }
        }
    }
}

#[test]
fn only_as_many_are_called_as_there_is_stack_for() {
    let stack = GvaRange::new(Gva(STACK), STACK_TOP - STACK).unwrap();
    let room = |top| CallLoop::room(top, stack, LITTLE_STACK);
    assert_eq!(room(STACK_TOP - 0x80), MAX_ROWS);
    assert_eq!(room(STACK + 0x1000), 0);
    assert_eq!(room(STACK), 0);
    let few = room(STACK + 0x1200);
    assert!(few > 0 && few < 10, "{few}");
    // Where all of the network stack has to run, fewer.
    let deep = CallLoop::room(STACK_TOP - 0x80, stack, MUCH_STACK);
    assert!((32..MAX_ROWS).contains(&deep), "{deep}");
    assert_eq!(CallLoop::room(STACK + 0x3000, stack, MUCH_STACK), 0);
    // A stack that ends where another begins.
    assert_eq!(room(STACK_TOP), MAX_ROWS);
    // One that is not aligned to its size, three pages of which lie below an aligned address.
    let stack = GvaRange::new(Gva(STACK + 0x1000), STACK_TOP - STACK).unwrap();
    assert_eq!(
        CallLoop::room(STACK_TOP + 0x200, stack, LITTLE_STACK),
        MAX_ROWS
    );
}

#[test]
fn interrupts_are_switched_between_functions_and_the_one_that_runs_is_known() {
    let guest = guest();
    // Leaves the guest in the middle, with what it found.
    let last = FUNCTION + 0x100;
    guest.code(last, |a| a.out(0xe2, al).unwrap());
    let call_loop = CallLoop::place(&layout(&guest), &virt(&guest)).unwrap();
    for off in [false, true] {
        guest.write(KERNEL_DATA, LOG);
        let mut rows = rows(2);
        rows.push(call_loop.interrupts(off));
        rows.push([last, 0, 0, 0, 0, 0, 0]);
        let caller = kvm_regs {
            rflags: if off { 0x202 } else { 2 },
            ..caller(STACK_TOP - 0x80)
        };
        let begun = call_loop.begin(&rows, &caller, GATE, virt(&guest));
        let (regs, progress) = begun.unwrap();
        let (port, now) = run(&guest, &regs);
        assert_eq!((port, now.rflags & 0x200 == 0), (0xe2, off));
        assert_eq!(progress.function(&guest.memory), last);
    }
}

#[test]
fn the_loop_leaves_the_text_as_it_was_and_finds_its_own_place_again() {
    let guest = guest();
    let before = guest.all();
    let call_loop = CallLoop::place(&layout(&guest), &virt(&guest)).unwrap();
    assert!(guest.all() != before);
    // Not taken out, as by a release that could not wait.
    let again = CallLoop::place(&layout(&guest), &virt(&guest)).unwrap();
    assert!(again.was_there() && !call_loop.was_there());
    call_loop.remove(&guest.memory);
    assert!(guest.all() == before);
    // Somebody else's by now.
    guest
        .memory
        .write_slice(&[0x90; 4096], GuestAddress(gpa_of(DRIVER_TEXT + PAGE)))
        .unwrap();
    let others = guest.all();
    again.remove(&guest.memory);
    assert!(guest.all() == others);
}

#[test]
fn text_that_fills_its_pages_has_no_room_for_it() {
    let guest = guest();
    let end = DRIVER_TEXT + 2 * PAGE;
    guest.write(end - 64, 0x90);
    let full = guest.all();
    assert!(CallLoop::place(&layout(&guest), &virt(&guest)).is_none());
    assert!(guest.all() == full);
}

#[test]
fn a_stack_that_is_not_there_is_not_written_to() {
    let mut guest = guest();
    let call_loop = CallLoop::place(&layout(&guest), &virt(&guest)).unwrap();
    let caller = caller(STACK_TOP - PAGE + 0x40);
    guest.unmap(STACK_TOP - 2 * PAGE);
    assert!(
        call_loop
            .begin(&rows(4), &caller, GATE, virt(&guest))
            .is_none()
    );
}
