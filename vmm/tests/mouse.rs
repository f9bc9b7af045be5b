//! A machine with a keyboard controller and a mouse: its state goes with the machine's, and one
//! without it is as before there was any.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Guest, config};
use devices::i8042::{self, Button, MouseEvent};
use vmm::{DEVICE_STATES_VERSION, DEVICE_STATES_VERSION_WITHOUT_I8042, DeviceStates, Vm, VmHandle};

const LIMIT: Duration = Duration::from_secs(20);
const DATA: u64 = 0x60;
const COMMAND: u64 = 0x64;

guest_code!(
    counts,
    "1: inc dword ptr [0x200000]",
    "mov edx, 0x500",
    "mov eax, [0x200000]",
    "out dx, eax",
    "jmp 1b",
);

guest_code!(
    restarts_by_the_controller,
    "mov edx, 0x500",
    "mov eax, 7",
    "out dx, eax",
    "mov al, 0xfe",
    "out 0x64, al",
    "1: jmp 1b",
);

fn with_mouse(code: Vec<u8>) -> Guest {
    let mut guest = Guest::new(config(code, 1));
    guest.vm.add_mouse();
    guest
}

/// What is read until the output buffer is empty.
fn answers(handle: &VmHandle) -> Vec<u8> {
    let (mut status, mut all) = ([0], Vec::new());
    loop {
        assert!(handle.pio_bus().read(COMMAND, &mut status));
        if status[0] & 1 == 0 {
            return all;
        }
        let mut byte = [0];
        handle.pio_bus().read(DATA, &mut byte);
        all.push(byte[0]);
    }
}

fn tell_mouse(handle: &VmHandle, byte: u8) -> Vec<u8> {
    handle.pio_bus().write(COMMAND, &[0xd4]);
    handle.pio_bus().write(DATA, &[byte]);
    answers(handle)
}

fn happens(handle: &VmHandle, event: MouseEvent) {
    let controller = handle.i8042().unwrap();
    i8042::lock(&controller).move_mouse(event).unwrap();
}

fn save(vm: &Vm) -> (vmm::MachineState, DeviceStates) {
    vm.handle()
        .quiesce(LIMIT, |quiesced| {
            (quiesced.save().unwrap(), quiesced.save_devices().unwrap())
        })
        .unwrap()
}

fn version(states: &DeviceStates) -> u32 {
    let bytes = states.to_bytes().unwrap();
    u32::from_le_bytes(bytes[8..12].try_into().unwrap())
}

#[test]
fn what_a_mouse_has_seen_is_in_the_saved_state_and_comes_in_another_machine() {
    let guest = with_mouse(counts());
    let handle = guest.vm.handle();
    handle.pio_bus().write(COMMAND, &[0xa8]);
    assert_eq!(tell_mouse(&handle, 0xf4), [0xfa]);
    happens(&handle, MouseEvent::Move { x: 2, y: 1 });
    happens(&handle, MouseEvent::Press(Button::Left));
    let (state, devices) = save(&guest.vm);
    assert_eq!(version(&devices), DEVICE_STATES_VERSION);
    let bytes = devices.to_bytes().unwrap();
    assert_eq!(DeviceStates::from_bytes(&bytes).unwrap(), devices);
    for len in 0..bytes.len() {
        assert!(DeviceStates::from_bytes(&bytes[..len]).is_err(), "{len}");
    }
    let mut twin = with_mouse(counts());
    twin.vm.restore(&state).unwrap();
    twin.vm.restore_devices(&devices).unwrap();
    let expected = [0x28, 2, 0xff, 9, 0, 0];
    assert_eq!(answers(&twin.vm.handle()), expected);
    // The first has it still, and goes back to it.
    assert_eq!(answers(&handle), expected);
    let back = handle.quiesce(LIMIT, |quiesced| {
        quiesced.restore_devices(&devices).unwrap();
    });
    back.unwrap();
    assert_eq!(answers(&handle), expected);
}

#[test]
fn a_machine_without_a_mouse_is_written_as_before_there_was_one_and_the_two_are_not_mixed_up() {
    let (mut without, mut with) = (Guest::new(config(counts(), 1)), with_mouse(counts()));
    let (none, one) = (save(&without.vm).1, save(&with.vm).1);
    assert_eq!(version(&none), DEVICE_STATES_VERSION_WITHOUT_I8042);
    assert!(without.vm.handle().i8042().is_none());
    let said = with.vm.restore_devices(&none).unwrap_err().to_string();
    assert_eq!(said, "this machine has a mouse, the saved one has none");
    let said = without.vm.restore_devices(&one).unwrap_err().to_string();
    assert_eq!(said, "the saved machine has a mouse, this one has none");
    // A version that is none of the two says which is known.
    let mut newer = none.to_bytes().unwrap();
    newer[8] = 3;
    let said = DeviceStates::from_bytes(&newer).unwrap_err().to_string();
    assert!(
        said.contains("has version 3, this program reads 2"),
        "{said}"
    );
}

#[test]
fn the_controller_restarts_the_machine_and_is_as_after_power_on_then() {
    for guest in [
        with_mouse(restarts_by_the_controller()),
        Guest::new(config(restarts_by_the_controller(), 1)),
    ] {
        let running = guest.start();
        let handle = running.handle.clone();
        assert_eq!((running.report(), running.report()), (7, 7));
        let deadline = Instant::now() + LIMIT;
        while handle.status().resets == 0 {
            assert!(Instant::now() < deadline);
        }
        running.drain();
        running.power_off();
    }
    let running = with_mouse(counts()).start();
    let handle = running.handle.clone();
    running.report();
    handle.pio_bus().write(COMMAND, &[0xa8]);
    tell_mouse(&handle, 0xf4);
    happens(&handle, MouseEvent::Move { x: 1, y: 0 });
    handle.reset().unwrap();
    let deadline = Instant::now() + LIMIT;
    while handle.status().resets == 0 {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(answers(&handle), [0; 0]);
    let controller = handle.i8042().unwrap();
    let event = MouseEvent::Move { x: 1, y: 0 };
    i8042::lock(&controller).move_mouse(event).unwrap_err();
    running.drain();
    running.power_off();
}
