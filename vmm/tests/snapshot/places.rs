//! Places that cannot be written to the end: full ones and read-only ones. Each says so in one
//! line and leaves nothing, older snapshots stay whole, and the guest goes on.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use vmm::VmState;
use vmm::snapshot::{Chain, SnapshotRequest};

use super::common::Running;
use super::counting::{beside, count_on, go_on, guest, request, snapshot};

/// Runs `test` with a folder on a tmpfs of its own of so many bytes, which only this test's thread
/// and those that it starts see. Skipped where none can be mounted.
fn on_tmpfs(name: &str, bytes: u64, test: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    match mount(place, bytes) {
        Err(error) => skipped::skip(name, &format!("this process may not mount: {error}")),
        Ok(()) => {
            test(place);
            unmount(place);
        }
    }
}

fn result(value: libc::c_int) -> std::io::Result<()> {
    match value {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn path(place: &Path) -> CString {
    CString::new(place.as_os_str().as_bytes()).unwrap()
}

/// Mounts a tmpfs at `place` in a mount namespace of this thread's own.
fn mount(place: &Path, bytes: u64) -> std::io::Result<()> {
    let options = CString::new(format!("size={bytes}")).unwrap();
    let (place, none) = (path(place), std::ptr::null());
    // SAFETY: strings with their ends, or null where there is none; the namespace is this thread's.
    unsafe {
        result(libc::unshare(libc::CLONE_NEWNS))?;
        let private = libc::MS_REC | libc::MS_PRIVATE;
        result(libc::mount(none, c"/".as_ptr(), none, private, none.cast()))?;
        let tmpfs = c"tmpfs".as_ptr();
        result(libc::mount(
            tmpfs,
            place.as_ptr(),
            tmpfs,
            0,
            options.as_ptr().cast(),
        ))
    }
}

/// Nothing can be written there any more.
fn make_read_only(place: &Path) {
    let (place, none) = (path(place), std::ptr::null());
    // SAFETY: as above.
    let made = unsafe {
        let flags = libc::MS_REMOUNT | libc::MS_RDONLY;
        result(libc::mount(none, place.as_ptr(), none, flags, none.cast()))
    };
    made.unwrap();
}

fn unmount(place: &Path) {
    let place = path(place);
    // SAFETY: a string with its end.
    result(unsafe { libc::umount2(place.as_ptr(), libc::MNT_DETACH) }).unwrap();
}

fn names(place: &Path) -> Vec<String> {
    let entries = place.read_dir().unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A guest that has counted, and the number that it reported last.
fn counting() -> (Running, u32) {
    let guest = guest().start();
    let mut last = guest.report();
    count_on(&guest, &mut last, 200);
    (guest, last)
}

/// A snapshot into `dir` must fail with one line that names `dir` and says `what`.
#[track_caller]
fn refused(guest: &Running, request: &SnapshotRequest<'_>, what: &str) {
    let error = guest
        .handle
        .snapshot(request, &mut |_| true, &mut beside)
        .unwrap_err()
        .to_string();
    assert!(error.contains(what), "{error}");
    assert!(error.contains(request.dir.to_str().unwrap()), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert_eq!(guest.handle.state(), VmState::Running);
}

/// Bytes that the guest's full snapshot takes there, by trying.
fn bytes_of_a_snapshot(guest: &Running) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let taken = snapshot(guest, &dir, None);
    taken.pages * 4096
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing_and_older_snapshots_whole() {
    let (guest, mut last) = counting();
    let all = bytes_of_a_snapshot(&guest);
    // For a diff with all pages that the guest changes, its files and those of the full one; there
    // is no room for a second full one, which has some pages more.
    let room = 2 * all + 6 * 4096;
    let name = "snapshot::places::a_full_disk_is_said_and_leaves_nothing_and_older_snapshots_whole";
    on_tmpfs(name, room, |place| {
        let full = place.join("full");
        let tracked = SnapshotRequest {
            track: true,
            ..request(&full, None)
        };
        let taken = guest.handle.snapshot(&tracked, &mut |_| true, &mut beside);
        taken.unwrap();
        count_on(&guest, &mut last, 50);
        let second = place.join("second");
        for stop in [false, true, false] {
            let request = SnapshotRequest {
                stop,
                ..request(&second, None)
            };
            refused(&guest, &request, "No space left");
            assert_eq!(names(place), ["full"]);
            count_on(&guest, &mut last, 50);
        }
        // A diff has room, and has all that changed since, whatever failed in between.
        let diff = place.join("diff");
        let taken = snapshot(&guest, &diff, Some(&full));
        assert!(taken.diff);
        // What they are together has none.
        let merged = place.join("merged");
        let chain = Chain::open(&diff).unwrap();
        let error = chain.merge(&merged, &mut |_| true).unwrap_err().to_string();
        assert!(
            error.contains("No space left") && error.contains("merged"),
            "{error}"
        );
        assert_eq!(names(place), ["diff", "full"]);
        for dir in [&full, &diff] {
            Chain::open(dir).unwrap().check(&mut |_| true).unwrap();
            let (twin, mut at) = go_on(dir);
            count_on(&twin, &mut at, 100);
            twin.power_off();
        }
        count_on(&guest, &mut last, 50);
    });
    guest.power_off();
}

/// The last page fits, and what follows does not: each file of a snapshot is one that is given up.
#[test]
fn a_disk_that_is_full_at_any_page_of_a_snapshot_is_said() {
    let (guest, mut last) = counting();
    let all = bytes_of_a_snapshot(&guest) / 4096;
    for pages in (1..all + 6).step_by(7).chain(all - 2..all + 6) {
        let name = "snapshot::places::a_disk_that_is_full_at_any_page_of_a_snapshot_is_said";
        on_tmpfs(name, pages * 4096, |place| {
            let dir = place.join("s");
            match guest
                .handle
                .snapshot(&request(&dir, None), &mut |_| true, &mut beside)
            {
                Ok(_) => Chain::open(&dir).unwrap().check(&mut |_| true).unwrap(),
                Err(error) => {
                    assert!(error.to_string().contains("No space left"), "{error}");
                    assert!(names(place).is_empty(), "{:?}", names(place));
                }
            }
            count_on(&guest, &mut last, 5);
        });
    }
    guest.power_off();
}

#[test]
fn a_place_that_is_read_only_is_said_and_changes_nothing() {
    let (guest, mut last) = counting();
    let name = "snapshot::places::a_place_that_is_read_only_is_said_and_changes_nothing";
    on_tmpfs(name, 64 << 20, |place| {
        let (full, diff): (PathBuf, PathBuf) = (place.join("full"), place.join("diff"));
        snapshot(&guest, &full, None);
        count_on(&guest, &mut last, 20);
        snapshot(&guest, &diff, Some(&full));
        make_read_only(place);
        for stop in [false, true] {
            let (dir, parent) = (place.join("new"), stop.then_some(full.as_path()));
            let request = SnapshotRequest {
                stop,
                ..request(&dir, parent)
            };
            refused(&guest, &request, "Read-only file system");
            count_on(&guest, &mut last, 20);
        }
        let chain = Chain::open(&diff).unwrap();
        let error = chain.merge(&place.join("new"), &mut |_| true).unwrap_err();
        assert!(error.to_string().contains("Read-only file system"));
        assert_eq!(names(place), ["diff", "full"]);
        // What is there can be gone on from.
        let (twin, mut at) = go_on(&diff);
        count_on(&twin, &mut at, 100);
        twin.power_off();
    });
    guest.power_off();
}
