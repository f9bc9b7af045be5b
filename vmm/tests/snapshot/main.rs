//! Snapshots of running machines on disk: what goes on from one is what was saved, to the
//! instruction.

#![allow(clippy::unwrap_used)]

mod back;
#[path = "../common/mod.rs"]
mod common;
mod counting;
mod golden;
mod outside;
mod paused;
mod places;

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use common::{Guest, MEMORY, config};
use counting::{PAGES, PAGES_AT, beside, code, count_on, go_on, guest, request, snapshot};
use devices::serial::SerialBackend;
use serde_json::json;
use vm_memory::{Bytes, GuestAddress};
use vmm::snapshot::{Beside, CaptureError, Chain, SnapshotRequest};
use vmm::{ExitReason, MarkError, RewindError, VmConfig};

/// How long a guest may take to come to rest.
const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn a_guest_goes_on_from_a_directory_and_the_one_it_was_taken_of_too() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let original = guest().start();
    let mut last = original.report();
    count_on(&original, &mut last, 200);
    let taken = snapshot(&original, &dir, None);
    assert!(taken.pages > u64::from(PAGES), "{taken:?}");
    count_on(&original, &mut last, 300);

    // Twice from the same directory.
    for _ in 0..2 {
        let (twin, mut at) = go_on(&dir);
        assert!(at > 0x1000 + 200);
        count_on(&twin, &mut at, 300);
        // A reset boots it, as if it had never been elsewhere.
        twin.handle.reset().unwrap();
        while twin.report() != 0x1000 {}
        count_on(&twin, &mut 0x1000, 100);
        twin.power_off();
    }
    original.power_off();
}

/// A rewind without a name goes to a mark and never to a directory.
#[test]
fn a_snapshot_in_a_directory_is_no_mark_and_moves_none() {
    let folder = tempfile::tempdir().unwrap();
    let guest = guest().start();
    let mut last = guest.report();
    snapshot(&guest, &folder.path().join("first"), None);
    let no_mark = guest.handle.rewind(None, LIMIT).unwrap_err();
    assert!(
        matches!(no_mark, RewindError::Refused(MarkError::NoMark)),
        "{no_mark}"
    );
    count_on(&guest, &mut last, 100);
    guest.handle.mark("a", LIMIT).unwrap();
    count_on(&guest, &mut last, 300);
    snapshot(&guest, &folder.path().join("second"), None);
    assert_eq!(guest.handle.marks().len(), 1);
    // To the mark, not to the snapshot behind it: the guest counts on from an earlier number.
    let rewound = guest.handle.rewind(None, LIMIT).unwrap();
    assert_eq!(rewound.mark, "a");
    loop {
        let next = guest.report();
        if next <= last {
            break;
        }
        last = next;
    }
    guest.power_off();
}

/// Who copies memory may have it mapped from elsewhere at the end, and pages missing meanwhile.
#[test]
fn a_first_mark_waits_until_nobody_else_copies_memory() {
    let folder = tempfile::tempdir().unwrap();
    let guest = guest().start();
    guest.report();
    let (say, said) = channel();
    std::thread::scope(|scope| {
        let handle = &guest.handle;
        let mut marked_by = None;
        let mut tell = |what: &str| {
            if what == "bringing the guest to rest" {
                let say = say.clone();
                let mark = move || say.send(handle.mark("a", Duration::from_secs(20)).map(|_| ()));
                marked_by = Some(scope.spawn(mark));
                // It takes a few milliseconds where nobody copies; a host that is slower has this
                // not fail.
                let waited = said.recv_timeout(Duration::from_millis(500));
                assert!(matches!(waited, Err(RecvTimeoutError::Timeout)));
            }
            true
        };
        let dir = folder.path().join("s");
        let taken = handle.snapshot(&request(&dir, None), &mut tell, &mut beside);
        taken.unwrap();
        marked_by.unwrap().join().unwrap().unwrap();
    });
    said.recv().unwrap().unwrap();
    guest.power_off();
}

