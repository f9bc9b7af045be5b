//! Rewinds of guests that were reset, are about to be, or reboot by themselves: they are at the
//! mark, and what was to be reset is not any more.

use std::time::{Duration, Instant};

use vmm::memory::MemorySource;
use vmm::{VmHandle, VmState};

use super::LIMIT;
use super::common::start;
use super::whole::{assert_same, mark, rewind, whole};
use super::writer::writer;
use crate::guest_code;

// Says that it begins, writes some words, and restarts the machine.
guest_code!(
    reboots,
    "mov edx, 0x500",
    "mov eax, 1",
    "out dx, eax",
    "mov ebx, 0x200000",
    "mov ecx, 60",
    "1: mov [rbx + rcx*8], rcx",
    "dec ecx",
    "jnz 1b",
    "mov edx, 0xcf9",
    "mov al, 6",
    "out dx, al",
    "2: hlt",
    "jmp 2b",
);

/// Lets some time pass, which is another one each time.
fn a_moment(round: u64) {
    let until = Instant::now() + Duration::from_micros(round * 37 % 900);
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}

/// Waits until the machine was reset once more than `resets` times.
fn wait_for_reset(handle: &VmHandle, resets: u64) {
    let deadline = Instant::now() + LIMIT;
    while handle.status().resets <= resets {
        assert!(Instant::now() < deadline, "it is not reset");
        std::thread::yield_now();
    }
}

#[test]
fn a_mark_is_valid_after_resets() {
    let writing = writer(4 << 20, MemorySource::Fresh, 2, 64).start();
    let handle = writing.handle();
    writing.wait(100);
    let then = mark(&writing, "a");
    for resets in 1..4 {
        writing.wait(20);
        handle.reset().unwrap();
        while handle.status().resets < resets {
            std::thread::yield_now();
        }
        writing.guest.report();
        rewind(&writing, "a", &then);
        handle
            .quiesce(LIMIT, |quiesced| writing.check(quiesced))
            .unwrap();
    }
    writing.guest.power_off();
}

#[test]
fn a_rewind_right_after_a_reset_was_asked_for_is_at_the_mark_and_nothing_is_reset_behind_it() {
    let writing = writer(4 << 20, MemorySource::Fresh, 2, 64).start();
    let handle = writing.handle();
    writing.wait(100);
    let then = mark(&writing, "a");
    let mut done = 0;
    for round in 0..300 {
        writing.wait(round % 5);
        let before = handle.status().resets;
        let is_paused = round % 3 == 0;
        if is_paused {
            handle.pause().unwrap();
        }
        handle.reset().unwrap();
        a_moment(round);
        handle.rewind(Some("a"), LIMIT).unwrap();
        let resets = handle.status().resets;
        assert!(resets - before <= 1, "round {round}");
        done += resets - before;
        if is_paused {
            assert_eq!(handle.state(), VmState::Paused);
            assert_same(&whole(handle), &then, "paused");
            handle.resume().unwrap();
        }
        writing.wait(3);
        handle
            .quiesce(LIMIT, |quiesced| writing.check(quiesced))
            .unwrap();
        assert_eq!(
            handle.status().resets,
            resets,
            "round {round}: reset behind it"
        );
        writing.guest.drain();
    }
    // Both orders came about, and the other way round the reset counts.
    assert!((1..300).contains(&done), "{done} of 300");
    let resets = handle.status().resets;
    handle.rewind(Some("a"), LIMIT).unwrap();
    handle.reset().unwrap();
    wait_for_reset(handle, resets);
    writing.guest.report();
    rewind(&writing, "a", &then);
    writing.guest.power_off();
}

#[test]
fn a_guest_that_reboots_is_rewound_to_what_it_was_and_reboots_again() {
    let guest = start(reboots(), 1);
    let handle = &guest.handle;
    handle.limit_marks(1 << 30);
    // The next marks are set whenever the guest is anywhere in this.
    for round in 0..40u64 {
        guest.report();
        a_moment(round * 5);
        handle.mark(&format!("m{round}"), LIMIT).unwrap();
    }
    for round in 0..200u64 {
        guest.report();
        a_moment(round);
        let name = format!("m{}", round * 7 % 40);
        handle.pause().unwrap();
        handle.rewind(Some(&name), LIMIT).unwrap();
        let first = whole(handle);
        handle.rewind(Some(&name), LIMIT).unwrap();
        assert_same(&whole(handle), &first, &name);
        let resets = handle.status().resets;
        guest.drain();
        handle.resume().unwrap();
        // Wherever it was: it comes to its end and begins again.
        wait_for_reset(handle, resets);
        guest.report();
    }
    guest.power_off();
}
