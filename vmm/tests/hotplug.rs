//! A function that comes and goes while a hand-made guest runs. One test, because it counts what
//! the process has.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Mutex};

use common::start;
use devices::pci::config::InterruptPin;
use devices::virtio::blk::{Block, Disk};
use devices::virtio::pci::VirtioPciFunction;
use vmm::{Refused, VmHandle};

// Polls the event register as the event device's method does, reports what came and what is to go,
// and ejects the latter.
guest_code!(
    follows_hotplug,
    "1: mov edx, 0x604",
    "in al, dx",
    "test al, 2",
    "jz 1b",
    "mov edx, 0x610",
    "in eax, dx",
    "mov ebx, eax",
    "mov edx, 0x614",
    "in eax, dx",
    "mov ecx, eax",
    "mov edx, 0x500",
    "mov eax, ebx",
    "out dx, eax",
    "mov eax, ecx",
    "out dx, eax",
    "mov edx, 0x618",
    "mov eax, ecx",
    "out dx, eax",
    "mov edx, 0x500", // ejected by now
    "out dx, eax",
    "jmp 1b",
);

fn plug(handle: &VmHandle, file: &std::path::Path) -> u8 {
    let disk = Block::new(Disk::open(file, false).unwrap(), "plugged");
    let slot = handle.reserve_pci_slot().unwrap();
    let vectors = handle.msi_vectors(2).unwrap();
    let line = slot.intx_line(InterruptPin::A);
    let function = VirtioPciFunction::new(disk, handle.dma_space(), line, vectors).unwrap();
    let function = Arc::new(Mutex::new(function));
    handle
        .plug(&slot, function.clone(), vec![function])
        .unwrap();
    slot.number()
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn functions_come_and_go_and_leave_nothing_behind() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let guest = start(follows_hotplug(), 1);
    let bus = guest.handle.pci_bus().clone();
    let before = bus.occupied();
    assert_eq!(guest.handle.unplug(0), Err(Refused::NotPlugged));
    assert_eq!(guest.handle.unplug(77), Err(Refused::NotPlugged));
    let mut files = None;
    for round in 0..20 {
        let slot = plug(&guest.handle, file.path());
        assert_eq!(slot, 1, "the slot is free again in round {round}");
        assert_eq!(guest.report(), 1 << slot);
        assert_eq!((guest.report(), guest.report()), (0, 0));
        assert!(guest.handle.is_plugged(slot));
        assert_eq!(bus.occupied(), [0, slot]);
        guest.handle.unplug(slot).unwrap();
        assert_eq!((guest.report(), guest.report()), (0, 1 << slot));
        guest.report();
        assert!(!guest.handle.is_plugged(slot));
        assert_eq!(bus.occupied(), before);
        // The main loop lets go of the device a little later.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let mut reserved = guest.handle.reserve_pci_slot().unwrap();
        while reserved.number() != slot && std::time::Instant::now() < deadline {
            drop(reserved);
            std::thread::yield_now();
            reserved = guest.handle.reserve_pci_slot().unwrap();
        }
        assert_eq!(
            *files.get_or_insert_with(open_files),
            open_files(),
            "{round}"
        );
    }
    // A guest that restarts has let go what was asked back, and keeps the rest.
    let slot = plug(&guest.handle, file.path());
    guest.handle.pause().unwrap();
    guest.handle.unplug(slot).unwrap();
    guest.handle.reset().unwrap();
    guest.handle.resume().unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while guest.handle.is_plugged(slot) && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert!(!guest.handle.is_plugged(slot));
    guest.power_off();
}
