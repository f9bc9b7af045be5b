//! The trap port, and vCPUs that are held while one of them is handled.

#![allow(clippy::unwrap_used)] // Also in handlers, which are no test functions.

mod common;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use common::{CODE, Guest, config, start};
use vm_memory::{Bytes, GuestAddress};
use vmm::trap::{TrapContext, TrapHandler, TrapOutcome};
use vmm::{ExitReason, Refused, VmHandle};

guest_code!(
    traps_once,
    "mov edx, 0x500",
    "lea eax, [rip + 1f]",
    "out dx, eax", // tells where the trap returns to
    "mov ecx, 1",
    "mov al, 0x5a",
    "out 0xe3, al",
    "1: mov eax, ecx",
    "out dx, eax",
    "2: hlt",
    "jmp 2b",
);

/// Remembers what it saw and sets RCX.
#[derive(Default)]
struct SetsRcx {
    seen: OnceLock<(u8, u16, u8, u64)>,
}

impl TrapHandler for SetsRcx {
    fn on_trap(&self, context: &mut TrapContext<'_>) -> TrapOutcome {
        let (mut regs, sregs) = context.registers();
        assert_eq!(sregs.cr3, context.vcpu.get_sregs().unwrap().cr3);
        self.seen
            .set((context.index, context.port, context.value, regs.rip))
            .unwrap();
        regs.rcx = 42;
        context.set_regs(&regs);
        TrapOutcome::Resume
    }
}

#[test]
fn a_trap_shows_the_registers_behind_the_instruction_and_takes_changes() {
    let guest = Guest::new(config(traps_once(), 1));
    let handler = Arc::new(SetsRcx::default());
    let handle = guest.vm.handle();
    handle.attach_trap_handler(handler.clone()).unwrap();
    assert_eq!(
        handle.attach_trap_handler(Arc::new(SetsRcx::default())),
        Err(Refused::TrapHandlerAttached)
    );
    let guest = guest.start();
    let behind = u64::from(guest.report());
    assert!(behind > CODE);
    assert_eq!(guest.report(), 42);
    assert_eq!(handler.seen.get(), Some(&(0, 0xe3, 0x5a, behind)));
    assert_eq!(handle.status().exits[0].trap, 1);
    guest.power_off();
}

/// Sets RCX while somebody waits for the machine to stop.
struct WaitsInTrap {
    arrived: std::sync::Barrier,
}

impl TrapHandler for WaitsInTrap {
    fn on_trap(&self, context: &mut TrapContext<'_>) -> TrapOutcome {
        let (mut regs, _) = context.registers();
        regs.rcx = 42;
        context.set_regs(&regs);
        self.arrived.wait();
        // The other thread asks for the pause meanwhile; without it the vCPU would run on.
        std::thread::sleep(Duration::from_millis(100));
        TrapOutcome::Resume
    }
}

#[test]
fn registers_that_a_handler_set_are_there_when_the_machine_is_paused_before_the_next_run() {
    let guest = Guest::new(config(traps_once(), 1));
    let handler = Arc::new(WaitsInTrap {
        arrived: std::sync::Barrier::new(2),
    });
    let handle = guest.vm.handle();
    handle.attach_trap_handler(handler.clone()).unwrap();
    let guest = guest.start();
    handler.arrived.wait();
    handle.pause().unwrap();
    let rcx = handle.with_paused(|vcpus| vcpus.get(0).unwrap().get_regs().unwrap().rcx);
    assert_eq!(rcx, Ok(42));
    handle.resume().unwrap();
    guest.report();
    assert_eq!(guest.report(), 42);
    guest.power_off();
}

#[test]
fn without_a_handler_a_trap_port_is_a_port_like_any_other() {
    let guest = start(traps_once(), 1);
    guest.report();
    assert_eq!(guest.report(), 1);
    assert_eq!(guest.handle.status().exits[0].trap, 0);
    guest.power_off();

    let guest = Guest::new(config(traps_once(), 1));
    let handle = guest.vm.handle();
    handle
        .attach_trap_handler(Arc::new(SetsRcx::default()))
        .unwrap();
    handle.detach_trap_handler();
    let guest = guest.start();
    guest.report();
    assert_eq!(guest.report(), 1);
    guest.power_off();
}

struct Answers(TrapOutcome);

impl TrapHandler for Answers {
    fn on_trap(&self, _context: &mut TrapContext<'_>) -> TrapOutcome {
        self.0
    }
}

#[test]
fn a_handler_can_turn_the_machine_off_or_restart_it() {
    let guest = Guest::new(config(traps_once(), 1));
    guest
        .vm
        .handle()
        .attach_trap_handler(Arc::new(Answers(TrapOutcome::PowerOff)))
        .unwrap();
    assert_eq!(guest.start().end().unwrap(), ExitReason::GuestPowerOff);

    let guest = Guest::new(config(traps_once(), 1));
    guest
        .vm
        .handle()
        .attach_trap_handler(Arc::new(Answers(TrapOutcome::Reset)))
        .unwrap();
    let guest = guest.start();
    let (first, second) = (guest.report(), guest.report());
    assert_eq!(
        first, second,
        "the instruction behind the trap is not reached"
    );
    guest.power_off();
}

/// A handler cannot wait for its own vCPU to stop: it is told so.
struct Pauses(OnceLock<(VmHandle, OnceLock<Result<(), Refused>>)>);

impl TrapHandler for Pauses {
    fn on_trap(&self, _context: &mut TrapContext<'_>) -> TrapOutcome {
        let (handle, result) = self.0.get().unwrap();
        result.set(handle.pause()).unwrap();
        TrapOutcome::Resume
    }
}

