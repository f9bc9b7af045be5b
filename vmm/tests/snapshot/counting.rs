//! A guest that counts, and whose pages tell where it is; snapshots of it.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use vmm::snapshot::{Beside, Chain, SnapshotRequest, Taken};

use super::common::{Guest, Running, config};
use crate::guest_code;

/// Where the guest's pages are, and their number.
pub const PAGES_AT: u64 = 0x20_0000;
pub const PAGES: u32 = 64;
/// What the guest reports when a page is not as it left it.
pub const BROKEN: u32 = 0xbad;

// Counts; each number goes into the next of 64 pages, where the one of 64 before has to be, and is
// reported.
guest_code!(
    counts,
    "mov r12d, 0x1000",
    "1: mov ecx, r12d",
    "and ecx, 63",
    "shl ecx, 12",
    "lea rbx, [rcx + 0x200000]",
    "mov eax, [rbx]",
    "test eax, eax",
    "jz 2f",
    "add eax, 64",
    "cmp eax, r12d",
    "je 2f",
    "mov eax, 0xbad",
    "mov edx, 0x500",
    "out dx, eax",
    "hlt",
    "2: mov [rbx], r12d",
    "mov eax, r12d",
    "mov edx, 0x500",
    "out dx, eax",
    "inc r12d",
    "jmp 1b",
);

/// The guest's code.
pub fn code() -> Vec<u8> {
    counts()
}

pub fn guest() -> Guest {
    Guest::new(config(counts(), 1))
}

pub fn request<'a>(dir: &'a Path, parent: Option<&'a Path>) -> SnapshotRequest<'a> {
    SnapshotRequest {
        dir,
        parent,
        program: "test",
        track: false,
        stop: false,
        limit: Duration::from_secs(10),
    }
}

pub fn beside() -> Result<Beside, String> {
    Ok(Beside {
        vm: json!({"name": "test"}),
        instead: Vec::new(),
    })
}

pub fn snapshot(guest: &Running, dir: &Path, parent: Option<&Path>) -> Taken {
    let taken = guest
        .handle
        .snapshot(&request(dir, parent), &mut |_| true, &mut beside);
    taken.unwrap()
}

/// The next so many reports of one that counts from `last` on, behind those that wait already: the
/// guest runs now, and may have stood still since it made these.
pub fn count_on(guest: &Running, last: &mut u32, reports: u32) {
    let mut count = |next| {
        assert_ne!(next, BROKEN, "a page is not as the guest left it");
        assert_eq!(next, *last + 1, "a step lost or done twice");
        *last = next;
    };
    guest.drain().into_iter().for_each(&mut count);
    (0..reports).for_each(|_| count(guest.report()));
}

/// A machine that goes on from `dir`, and the number it reported last before.
pub fn go_on(dir: &Path) -> (Running, u32) {
    let chain = Chain::open(dir).unwrap();
    let mut guest = guest();
    guest.vm.go_on_from(&chain, &mut |_| true).unwrap();
    let guest = guest.start();
    let first = guest.report();
    assert_ne!(first, BROKEN);
    (guest, first)
}
