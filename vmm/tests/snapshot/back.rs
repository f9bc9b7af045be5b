//! A machine that goes back to a snapshot of it while it runs, in the same process.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use devices::serial::SerialBackend;
use vm_memory::{Bytes, GuestAddress};
use vmm::layout::GENERATION_ID;
use vmm::snapshot::{Chain, GoBackError};
use vmm::{MarkError, Refused, RewindError, VmConfig, VmState};

use super::common::{Guest, MEMORY, Running, config};
use super::counting::{PAGES_AT, code, count_on, guest, snapshot};
use super::{LIMIT, counting};

/// Where the ID of this copy of the guest is, which is another one each time that it goes back.
const ID: std::ops::Range<usize> = GENERATION_ID.0 as usize..GENERATION_ID.0 as usize + 16;

/// All of a guest's memory but the ID.
fn memory(guest: &Running) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY as usize];
    let memory = guest.handle.ram().memory();
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes[ID].fill(0);
    bytes
}

fn generation(guest: &Running) -> [u8; 16] {
    let memory = guest.handle.ram().memory();
    memory.read_obj(GENERATION_ID).unwrap()
}

/// Takes a snapshot of the guest, which is paused at it; its memory then.
fn snapshot_paused(
    guest: &Running,
    dir: &std::path::Path,
    parent: Option<&std::path::Path>,
) -> Vec<u8> {
    guest.handle.pause().unwrap();
    snapshot(guest, dir, parent);
    let then = memory(guest);
    guest.handle.resume().unwrap();
    then
}

fn back(guest: &Running, chain: &Chain) -> Result<u64, GoBackError> {
    guest.handle.go_back_to(chain, LIMIT, &mut |_| true)
}

/// The guest counts on from an earlier number than `last`, where it was when it was saved.
fn counts_on_from_before(guest: &Running, last: u32) -> u32 {
    let mut before = last;
    let at = loop {
        let next = guest.report();
        assert_ne!(next, counting::BROKEN, "a page is not as the guest left it");
        if next <= before {
            break next;
        }
        before = next;
    };
    let mut at_now = at;
    count_on(guest, &mut at_now, 200);
    at
}