#[test]
fn pausing_from_inside_a_handler_is_refused() {
    let guest = Guest::new(config(traps_once(), 1));
    let handle = guest.vm.handle();
    let handler = Arc::new(Pauses(OnceLock::new()));
    assert!(handler.0.set((handle.clone(), OnceLock::new())).is_ok());
    handle.attach_trap_handler(handler.clone()).unwrap();
    let guest = guest.start();
    guest.report();
    guest.report();
    assert_eq!(
        handler.0.get().unwrap().1.get(),
        Some(&Err(Refused::OnVcpuThread))
    );
    handle.detach_trap_handler();
    guest.power_off();
}

// Four processors. Each of the three that the first one starts counts at 0x610 + 4 * number and
// traps after every 64 counts; the first one counts at 0x610 and traps likewise.
guest_code!(
    all_processors_count,
    "lea rsi, [rip + 7f]",
    "mov edi, 0x8000",
    "mov ecx, 128",
    "rep movsb",
    "mov ecx, 0x1b", // x2APIC mode
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "xor edx, edx",
    "mov ecx, 0x80f", // APIC on
    "mov eax, 0x1ff",
    "wrmsr",
    "mov ecx, 0x830", // INIT, then start-up at 0x8000, to all others
    "mov eax, 0xc4500",
    "wrmsr",
    "mov eax, 0xc4608",
    "wrmsr",
    "1: cmp word ptr [0x600], 3",
    "jne 1b",
    "mov edx, 0x500",
    "mov al, 3",
    "out dx, al",
    "2: inc dword ptr [0x610]",
    "test byte ptr [0x610], 63",
    "jnz 2b",
    "out 0xe0, al",
    "jmp 2b",
    "7:",
    ".code16",
    "xor ax, ax",
    "mov ds, ax",
    "mov ax, 1",
    "lock xadd word ptr [0x600], ax",
    "mov bx, ax",
    "shl bx, 2",
    "3: inc dword ptr [bx + 0x614]",
    "test byte ptr [bx + 0x614], 63",
    "jnz 3b",
    "out 0xe1, al",
    "jmp 3b",
);

/// Holds the others, and checks that they stand still and that no other handler holds.
struct Holds {
    handle: VmHandle,
    inside: AtomicU32,
    traps: AtomicU64,
    by_vcpu: [AtomicU32; 4],
    moved: AtomicU32,
}

impl Holds {
    fn counters(&self, except: u8) -> Vec<u32> {
        let memory = self.handle.ram().memory();
        let mut all: Vec<u32> = (0..4)
            .map(|i| memory.read_obj(GuestAddress(0x610 + 4 * i)).unwrap())
            .collect();
        // The first processor is number 0; the others may have taken their numbers in any order.
        if except == 0 {
            all.remove(0);
        } else {
            all.truncate(1);
        }
        all
    }
}

impl TrapHandler for Holds {
    fn on_trap(&self, context: &mut TrapContext<'_>) -> TrapOutcome {
        let guard = self.handle.hold_others(context.index);
        assert_eq!(
            self.inside.fetch_add(1, Ordering::SeqCst),
            0,
            "two holds at once"
        );
        let before = self.counters(context.index);
        for _ in 0..1000 {
            std::hint::spin_loop();
        }
        if self.counters(context.index) != before {
            self.moved.fetch_add(1, Ordering::Relaxed);
        }
        self.inside.fetch_sub(1, Ordering::SeqCst);
        drop(guard);
        self.traps.fetch_add(1, Ordering::Relaxed);
        self.by_vcpu[usize::from(context.index)].fetch_add(1, Ordering::Relaxed);
        TrapOutcome::Resume
    }
}

#[test]
fn held_vcpus_stand_still_and_all_get_their_turn() {
    let guest = Guest::new(config(all_processors_count(), 4));
    let handle = guest.vm.handle();
    let handler = Arc::new(Holds {
        handle: handle.clone(),
        inside: AtomicU32::new(0),
        traps: AtomicU64::new(0),
        by_vcpu: [const { AtomicU32::new(0) }; 4],
        moved: AtomicU32::new(0),
    });
    handle.attach_trap_handler(handler.clone()).unwrap();
    let guest = guest.start();
    assert_eq!(guest.report(), 3, "all processors have started");
    // Pauses and holds at the same time must not wait for each other for ever.
    for _ in 0..20 {
        handle.pause().unwrap();
        let traps = handler.traps.load(Ordering::Relaxed);
        assert_eq!(handle.with_paused(|vcpus| vcpus.iter_mut().count()), Ok(4));
        assert_eq!(
            handler.traps.load(Ordering::Relaxed),
            traps,
            "a trap ran while paused"
        );
        handle.resume().unwrap();
        while handler.traps.load(Ordering::Relaxed) < traps + 8 {
            std::thread::yield_now();
        }
    }
    while handler
        .by_vcpu
        .iter()
        .any(|count| count.load(Ordering::Relaxed) < 5)
    {
        std::thread::yield_now();
    }
    handle.detach_trap_handler();
    guest.power_off();
    assert_eq!(handler.moved.load(Ordering::Relaxed), 0, "a held vCPU ran");
}

#[test]
fn processors_that_were_started_wait_for_their_start_again_after_a_reset() {
    let guest = start(all_processors_count(), 4);
    for _ in 0..3 {
        assert_eq!(guest.report(), 3);
        guest.handle.reset().unwrap();
    }
    assert_eq!(guest.report(), 3);
    guest.power_off();
}
