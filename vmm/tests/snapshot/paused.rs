//! Snapshots of guests that are paused, or that are about to be another one.

use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm::snapshot::{CaptureError, SnapshotRequest};
use vmm::{ExitReason, QuiesceError, Refused, VmState};

use super::common::start;
use super::counting::{beside, count_on, go_on, guest, request, snapshot};
use crate::guest_code;

#[test]
fn a_paused_guest_is_saved_stays_paused_and_neither_loses_nor_repeats_a_step() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let original = guest().start();
    let handle = &original.handle;
    let mut last = original.report();
    count_on(&original, &mut last, 100);
    handle.pause().unwrap();
    // Up to where it was paused.
    for next in original.drain() {
        assert_eq!(next, last + 1);
        last = next;
    }
    let full = dir("full");
    let tracked = SnapshotRequest {
        track: true,
        ..request(&full, None)
    };
    let taken = handle.snapshot(&tracked, &mut |_| true, &mut beside);
    assert!(!taken.unwrap().diff);
    assert_eq!(handle.state(), VmState::Paused);
    // Devices go on while a guest is paused: what they write is in the diff.
    let apart = GuestAddress(handle.ram().size_bytes() - 8);
    let memory = handle.ram().memory();
    memory.write_obj(0x1234_u64, apart).unwrap();
    let diff = snapshot(&original, &dir("diff"), Some(&dir("full")));
    assert!(diff.diff && (1..=8).contains(&diff.pages), "{diff:?}");
    assert_eq!(handle.state(), VmState::Paused);
    assert!(original.drain().is_empty(), "it ran meanwhile");
    for (name, wanted) in [("full", 0_u64), ("diff", 0x1234)] {
        // One that goes on runs, whatever the other one did.
        let (twin, mut at) = go_on(&dir(name));
        assert_eq!(at, last + 1, "{name}");
        let there: u64 = twin.handle.ram().memory().read_obj(apart).unwrap();
        assert_eq!(there, wanted);
        count_on(&twin, &mut at, 100);
        twin.power_off();
    }
    handle.resume().unwrap();
    count_on(&original, &mut last, 100);
    original.power_off();
}

#[test]
fn a_paused_guest_ends_with_its_snapshot_if_it_is_to() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let original = guest().start();
    let mut last = original.report();
    count_on(&original, &mut last, 50);
    original.handle.pause().unwrap();
    for next in original.drain() {
        last = next;
    }
    let nowhere = folder.path().join("not/there");
    let stop = |dir| SnapshotRequest {
        stop: true,
        ..request(dir, None)
    };
    let refused = original
        .handle
        .snapshot(&stop(&nowhere), &mut |_| true, &mut beside);
    refused.unwrap_err();
    assert_eq!(original.handle.state(), VmState::Paused);
    let taken = original
        .handle
        .snapshot(&stop(&dir), &mut |_| true, &mut beside);
    taken.unwrap();
    assert!(original.drain().is_empty(), "it ran meanwhile");
    let handle = original.handle.clone();
    assert_eq!(original.end().unwrap(), ExitReason::HostPowerOff);
    let after = handle.snapshot(&request(&nowhere, None), &mut |_| true, &mut beside);
    let after = after.unwrap_err();
    assert!(after.to_string().contains("turned off") || after.to_string().contains("not/there"));
    let late = folder.path().join("late");
    let after = handle.snapshot(&request(&late, None), &mut |_| true, &mut beside);
    assert!(
        matches!(
            after,
            Err(CaptureError::Quiesce(QuiesceError::Refused(
                Refused::Stopped
            )))
        ),
        "{after:?}"
    );
    assert!(!late.exists());
    let (twin, first) = go_on(&dir);
    assert_eq!(first, last + 1);
    twin.power_off();
}

// Says that it begins, counts a little, and restarts the machine or turns it off.
guest_code!(
    restarts,
    "mov edx, 0x500",
    "mov eax, 1",
    "out dx, eax",
    "mov ecx, 40",
    "1: dec ecx",
    "jnz 1b",
    "mov edx, 0xcf9",
    "mov al, 6",
    "out dx, al",
    "2: hlt",
    "jmp 2b",
);

#[test]
fn a_guest_that_is_saved_while_it_reboots_begins_again_wherever_it_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let original = start(restarts(), 1);
    let dirs: Vec<_> = (0..12u64)
        .map(|round| {
            original.report();
            let until = Instant::now() + Duration::from_micros(round * 40);
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            let dir = folder.path().join(round.to_string());
            snapshot(&original, &dir, None);
            original.drain();
            dir
        })
        .collect();
    original.power_off();
    for dir in dirs {
        let chain = vmm::snapshot::Chain::open(&dir).unwrap();
        let mut twin = super::common::Guest::new(super::common::config(restarts(), 1));
        twin.vm.go_on_from(&chain, &mut |_| true).unwrap();
        let twin = twin.start();
        // It comes to its end and begins again, more than once.
        for _ in 0..3 {
            assert_eq!(twin.report(), 1);
        }
        twin.power_off();
    }
}