#[test]
fn one_that_ends_with_its_snapshot_loses_nothing_and_repeats_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest().start();
    let mut last = 0xfff;
    for round in 0..5 {
        count_on(&guest, &mut last, 150);
        let dir = folder.path().join(format!("{round}"));
        let request = SnapshotRequest {
            stop: true,
            ..request(&dir, None)
        };
        let taken = guest.handle.snapshot(&request, &mut |_| true, &mut beside);
        taken.unwrap();
        // What it still reported, up to its end.
        for next in guest.drain() {
            assert_eq!(next, last + 1);
            last = next;
        }
        assert_eq!(guest.end().unwrap(), ExitReason::HostPowerOff);
        let (twin, first) = go_on(&dir);
        assert_eq!(first, last + 1, "round {round}");
        last = first;
        guest = twin;
    }
    guest.power_off();
}

#[test]
fn diffs_hold_what_changed_and_each_of_a_chain_can_be_gone_on_from() {
    let folder = tempfile::tempdir().unwrap();
    let original = guest().start();
    let mut last = original.report();
    let dir = |index: u32| folder.path().join(index.to_string());
    let mut moments = Vec::new();
    for index in 0..4u32 {
        count_on(&original, &mut last, 40);
        let parent = index.checked_sub(1).map(dir);
        let here = dir(index);
        // What changed is found by looking at first, and followed from the second on.
        let request = SnapshotRequest {
            track: index == 1,
            ..request(&here, parent.as_deref())
        };
        let taken = original
            .handle
            .snapshot(&request, &mut |_| true, &mut beside);
        let taken = taken.unwrap();
        assert_eq!(taken.diff, index > 0);
        if index > 0 {
            // The guest's pages, and some that KVM or nobody wrote.
            assert!(
                (1..=u64::from(PAGES) + 8).contains(&taken.pages),
                "{taken:?}"
            );
        }
        moments.push(last);
    }
    original.power_off();
    for index in 0..4 {
        let (twin, mut at) = go_on(&dir(index));
        assert!(at > moments[index as usize]);
        count_on(&twin, &mut at, 200);
        twin.power_off();
    }
    // Folders that lie together may move together.
    let moved = folder.path().join("moved");
    std::fs::create_dir(&moved).unwrap();
    for index in 0..4 {
        std::fs::rename(dir(index), moved.join(index.to_string())).unwrap();
    }
    Chain::open(&moved.join("3"))
        .unwrap()
        .check(&mut |_| true)
        .unwrap();
}

#[test]
fn a_snapshot_that_was_given_up_does_not_make_changes_of_the_next_one_unknown() {
    let folder = tempfile::tempdir().unwrap();
    let original = guest().start();
    let mut last = original.report();
    let dir = |name: &str| folder.path().join(name);
    snapshot(&original, &dir("parent"), None);
    count_on(&original, &mut last, 100);
    // A page that the guest itself leaves alone.
    let apart = GuestAddress(original.handle.ram().size_bytes() - 8);
    let memory = original.handle.ram().memory();
    memory.write_obj(0x1234_u64, apart).unwrap();
    // Changes are followed from here on, and it does not come to its end.
    let given_up = dir("given up");
    let tracked = SnapshotRequest {
        track: true,
        ..request(&given_up, None)
    };
    let mut is_wanted = |what: &str| what != "writing the snapshot";
    let result = original
        .handle
        .snapshot(&tracked, &mut is_wanted, &mut beside);
    assert!(matches!(result, Err(CaptureError::GivenUp)));
    count_on(&original, &mut last, 3);
    let diff = snapshot(&original, &dir("diff"), Some(&dir("parent")));
    assert!(diff.diff);
    original.power_off();
    let (twin, mut at) = go_on(&dir("diff"));
    assert!(at > last);
    let there: u64 = twin.handle.ram().memory().read_obj(apart).unwrap();
    assert_eq!(there, 0x1234);
    count_on(&twin, &mut at, 200);
    twin.power_off();
}

#[test]
fn what_is_given_up_or_cannot_be_written_leaves_nothing_and_the_guest_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let guest = guest().start();
    let mut last = guest.report();
    let dir = folder.path().join("s");
    for words in 0..2 {
        let mut heard = 0;
        let given_up = guest.handle.snapshot(
            &request(&dir, None),
            &mut |_| {
                heard += 1;
                heard <= words
            },
            &mut beside,
        );
        assert!(matches!(given_up, Err(CaptureError::GivenUp)));
        count_on(&guest, &mut last, 100);
    }
    let refused = guest
        .handle
        .snapshot(&request(&dir, None), &mut |_| true, &mut || {
            Err("not now".to_owned())
        });
    assert!(matches!(refused, Err(CaptureError::Beside(_))));
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    let nowhere = folder.path().join("not/there");
    for (dir, parent) in [(&nowhere, None), (&dir, Some(nowhere.as_path()))] {
        let error = guest
            .handle
            .snapshot(&request(dir, parent), &mut |_| true, &mut beside);
        assert!(error.unwrap_err().to_string().contains("not/there"));
    }
    count_on(&guest, &mut last, 100);
    snapshot(&guest, &dir, None);
    guest.power_off();
}

