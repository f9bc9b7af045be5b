//! Snapshots and first marks read what nobody has touched where it would come from: it is not there
//! afterwards, either.

use std::ops::Range;
use std::path::Path;

use serde_json::json;
use vm_memory::{Bytes, GuestAddress};
use vmm::VmHandle;
use vmm::memory::MemorySource;
use vmm::snapshot::{Beside, Chain, SnapshotRequest, Taken};

use crate::shared::{can_share, own_bytes};
use crate::writer::{Writing, all_of, writer};
use crate::{
    LIMIT, MEMORY, PAGES, Saved, check, clone_with, saved_with, template, template_on_demand,
};

/// What the file has that no guest comes to, in bytes.
const UNTOUCHED: Range<u64> = 6 << 20..14 << 20;
/// What may come by itself meanwhile: pages of the guest's work.
const SOME: u64 = 3 << 20;

/// A guest in the middle of its work, whose file has bytes that it does not come to.
fn saved() -> Saved {
    saved_with(1, |memory| {
        for at in UNTOUCHED.step_by(4096) {
            let page = [(at >> 12) as u8 | 1; 4096];
            memory.write_slice(&page, GuestAddress(at)).unwrap();
        }
    })
}

fn snapshot(handle: &VmHandle, dir: &Path, parent: Option<&Path>) -> Taken {
    let request = SnapshotRequest {
        dir,
        parent,
        program: "test",
        track: false,
        stop: false,
        limit: LIMIT,
    };
    let mut beside = || {
        Ok(Beside {
            vm: json!({}),
            instead: Vec::new(),
        })
    };
    handle
        .snapshot(&request, &mut |_| true, &mut beside)
        .unwrap()
}

/// Whether what nobody came to is in the snapshot in `dir`, and a guest goes on from it.
fn is_whole(saved: &Saved, dir: &Path) {
    let chain = Chain::open(dir).unwrap();
    chain.check(&mut |_| true).unwrap();
    let mut found = vec![0; (UNTOUCHED.end - UNTOUCHED.start) as usize];
    chain.read(UNTOUCHED.start / 4096, &mut found).unwrap();
    let expected = &saved.memory[UNTOUCHED.start as usize..UNTOUCHED.end as usize];
    assert!(found == expected);
    let mut guest = writer(MEMORY, MemorySource::Fresh, 1, PAGES);
    guest.guest.vm.go_on_from(&chain, &mut |_| true).unwrap();
    let guest = guest.go_on();
    guest.wait(100);
    check(&guest);
    guest.guest.power_off();
}

fn is_as_saved(saved: &Saved, guest: &Writing) {
    let all = all_of(guest.handle());
    let place = UNTOUCHED.start as usize..UNTOUCHED.end as usize;
    assert!(all[place.clone()] == saved.memory[place]);
}

/// Runs on, is rewound to its mark, and has all that was saved.
fn goes_back(saved: &Saved, clone: Writing) {
    clone.wait(100);
    clone.handle().rewind(Some("a"), LIMIT).unwrap();
    check(&clone);
    is_as_saved(saved, &clone);
    clone.guest.power_off();
}

#[test]
fn a_snapshot_and_a_mark_of_a_guest_whose_memory_is_shared_bring_none_of_it() {
    if !can_share() {
        return;
    }
    let saved = saved();
    let folder = tempfile::tempdir().unwrap();
    let clone = clone_with(&saved, template_on_demand(&saved), 1);
    let handle = clone.handle();
    handle.share_memory().unwrap();
    clone.wait(300);
    let before = own_bytes(&clone);
    assert!(before < UNTOUCHED.end - UNTOUCHED.start, "{before}");
    let (full, diff) = (folder.path().join("full"), folder.path().join("diff"));
    snapshot(handle, &full, None);
    snapshot(handle, &diff, Some(&full));
    handle.mark("a", LIMIT).unwrap();
    let after = own_bytes(&clone);
    assert!(after < before + SOME, "{before}, then {after}");
    assert!(handle.ram().comes_on_demand());
    for dir in [&full, &diff] {
        is_whole(&saved, dir);
    }
    // What was not there at the mark, and is changed since, is as it was.
    let memory = handle.ram().memory();
    for at in UNTOUCHED.step_by(64 << 12) {
        memory.write_slice(&[0x11; 100], GuestAddress(at)).unwrap();
    }
    goes_back(&saved, clone);
}

#[test]
fn a_guest_whose_memory_is_a_files_leaves_the_file_and_what_it_has_not_as_they_are() {
    let saved = saved();
    let folder = tempfile::tempdir().unwrap();
    let clone = clone_with(&saved, template(&saved), 1);
    let handle = clone.handle();
    clone.wait(100);
    let blocks =
        |file: &std::fs::File| std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    let before = blocks(&saved.file);
    let (full, diff) = (folder.path().join("full"), folder.path().join("diff"));
    snapshot(handle, &full, None);
    snapshot(handle, &diff, Some(&full));
    handle.mark("a", LIMIT).unwrap();
    // Holes of a file in shared memory would be filled by who looks at them through a mapping.
    assert_eq!(blocks(&saved.file), before);
    for dir in [&full, &diff] {
        is_whole(&saved, dir);
    }
    goes_back(&saved, clone);
}

#[test]
fn a_diff_of_a_guest_with_memory_of_its_own_takes_none_for_what_was_never_written() {
    let guest = writer(MEMORY, MemorySource::Fresh, 1, PAGES).start();
    guest.wait(300);
    let folder = tempfile::tempdir().unwrap();
    let before = own_bytes(&guest);
    let (full, diff) = (folder.path().join("full"), folder.path().join("diff"));
    snapshot(guest.handle(), &full, None);
    // Nothing was followed since: every page is compared.
    let taken = snapshot(guest.handle(), &diff, Some(&full));
    assert!(taken.diff);
    let after = own_bytes(&guest);
    assert!(after < before + SOME, "{before}, then {after} of {MEMORY}");
    let mut on = writer(MEMORY, MemorySource::Fresh, 1, PAGES);
    let chain = Chain::open(&diff).unwrap();
    on.guest.vm.go_on_from(&chain, &mut |_| true).unwrap();
    let on = on.go_on();
    on.wait(100);
    check(&on);
    check(&guest);
    on.guest.power_off();
    guest.guest.power_off();
}