#[test]
fn a_guest_that_runs_goes_back_to_each_snapshot_of_a_chain_byte_for_byte_and_counts_on_from_there()
{
    let folder = tempfile::tempdir().unwrap();
    let dirs = ["full", "diff"].map(|name| folder.path().join(name));
    let guest = guest().start();
    let resets = Arc::new(AtomicU64::new(0));
    let counted = resets.clone();
    guest.handle.on_reset(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let mut last = guest.report();
    count_on(&guest, &mut last, 300);
    let full = snapshot_paused(&guest, &dirs[0], None);
    count_on(&guest, &mut last, 300);
    let diff = snapshot_paused(&guest, &dirs[1], Some(&dirs[0]));
    count_on(&guest, &mut last, 300);
    let chains = dirs.map(|dir| Chain::open(&dir).unwrap());
    let mut firsts = Vec::new();
    for (round, which) in [0, 1, 0, 0, 1, 1, 0].into_iter().enumerate() {
        // Also what was zero, and what a diff does not have.
        let memory_now = guest.handle.ram().memory();
        let high = GuestAddress(MEMORY - 4096);
        memory_now.write_obj(0xabcd_u32, high).unwrap();
        if which == 0 {
            // It runs: from then on it counts from a smaller number.
            assert!(back(&guest, &chains[0]).unwrap() > 0);
            firsts.push(counts_on_from_before(&guest, last));
        }
        guest.handle.pause().unwrap();
        back(&guest, &chains[which]).unwrap();
        assert_eq!(guest.handle.state(), VmState::Paused);
        let now = memory(&guest);
        let then = [&full, &diff][which];
        assert!(now == then[..], "round {round}: memory differs");
        let id = generation(&guest);
        let put = back(&guest, &chains[which]).unwrap();
        assert_eq!(put, 1, "all but the ID is as it was");
        assert_ne!(generation(&guest), id, "two copies have the same ID");
        guest.drain();
        guest.handle.resume().unwrap();
        last = guest.report();
    }
    assert!(
        firsts.iter().all(|first| *first == firsts[0]),
        "{firsts:x?}"
    );
    assert_eq!(resets.load(Ordering::Relaxed), 2 * 7 + 4);
    assert_eq!(guest.handle.status().resets, 2 * 7 + 4);
    guest.power_off();
}

#[test]
fn marks_and_what_is_followed_for_diffs_know_what_going_back_has_changed() {
    let folder = tempfile::tempdir().unwrap();
    let [first, diff] = ["first", "diff"].map(|name| folder.path().join(name));
    let guest = guest().start();
    let mut last = guest.report();
    count_on(&guest, &mut last, 100);
    snapshot(&guest, &first, None);
    count_on(&guest, &mut last, 200);
    guest.handle.pause().unwrap();
    guest.handle.mark("a", LIMIT).unwrap();
    let at_mark = memory(&guest);
    guest.handle.resume().unwrap();
    count_on(&guest, &mut last, 100);
    let chain = Chain::open(&first).unwrap();
    back(&guest, &chain).unwrap();
    let first_number = counts_on_from_before(&guest, last);
    guest.handle.pause().unwrap();
    guest.handle.rewind(Some("a"), LIMIT).unwrap();
    assert!(memory(&guest) == at_mark, "memory is not that of the mark");
    // A diff of what is there now, though nothing was followed since its parent.
    snapshot(&guest, &diff, Some(&first));
    back(&guest, &chain).unwrap();
    back(&guest, &Chain::open(&diff).unwrap()).unwrap();
    assert!(memory(&guest) == at_mark, "memory is not that of the diff");
    guest.drain();
    guest.handle.resume().unwrap();
    let mut at = guest.report();
    assert!(at > first_number);
    count_on(&guest, &mut at, 200);
    guest.power_off();
}

#[test]
fn what_is_damaged_or_of_another_machine_is_refused_and_the_guest_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let [dir, other] = ["s", "other"].map(|name| folder.path().join(name));
    let guest = guest().start();
    let mut last = guest.report();
    count_on(&guest, &mut last, 100);
    snapshot(&guest, &dir, None);
    let larger = Guest::new(VmConfig {
        memory_bytes: 2 * MEMORY,
        console: SerialBackend::None,
        ..config(code(), 1)
    });
    let larger = larger.start();
    larger.report();
    snapshot(&larger, &other, None);
    larger.power_off();
    let refused = back(&guest, &Chain::open(&other).unwrap()).unwrap_err();
    assert!(refused.to_string().contains("bytes of memory"), "{refused}");
    // One byte of a page that is stored.
    let chain = Chain::open(&dir).unwrap();
    let image = std::fs::OpenOptions::new()
        .write(true)
        .open(dir.join("memory.image"))
        .unwrap();
    image.write_all_at(&[0x5a; 7], PAGES_AT + 100).unwrap();
    let refused = back(&guest, &chain).unwrap_err();
    assert!(matches!(refused, GoBackError::Snapshot(_)), "{refused}");
    assert_eq!(guest.handle.state(), VmState::Running);
    assert_eq!(guest.handle.status().resets, 0);
    count_on(&guest, &mut last, 300);
    let none = guest.handle.rewind(None, LIMIT).unwrap_err();
    assert!(matches!(none, RewindError::Refused(MarkError::NoMark)));
    guest.power_off();
}

#[test]
fn one_that_fails_half_way_stands_still_until_it_succeeds_or_the_guest_is_reset() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let guest = guest().start();
    let mut last = guest.report();
    count_on(&guest, &mut last, 100);
    snapshot(&guest, &dir, None);
    count_on(&guest, &mut last, 100);
    let image = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(dir.join("memory.image"))
        .unwrap();
    let mut whole = [0; 7];
    image.read_exact_at(&mut whole, PAGES_AT + 100).unwrap();
    // Somebody changes the file once it was checked.
    let changes = Arc::new(AtomicBool::new(false));
    let (changing, file) = (changes.clone(), image.try_clone().unwrap());
    guest.handle.on_reset(move || {
        if changing.swap(false, Ordering::AcqRel) {
            file.write_all_at(&[0x5a; 7], PAGES_AT + 100).unwrap();
        }
    });
    let chain = Chain::open(&dir).unwrap();
    for mended_by_reset in [false, true] {
        changes.store(true, Ordering::Release);
        let error = back(&guest, &chain).unwrap_err();
        assert!(matches!(error, GoBackError::HalfWay { .. }), "{error}");
        assert_eq!(guest.handle.state(), VmState::Paused);
        assert_eq!(guest.handle.resume(), Err(Refused::HalfRewound));
        image.write_all_at(&whole, PAGES_AT + 100).unwrap();
        guest.drain();
        if mended_by_reset {
            guest.handle.reset().unwrap();
            while guest.report() != 0x1000 {}
            count_on(&guest, &mut 0x1000, 100);
        } else {
            back(&guest, &chain).unwrap();
            guest.handle.resume().unwrap();
            let mut at = guest.report();
            count_on(&guest, &mut at, 100);
        }
    }
    guest.power_off();
}