#[test]
fn a_machine_that_is_not_alike_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let original = guest().start();
    original.report();
    snapshot(&original, &dir, None);
    let chain = Chain::open(&dir).unwrap();
    let larger = VmConfig {
        memory_bytes: 2 * MEMORY,
        ..config(code(), 1)
    };
    for (config, word) in [(config(code(), 2), "vCPUs"), (larger, "memory")] {
        let mut other = Guest::new(config);
        let error = other
            .vm
            .go_on_from(&chain, &mut |_| true)
            .unwrap_err()
            .to_string();
        assert!(error.contains(word), "{error}");
    }
    // Nor is a snapshot of another machine a parent.
    let other = Guest::new(VmConfig {
        memory_bytes: 2 * MEMORY,
        console: SerialBackend::None,
        ..config(code(), 1)
    });
    let other = other.start();
    other.report();
    let second = folder.path().join("t");
    let error = other
        .handle
        .snapshot(&request(&second, Some(&dir)), &mut |_| true, &mut beside);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("no parent"), "{error}");
    other.power_off();
    original.power_off();
}

#[test]
fn an_image_that_changes_before_it_is_gone_on_from_lazily_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let original = guest().start();
    original.report();
    snapshot(&original, &dir, None);
    original.power_off();
    let lazily = |chain: &Chain| {
        Guest::new(VmConfig {
            memory: chain.template(None).unwrap(),
            ..config(code(), 1)
        })
    };
    let chain = Chain::open(&dir).unwrap();
    let mut same = lazily(&chain);
    same.vm.go_on_from(&chain, &mut |_| true).unwrap();
    drop(same);
    let mut other = lazily(&chain);
    std::thread::sleep(std::time::Duration::from_millis(20));
    let image = dir.join("memory.image");
    let image = std::fs::File::options().write(true).open(image).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&image, b"x", PAGES_AT).unwrap();
    let error = other.vm.go_on_from(&chain, &mut |_| true).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("memory.image was changed while it was opened"),
        "{error}"
    );
}

#[test]
fn a_restore_that_is_given_up_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let original = guest().start();
    original.report();
    // Many runs, so that somebody is asked.
    let memory = original.handle.ram().memory();
    for page in (0..400).step_by(2) {
        let at = GuestAddress(PAGES_AT + 0x6_0000 + page * 4096);
        memory.write_obj(page + 1, at).unwrap();
    }
    snapshot(&original, &dir, None);
    original.power_off();
    let chain = Chain::open(&dir).unwrap();
    let mut words = 0;
    let mut other = guest();
    let given_up = other.vm.go_on_from(&chain, &mut |what| {
        assert!(what.starts_with("reading memory, "), "{what}");
        words += 1;
        false
    });
    assert_eq!(words, 1);
    assert_eq!(
        given_up.unwrap_err().to_string(),
        "given up, nothing of it is left"
    );
}

#[test]
fn what_was_patched_into_the_guest_is_not_in_its_image() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let guest = guest().start();
    guest.report();
    let place = GuestAddress(PAGES_AT + 0x10_0ffc);
    let memory = guest.handle.ram().memory();
    memory.write_slice(b"gate", place).unwrap();
    let mut beside = || {
        Ok(Beside {
            vm: json!(null),
            instead: vec![(place, b"text".to_vec())],
        })
    };
    let taken = guest
        .handle
        .snapshot(&request(&dir, None), &mut |_| true, &mut beside);
    taken.unwrap();
    let mut now = [0; 4];
    memory.read_slice(&mut now, place).unwrap();
    assert_eq!(&now, b"gate");
    let mut page = [0; 4096];
    let chain = Chain::open(&dir).unwrap();
    chain.read(place.0 / 4096, &mut page).unwrap();
    assert_eq!(&page[4092..], b"text");
    chain.check(&mut |_| true).unwrap();
    guest.power_off();
}
