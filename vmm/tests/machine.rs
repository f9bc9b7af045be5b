//! Life of a machine: I/O, power-off, reset, pause, bad configurations.

#![allow(clippy::unwrap_used)] // Also in handlers, which are no test functions.

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use common::{CODE, Guest, Running, config, start};
use devices::bus::BusDevice;
use devices::serial::SerialBackend;
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::MemoryError;
use vmm::{Error, ExitReason, OnGuestReset, Refused, Vm, VmState};

guest_code!(
    reports_then_powers_off,
    "mov edx, 0x500",
    "mov eax, 0x11223344",
    "out dx, al",
    "out dx, ax",
    "out dx, eax",
    "in eax, dx", // one less than the last report
    "out dx, eax",
    "mov edx, 0x600",
    "mov al, 0x34", // SLP_EN, S5
    "out dx, al",
    "1: hlt",
    "jmp 1b",
);

#[test]
fn port_accesses_keep_their_width_and_acpi_sleep_turns_off() {
    let guest = start(reports_then_powers_off(), 1);
    assert_eq!(guest.report_with_width(), (1, 0x44));
    assert_eq!(guest.report_with_width(), (2, 0x3344));
    assert_eq!(guest.report_with_width(), (4, 0x1122_3344));
    assert_eq!(guest.report_with_width(), (4, 0x1122_3343));
    let handle = guest.handle.clone();
    assert_eq!(guest.end().unwrap(), ExitReason::GuestPowerOff);
    assert_eq!(handle.state(), VmState::Stopped);
    assert_eq!(handle.pause(), Err(Refused::Stopped));
    assert_eq!(handle.reset(), Err(Refused::Stopped));
    let status = handle.status();
    assert_eq!((status.exits[0].io_out, status.exits[0].io_in), (5, 1));
}

guest_code!(
    string_output,
    "lea rsi, [rip + 2f]",
    "mov edx, 0x500",
    "mov ecx, 3",
    "rep outsw",
    "1: hlt",
    "jmp 1b",
    "2: .word 0x1111, 0x2222, 0x3333",
);

#[test]
fn string_output_arrives_item_by_item() {
    let guest = start(string_output(), 1);
    for value in [0x1111, 0x2222, 0x3333] {
        assert_eq!(guest.report_with_width(), (2, value));
    }
    guest.power_off();
}

guest_code!(
    touches_mmio,
    "mov ebx, 0x30000000", // beyond memory, mapped one to one
    "mov rax, 0x1122334455667788",
    "mov [rbx + 8], rax",
    "mov eax, [rbx + 4]",
    "mov edx, 0x500",
    "out dx, eax",
    "mov eax, [rbx + 0x10000]", // nobody there
    "out dx, eax",
    "1: hlt",
    "jmp 1b",
);

#[derive(Default)]
struct MmioRecorder(Mutex<Vec<(u64, Vec<u8>)>>);

impl BusDevice for MmioRecorder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0x40 + offset as u8);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push((offset, data.to_vec()));
    }
}

#[test]
fn memory_accesses_outside_ram_reach_devices() {
    let guest = Guest::new(config(touches_mmio(), 1));
    let device = Arc::new(MmioRecorder::default());
    guest
        .vm
        .handle()
        .mmio_bus()
        .map(0x3000_0000, 0x1000, device.clone())
        .unwrap();
    let guest = guest.start();
    assert_eq!(guest.report(), 0x4444_4444);
    assert_eq!(guest.report(), 0xffff_ffff);
    guest.power_off();
    let writes = device.0.lock().unwrap();
    let bytes: Vec<u8> = writes.iter().flat_map(|(_, data)| data.clone()).collect();
    assert_eq!(writes[0].0, 8);
    assert_eq!(bytes, 0x1122_3344_5566_7788u64.to_le_bytes());
}

