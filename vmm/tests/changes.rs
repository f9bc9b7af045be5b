//! Which pages changed, whoever wrote them; and that nobody has to know.

#![allow(clippy::unwrap_used)]

mod common;
mod writer;

use std::collections::BTreeSet;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::memory::MemorySource;
use vmm::{ChangedPages, VmHandle};
use writer::{Writing, all_of, differing};

const LIMIT: Duration = Duration::from_secs(20);

/// Memory and what changed, at one moment.
fn look(writing: &Writing) -> (Vec<u8>, ChangedPages) {
    let handle = writing.handle();
    handle
        .quiesce(LIMIT, |quiesced| {
            writing.check(quiesced);
            let changed = quiesced.changed_pages().unwrap().unwrap();
            (all_of(handle), changed)
        })
        .unwrap()
}

fn check(before: &[u8], after: &[u8], changed: &ChangedPages, most: usize) {
    let changed: BTreeSet<u32> = changed.pages().iter().copied().collect();
    for page in differing(before, after) {
        assert!(changed.contains(&page), "page {page:#x} was not told");
    }
    assert!(changed.len() <= most, "{} pages were told", changed.len());
}

fn logs_are_on(handle: &VmHandle) -> bool {
    let memory = handle.ram().memory();
    memory
        .iter()
        .any(|region| region.get_mmap().bitmap().is_on())
}

#[test]
fn pages_that_vcpus_a_device_or_the_host_wrote_are_told_until_they_are_confirmed() {
    let writing = writer::writer(8 << 20, MemorySource::Fresh, 3, 128).start();
    let handle = writing.handle();
    assert!(!logs_are_on(handle), "nobody asked");
    let untracked = handle.quiesce(LIMIT, |quiesced| quiesced.changed_pages().unwrap());
    assert_eq!(untracked.unwrap(), None);
    writing.wait(200);
    handle.track_changes(LIMIT).unwrap();
    let (mut before, first) = look(&writing);
    let mut unconfirmed: BTreeSet<u32> = first.pages().iter().copied().collect();
    // Three areas, the device's pages, the stack and the host's page.
    let most = 3 * 128 + 8 + 4;
    for round in 0..30 {
        writing.wait(20);
        let host = GuestAddress(0x70_0000 + round * 8);
        handle.ram().memory().write_obj(round, host).unwrap();
        let (after, changed) = look(&writing);
        check(&before, &after, &changed, most);
        assert!(changed.pages().contains(&0x700));
        assert!(
            unconfirmed
                .iter()
                .all(|page| changed.pages().contains(page))
        );
        if round % 3 == 0 {
            handle.confirm_changes(&changed);
            unconfirmed.clear();
            before = after;
        } else {
            unconfirmed.extend(changed.pages());
        }
    }
    handle.stop_tracking_changes().unwrap();
    assert!(!logs_are_on(handle), "nobody asks any more");
    writing.wait(200);
    // From anew: what was written while nobody asked is not told.
    let start = handle.quiesce(LIMIT, |quiesced| {
        quiesced.track_changes().unwrap();
        quiesced.changed_pages().unwrap().unwrap()
    });
    assert!(start.unwrap().pages().is_empty());
    writing.guest.power_off();
}

#[test]
fn a_snapshot_that_failed_late_does_not_lose_what_a_later_one_was_told() {
    let writing = writer::writer(8 << 20, MemorySource::Fresh, 1, 64).start();
    let handle = writing.handle();
    handle.track_changes(LIMIT).unwrap();
    let host = |page: u64| {
        let at = GuestAddress(page * 4096);
        handle.ram().memory().write_obj(1u8, at).unwrap();
    };
    host(0x700);
    let (_, first) = look(&writing);
    host(0x701);
    let (_, second) = look(&writing);
    handle.confirm_changes(&first);
    let (_, third) = look(&writing);
    for told in [&second, &third] {
        assert!(told.pages().contains(&0x700) && told.pages().contains(&0x701));
    }
    let mut ranges = third.ranges();
    assert!(ranges.any(|range| range == (0x700..0x702)));
    handle.confirm_changes(&third);
    let (_, fourth) = look(&writing);
    assert!(!fourth.pages().contains(&0x700));
    writing.guest.power_off();
}

#[test]
fn more_pages_than_a_ring_holds_are_told() {
    // 16,384 entries.
    let pages = 32 * 1024;
    let writing = writer::writer(256 << 20, MemorySource::Fresh, 1, pages).start();
    let handle = writing.handle();
    handle.track_changes(LIMIT).unwrap();
    let (before, first) = look(&writing);
    handle.confirm_changes(&first);
    writing.wait(40_000);
    let (after, changed) = look(&writing);
    assert!(differing(&before, &after).len() > 16 * 1024);
    check(&before, &after, &changed, before.len() / 4096);
    handle.confirm_changes(&changed);
    // It goes on working afterwards.
    writing.wait(100);
    let (last, changed) = look(&writing);
    check(&after, &last, &changed, pages as usize + 16);
    assert!(changed.pages().len() < 16 * 1024);
    writing.guest.power_off();
}

#[test]
fn what_a_reset_empties_has_changed() {
    let writing = writer::writer(8 << 20, MemorySource::Fresh, 2, 128).start();
    let handle = writing.handle();
    writing.wait(500);
    handle.track_changes(LIMIT).unwrap();
    handle.pause().unwrap();
    let (before, _) = look(&writing);
    handle.reset().unwrap();
    handle.resume().unwrap();
    while handle.status().resets == 0 {
        std::thread::yield_now();
    }
    let (after, changed) = handle
        .quiesce(LIMIT, |quiesced| {
            let changed = quiesced.changed_pages().unwrap().unwrap();
            (all_of(handle), changed)
        })
        .unwrap();
    assert!(differing(&before, &after).len() > 200);
    check(&before, &after, &changed, before.len() / 4096);
    writing.guest.power_off();
}

#[test]
fn memory_above_4_gib_is_told_apart_from_that_below() {
    let writing = writer::writer(4 << 30, MemorySource::Fresh, 1, 64);
    let mut writing = writing;
    // Above 4 GiB, where the boot tables do not reach: the guest writes it with addresses that
    // other tables map.
    writing.areas[0].start = (4 << 30) + (16 << 20);
    let writing = writing.go_on();
    writing.guest.report();
    let handle = writing.handle();
    writer::map_high(handle);
    writing.begin();
    handle.track_changes(LIMIT).unwrap();
    // The guest chooses pages at random: all of them by then.
    writing.wait(3000);
    let high = GuestAddress((4 << 30) + (900 << 20));
    handle.ram().memory().write_obj(7u8, high).unwrap();
    let changed = handle
        .quiesce(LIMIT, |quiesced| {
            writing.check(quiesced);
            quiesced.changed_pages().unwrap().unwrap()
        })
        .unwrap();
    let first = (3u32 << 30 >> 12) + (16 << 20 >> 12);
    let in_area = changed
        .pages()
        .iter()
        .filter(|&&page| (first..first + 64).contains(&page));
    assert_eq!(in_area.count(), 64);
    assert!(
        changed
            .pages()
            .contains(&((3u32 << 30 >> 12) + (900 << 20 >> 12)))
    );
    assert!(changed.pages().len() < 64 + 16);
    writing.guest.power_off();
}
