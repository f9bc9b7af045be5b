//! The VM generation ID: one for each machine, another one for each that goes on from a state.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Guest, Running, config};
use vm_memory::{Bytes, GuestAddress};
use vmm::VmHandle;
use vmm::layout::GENERATION_ID;

const LIMIT: Duration = Duration::from_secs(20);

// Reports what the event register says, each time that it says something, and asks the host for
// time otherwise.
guest_code!(
    hears_events,
    "1: mov edx, 0x604",
    "in al, dx",
    "movzx eax, al",
    "or eax, 0x100",
    "mov edx, 0x500",
    "out dx, eax",
    "jmp 1b",
);

fn id(handle: &VmHandle) -> [u8; 16] {
    let mut id = [0; 16];
    let memory = handle.ram().memory();
    memory.read_slice(&mut id, GENERATION_ID).unwrap();
    id
}

fn started() -> Running {
    let guest = Guest::new(config(hears_events(), 1)).start();
    guest.report();
    guest
}

#[test]
fn each_machine_has_its_own_and_keeps_it_over_a_reset() {
    let (one, other) = (started(), started());
    let first = id(&one.handle);
    assert_ne!(first, [0; 16]);
    assert_ne!(first, id(&other.handle));
    one.handle.reset().unwrap();
    while one.handle.status().resets == 0 {
        one.report();
    }
    assert_eq!(id(&one.handle), first);
    one.power_off();
    other.power_off();
}

#[test]
fn a_machine_that_goes_on_from_a_state_has_another_one_and_is_told_before_it_runs() {
    let original = started();
    let (state, memory) = original
        .handle
        .quiesce(LIMIT, |quiesced| {
            let mut memory = vec![0; common::MEMORY as usize];
            let ram = quiesced.ram().memory();
            ram.read_slice(&mut memory, GuestAddress(0)).unwrap();
            (quiesced.save().unwrap(), memory)
        })
        .unwrap();
    let mut seen = vec![id(&original.handle)];
    for _ in 0..3 {
        let mut copy = Guest::new(config(hears_events(), 1));
        let handle = copy.vm.handle();
        let ram = handle.ram().memory();
        ram.write_slice(&memory, GuestAddress(0)).unwrap();
        copy.vm.restore(&state).unwrap();
        let copy = copy.start();
        // The read of the event register that was under way when the state was taken may be
        // reported first.
        let told: Vec<u32> = (0..2).map(|_| copy.report()).collect();
        assert!(told.contains(&0x104), "{told:x?}");
        let new = id(&copy.handle);
        assert!(!seen.contains(&new));
        seen.push(new);
        // It keeps that one, also where it goes back to what it was.
        copy.handle
            .quiesce(LIMIT, |quiesced| {
                let now = quiesced.save().unwrap();
                quiesced.restore(&now).unwrap();
            })
            .unwrap();
        copy.drain();
        assert_eq!(copy.report(), 0x100);
        assert_eq!(id(&copy.handle), new);
        copy.power_off();
    }
    assert_eq!(id(&original.handle), seen[0]);
    original.power_off();
}