guest_code!(
    prints,
    "lea rsi, [rip + 2f]",
    "mov edx, 0x3f8",
    "mov ecx, 6",
    "1: lodsb",
    "out dx, al",
    "loop 1b",
    "3: hlt",
    "jmp 3b",
    "2: .ascii \"hello\\n\"",
);

#[test]
fn what_the_guest_prints_comes_out_of_its_serial_port() {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut config = config(prints(), 1);
    config.console = SerialBackend::Output(File::from(OwnedFd::from(writer)));
    let guest = Guest::new(config).start();
    let mut line = String::new();
    BufReader::new(reader).read_line(&mut line).unwrap();
    assert_eq!(line, "hello\n");
    guest.power_off();
}

guest_code!(
    resets_again_and_again,
    "mov edx, 0x500",
    "mov eax, [0x200000]", // zero again after each reset
    "out dx, eax",
    "mov dword ptr [0x200000], 7",
    "mov rcx, cr4", // registers that a reset has to put back
    "or ecx, 0x10",
    "mov cr4, rcx",
    "mov edx, 0xcf9",
    "mov al, 6",
    "out dx, al",
    "1: jmp 1b",
);

#[test]
fn reset_port_starts_again_with_empty_memory_until_the_host_ends_it() {
    let guest = Guest::new(config(resets_again_and_again(), 2));
    let hooks = Arc::new(AtomicU32::new(0));
    let counter = hooks.clone();
    guest.vm.handle().on_reset(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    });
    let guest = guest.start();
    for _ in 0..4 {
        assert_eq!(guest.report(), 0);
    }
    let resets = guest.handle.status().resets;
    assert!(resets >= 3, "{resets}");
    assert!(hooks.load(Ordering::Relaxed) >= 3);
    guest.power_off();
}

#[test]
fn reset_ends_the_machine_where_that_was_asked_for() {
    let mut config = config(resets_again_and_again(), 1);
    config.on_guest_reset = OnGuestReset::Exit;
    assert_eq!(
        Guest::new(config).start().end().unwrap(),
        ExitReason::GuestReset
    );
}

guest_code!(
    triple_faults,
    "mov edx, 0x500",
    "mov al, 1",
    "out dx, al",
    "lidt [rip + 2f]",
    "ud2",
    "2: .word 0",
    ".quad 0",
);

#[test]
fn a_triple_fault_is_a_reset() {
    let guest = start(triple_faults(), 1);
    assert_eq!((guest.report(), guest.report(), guest.report()), (1, 1, 1));
    assert!(guest.handle.status().resets >= 2);
    guest.power_off();
}

guest_code!(
    jumps_to_nowhere,
    "mov edx, 0x500",
    "mov al, 1",
    "out dx, al",
    "mov ebx, 0x5eed",
    "mov eax, 0x20000000", // mapped, but no memory
    "jmp rax",
);

#[test]
fn a_vcpu_that_stops_tells_its_registers_and_last_exits() {
    let guest = start(jumps_to_nowhere(), 1);
    assert_eq!(guest.report(), 1);
    let error = guest.end().unwrap_err().to_string();
    assert!(error.contains("rip 0x20000000 "), "{error}");
    assert!(error.contains("rbx 0x5eed "), "{error}");
    assert!(error.contains("last exits: out 0x500, "), "{error}");
}

// The first processor starts the second one, which jumps to the reset vector in real mode.
guest_code!(
    jumps_to_the_reset_vector,
    "lea rsi, [rip + 7f]",
    "mov edi, 0x8000",
    "mov ecx, 8",
    "rep movsb",
    "mov edx, 0x500",
    "mov al, 5",
    "out dx, al",
    "mov ecx, 0x1b", // x2APIC mode, APIC on
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "xor edx, edx",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "wrmsr",
    "mov ecx, 0x830", // INIT, then start-up at 0x8000, to all others
    "mov eax, 0xc4500",
    "wrmsr",
    "mov eax, 0xc4608",
    "wrmsr",
    "1: jmp 1b",
    "7: .byte 0xea, 0, 0, 0xff, 0xff", // jmp ffff:0000
);

