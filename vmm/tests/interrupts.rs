//! Interrupts from devices to a guest's handlers.

#![allow(clippy::unwrap_used)] // Also in handlers, which are no test functions.

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Guest, Running, config};
use devices::bus::MutBusDevice;
use devices::irq::{IrqLine, MsiMessage, MsiVectors};
use devices::pci::config::InterruptPin;

// Handlers for vectors 0x41 to 0x43 report their vector; that of 0x43 also writes port 0x508, as a
// driver that acknowledges its device would. Pin 17 of the
// I/O APIC is level-triggered with vector 0x43, pin 9 edge-triggered with 0x42.
guest_code!(
    takes_interrupts,
    "mov ecx, 0x1b", // x2APIC mode, APIC on
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "xor edx, edx",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "wrmsr",
    "mov al, 0xff", // all inputs of the 8259s masked
    "out 0x21, al",
    "out 0xa1, al",
    "mov qword ptr [0xa018], 0xc003", // maps the page of the I/O APIC
    "mov eax, 0xfec00083",
    "mov [0xc000 + 0x1f6 * 8], rax",
    "mov ebx, 0xfec00000",
    "mov dword ptr [rbx], 0x33", // pin 17, upper half
    "mov dword ptr [rbx + 0x10], 0",
    "mov dword ptr [rbx], 0x32",
    "mov dword ptr [rbx + 0x10], 0x8043",
    "mov dword ptr [rbx], 0x23", // pin 9
    "mov dword ptr [rbx + 0x10], 0",
    "mov dword ptr [rbx], 0x22",
    "mov dword ptr [rbx + 0x10], 0x42",
    "mov edi, 0x3410", // gates of the IDT at 0x3000
    "lea rax, [rip + 41f]",
    "call 6f",
    "lea rax, [rip + 42f]",
    "call 6f",
    "lea rax, [rip + 43f]",
    "call 6f",
    "lidt [rip + 5f]",
    "mov edx, 0x500",
    "mov al, 1",
    "out dx, al",
    "sti",
    "1: hlt",
    "jmp 1b",
    "41: mov al, 0x41",
    "jmp 8f",
    "42: mov al, 0x42",
    "jmp 8f",
    "43: mov al, 0x43",
    "mov edx, 0x508",
    "out dx, al",
    "8: mov edx, 0x500",
    "out dx, al",
    "xor eax, eax", // end of interrupt
    "xor edx, edx",
    "mov ecx, 0x80b",
    "wrmsr",
    "iretq",
    "6: mov [rdi], ax", // writes an interrupt gate for RAX at RDI
    "mov dword ptr [rdi + 2], 0x8e000010",
    "mov word ptr [rdi + 4], 0x8e00",
    "shr rax, 16",
    "mov [rdi + 6], ax",
    "mov qword ptr [rdi + 8], 0",
    "add edi, 16",
    "ret",
    "5: .word 0xfff",
    ".quad 0x3000",
);

/// Takes back one assertion at each acknowledgement.
struct Acknowledge(Vec<Arc<dyn IrqLine>>);

impl MutBusDevice for Acknowledge {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u64, _data: &[u8]) {
        if let Some(line) = self.0.pop() {
            line.set_level(false);
        }
    }
}

fn message(vector: u8) -> Option<MsiMessage> {
    Some(MsiMessage {
        address: 0xfee0_0000,
        data: u32::from(vector),
    })
}

fn ready(guest: Guest) -> Running {
    let guest = guest.start();
    assert_eq!(guest.report(), 1);
    guest
}

#[test]
fn messages_arrive_where_they_are_routed_and_not_when_masked() {
    let guest = Guest::new(config(takes_interrupts(), 1));
    let vectors: Arc<dyn MsiVectors> = guest.vm.msi_vectors(2).unwrap();
    assert_eq!(vectors.count(), 2);
    let guest = ready(guest);
    vectors.route(0, message(0x41));
    vectors.trigger(0);
    assert_eq!(guest.report(), 0x41);
    vectors.route(0, message(0x42));
    vectors.trigger(0);
    assert_eq!(guest.report(), 0x42);
    vectors.route(0, None);
    vectors.route(1, message(0x41));
    vectors.trigger(0);
    vectors.trigger(1);
    vectors.trigger(9); // not there
    assert_eq!(guest.report(), 0x41);
    assert!(guest.drain().is_empty());
    guest.power_off();
}