#[test]
fn the_reset_vector_of_real_mode_resets() {
    let guest = start(jumps_to_the_reset_vector(), 2);
    assert_eq!((guest.report(), guest.report(), guest.report()), (5, 5, 5));
    assert!(
        guest.handle.status().exits[1].io_out > 0,
        "the second processor did it"
    );
    guest.power_off();
}

guest_code!(
    keyboard_reset,
    "mov edx, 0x500",
    "mov al, 9",
    "out dx, al",
    "mov al, 0xd1", // a command that resets nothing
    "out 0x64, al",
    "mov al, 8",
    "out dx, al",
    "mov al, 0xfe",
    "out 0x64, al",
    "1: jmp 1b",
);

#[test]
fn the_keyboard_controller_resets_on_fe_only() {
    let guest = start(keyboard_reset(), 1);
    let reports = [
        guest.report(),
        guest.report(),
        guest.report(),
        guest.report(),
    ];
    assert_eq!(reports, [9, 8, 9, 8]);
    guest.power_off();
}

guest_code!(
    counts,
    "mov edx, 0x500",
    "mov al, 1",
    "out dx, al",
    "1: inc qword ptr [0x200000]",
    "jmp 1b",
);

fn counter(guest: &Running) -> u64 {
    guest
        .handle
        .ram()
        .memory()
        .read_obj(GuestAddress(0x20_0000))
        .unwrap()
}

fn wait_for_progress(guest: &Running) {
    let before = counter(guest);
    while counter(guest) == before {
        std::thread::yield_now();
    }
}

#[test]
fn a_paused_guest_does_nothing_and_goes_on_where_it_was() {
    let guest = start(counts(), 1);
    guest.report();
    wait_for_progress(&guest);
    assert_eq!(guest.handle.resume(), Err(Refused::NotPaused));
    guest.handle.pause().unwrap();
    assert_eq!(guest.handle.state(), VmState::Paused);
    assert_eq!(guest.handle.pause(), Err(Refused::AlreadyPaused));
    let paused_at = counter(&guest);
    let rip = guest
        .handle
        .with_paused(|vcpus| vcpus.get(0).unwrap().get_regs().unwrap().rip);
    assert!((CODE..CODE + 64).contains(&rip.unwrap()));
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(
        counter(&guest),
        paused_at,
        "with_paused leaves a paused machine paused"
    );
    guest.handle.resume().unwrap();
    assert_eq!(guest.handle.state(), VmState::Running);
    wait_for_progress(&guest);
    guest.power_off();
}

#[test]
fn a_machine_started_with_its_signal_blocked_can_be_paused() {
    vmm_sys_util::signal::block_signal(vmm::kick_signal()).unwrap();
    let guest = start(counts(), 1); // its threads inherit the mask
    guest.report();
    guest.handle.pause().unwrap();
    guest.power_off();
}

#[test]
fn registers_changed_while_paused_take_effect() {
    let guest = start(counts(), 1);
    guest.report();
    guest
        .handle
        .with_paused(|vcpus| {
            let vcpu = vcpus.get(0).unwrap();
            let mut regs = vcpu.get_regs().unwrap();
            (regs.rip, regs.rax) = (CODE + 5, 0x77); // mov al, 1 is next
            vcpu.set_regs(&regs).unwrap();
        })
        .unwrap();
    assert_eq!(guest.report(), 1);
    guest.power_off();
}

#[test]
fn a_reset_of_a_paused_machine_leaves_it_paused_at_its_start() {
    let guest = start(counts(), 1);
    guest.report();
    wait_for_progress(&guest);
    guest.handle.pause().unwrap();
    guest.handle.reset().unwrap();
    while guest.handle.status().resets == 0 {
        std::thread::yield_now();
    }
    let rip = guest
        .handle
        .with_paused(|vcpus| vcpus.get(0).unwrap().get_regs().unwrap().rip);
    assert_eq!((rip.unwrap(), counter(&guest)), (CODE, 0));
    assert!(guest.drain().is_empty());
    guest.handle.resume().unwrap();
    assert_eq!(guest.report(), 1);
    guest.power_off();
}