#[test]
fn a_shared_line_interrupts_until_its_last_device_is_served() {
    let mut guest = Guest::new(config(takes_interrupts(), 1));
    let slot = guest.vm.reserve_pci_slot().unwrap();
    let lines = [
        slot.intx_line(InterruptPin::A),
        slot.intx_line(InterruptPin::A),
    ];
    let acknowledge = Arc::new(Mutex::new(Acknowledge(lines.to_vec())));
    guest
        .vm
        .handle()
        .pio_bus()
        .map(0x508, 1, acknowledge.clone())
        .unwrap();
    let vectors = guest.vm.msi_vectors(1).unwrap();
    vectors.route(0, message(0x41));
    let guest = ready(guest);
    guest.handle.pause().unwrap();
    for line in &lines {
        line.set_level(true);
        line.set_level(true); // no second assertion
    }
    guest.handle.resume().unwrap();
    // One interrupt for each device at least, as the first acknowledgement leaves the line
    // asserted.
    let mut interrupts = 0;
    while interrupts < 2 {
        interrupts += u32::from(guest.report() == 0x43);
    }
    // Then it is quiet: what was pending arrives before the first message, nothing after it.
    vectors.trigger(0);
    while guest.report() != 0x41 {}
    vectors.trigger(0);
    assert_eq!(guest.report(), 0x41, "an interrupt from a quiet line");
    // Again, by one of the two alone.
    acknowledge.lock().unwrap().0 = vec![lines[1].clone()];
    lines[1].set_level(true);
    while guest.report() != 0x43 {}
    guest.power_off();
}

#[test]
fn the_power_button_is_an_edge_on_its_own_line() {
    let guest = ready(Guest::new(config(takes_interrupts(), 1)));
    guest.handle.press_power_button().unwrap();
    assert_eq!(guest.report(), 0x42);
    let mut events = [0];
    guest.handle.pio_bus().read(0x604, &mut events);
    assert_eq!(events, [1]);
    guest.handle.pio_bus().read(0x604, &mut events);
    assert_eq!(events, [0], "reading clears");
    guest.power_off();
}

#[test]
fn a_reset_silences_lines_and_controllers() {
    let guest = Guest::new(config(takes_interrupts(), 1));
    let vectors = guest.vm.msi_vectors(1).unwrap();
    vectors.route(0, message(0x41));
    let guest = ready(guest);
    guest.handle.pause().unwrap();
    vectors.trigger(0); // pending at the moment of the reset
    guest.handle.reset().unwrap();
    guest.handle.resume().unwrap();
    assert_eq!(guest.report(), 1);
    vectors.route(0, message(0x42));
    vectors.trigger(0);
    assert_eq!(guest.report(), 0x42, "0x41 was forgotten");
    guest.power_off();
}

#[test]
fn a_line_that_is_driven_from_outside_is_unmasked_by_each_acknowledgement() {
    let mut guest = Guest::new(config(takes_interrupts(), 1));
    let slot = guest.vm.reserve_pci_slot().unwrap();
    let line = slot.intx_line(InterruptPin::A);
    let vectors = guest.vm.msi_vectors(1).unwrap();
    vectors.route(0, message(0x41));
    let events = line.events().unwrap();
    // The same two descriptors, and not two more.
    let again = line.events().unwrap();
    let guest = ready(guest);
    for trigger in [&events.trigger, &events.trigger, &again.trigger] {
        trigger.write(1).unwrap();
        assert_eq!(guest.report(), 0x43);
        // The guest's end of the interrupt lets the device trigger again.
        while events.unmask.read().is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    drop(line);
    events.trigger.write(1).unwrap();
    vectors.trigger(0);
    assert_eq!(
        guest.report(),
        0x41,
        "an interrupt of a device that is gone"
    );
    guest.power_off();
}