#[test]
fn a_machine_that_is_paused_before_its_start_waits() {
    let guest = Guest::new(config(counts(), 1));
    let handle = guest.vm.handle();
    assert_eq!(handle.state(), VmState::Created);
    handle.pause().unwrap();
    let guest = guest.start();
    assert_eq!(handle.with_paused(|vcpus| vcpus.count()), Ok(1));
    assert!(guest.drain().is_empty());
    handle.resume().unwrap();
    assert_eq!(guest.report(), 1);
    guest.power_off();
}

#[test]
fn a_pci_slot_that_is_reserved_is_not_given_twice() {
    let mut vm = Vm::new(config(counts(), 1)).unwrap();
    let mut slots: Vec<_> = (0..31).map(|_| vm.reserve_pci_slot().unwrap()).collect();
    let numbers: Vec<u8> = slots.iter().map(|slot| slot.number()).collect();
    assert_eq!(numbers, (1..32).collect::<Vec<u8>>());
    assert!(matches!(vm.reserve_pci_slot(), Err(Error::NoFreeSlot)));
    // One that was given back with nothing in it is free.
    drop(slots.remove(6));
    assert_eq!(vm.reserve_pci_slot().unwrap().number(), 7);
}

struct Panics;

impl BusDevice for Panics {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, _data: &[u8]) {
        panic!("as a device with a mistake in it would");
    }
}

#[test]
fn a_device_that_panics_ends_the_machine() {
    let guest = Guest::new(config(panics(), 2));
    guest
        .vm
        .handle()
        .pio_bus()
        .map(0x510, 1, Arc::new(Panics))
        .unwrap();
    let error = guest.start().end().unwrap_err();
    assert!(matches!(error, Error::VcpuFailed(_)), "{error}");
}

guest_code!(panics, "mov edx, 0x510", "out dx, al", "1: jmp 1b");

fn refusal(change: impl FnOnce(&mut vmm::VmConfig)) -> Error {
    let mut config = config(counts(), 1);
    change(&mut config);
    match Vm::new(config) {
        Ok(_) => panic!("the machine was made"),
        Err(error) => error,
    }
}

#[test]
fn bad_configurations_are_refused_in_one_line() {
    let errors = [
        refusal(|config| config.vcpus = 0),
        refusal(|config| config.vcpus = 9),
        refusal(|config| config.memory_bytes = 0),
        refusal(|config| config.memory_bytes = 1 << 20),
        refusal(|config| config.memory_bytes = 1 << 55),
    ];
    assert!(matches!(errors[0], Error::VcpuCount(0)));
    assert!(matches!(errors[1], Error::VcpuCount(9)));
    assert!(matches!(errors[2], Error::Memory(MemoryError::TooSmall(0))));
    assert!(matches!(errors[3], Error::Memory(MemoryError::TooSmall(_))));
    assert!(matches!(
        errors[4],
        Error::Memory(MemoryError::MoreThanHost { .. })
    ));
    for error in errors {
        let text = error.to_string();
        assert!(!text.contains('\n') && text.len() < 160, "{text}");
    }
}

#[test]
fn code_that_does_not_fit_ends_the_machine_before_it_starts() {
    let mut config = config(vec![0xf4; 16], 1);
    config.memory_bytes = 2 << 20;
    config.payload = vmm::Payload::Code {
        code: vec![0xf4; 16],
        address: GuestAddress((2 << 20) - 8),
    };
    let error = Guest::new(config).start().end().unwrap_err();
    assert!(matches!(error, Error::Boot(_)), "{error}");
}
