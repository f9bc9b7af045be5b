#![allow(clippy::unwrap_used, reason = "test code")]

use std::fs::File;

use devices::bus::Bus;

use super::*;
use crate::{kvm, layout};

const PAGE: u64 = 4096;
const AT: u64 = layout::PCI_MEMORY32.0;

fn slots() -> Arc<BarSlots> {
    let pci = PciBus::new(Arc::new(Bus::new()), Arc::new(Bus::new()));
    let vm = kvm::create_empty_vm(&kvm::open().unwrap()).unwrap();
    let windows = Windows {
        io: layout::PCI_IO,
        memory32: layout::PCI_MEMORY32,
        memory64: (1 << 36, 1 << 37),
    };
    BarSlots::of(&pci, Arc::new(vm), windows)
}

fn file() -> Arc<File> {
    let fd = rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(PAGE).unwrap();
    Arc::new(file)
}

fn area_of(memory: BarMemory) -> Arc<BarArea> {
    BarArea::new(0, 0, memory).unwrap()
}

fn in_file(file: &Arc<File>) -> Arc<BarArea> {
    area_of(BarMemory::of_file(file.clone(), 0, PAGE as usize).unwrap())
}

/// A page of a device that every host has.
fn of_device() -> Arc<BarArea> {
    let mut options = File::options();
    let zero = options.read(true).write(true).open("/dev/zero").unwrap();
    area_of(BarMemory::of_device(&zero, 0, PAGE as usize).unwrap())
}

/// The areas at pages from [`AT`] on.
fn put(slots: &BarSlots, areas: &[&Arc<BarArea>]) {
    for (page, area) in areas.iter().enumerate() {
        let address = AT + page as u64 * PAGE;
        area.put(address, slots);
        assert_eq!(area.address(), Some(address));
    }
}

fn places<const N: usize>(areas: [&Arc<BarArea>; N]) -> [bool; N] {
    areas.map(|area| area.address().is_some())
}

#[test]
fn every_processor_that_came_to_a_cut_file_goes_on() {
    let slots = slots();
    let (cut, whole) = (file(), file());
    let (lost, kept) = (in_file(&cut), in_file(&whole));
    put(&slots, &[&lost, &kept]);
    let before = slots.gone();
    cut.set_len(0).unwrap();
    // Three were in the guest; the first finds the reason.
    for _ in 0..3 {
        assert!(slots.withdraw_what_is_lost(before, None));
        assert_eq!(places([&lost, &kept]), [false, true]);
    }
    // One that enters now and fails again has another reason.
    assert!(slots.withdraw_what_is_lost(slots.gone(), None));
    assert_eq!(places([&lost, &kept]), [false, false]);
    assert!(!slots.withdraw_what_is_lost(slots.gone(), None));
}

#[test]
fn an_area_that_goes_or_is_moved_meanwhile_is_tried_again() {
    let slots = slots();
    let (moved, kept) = (in_file(&file()), in_file(&file()));
    put(&slots, &[&moved, &kept]);
    let before = slots.gone();
    moved.put(AT + 4 * PAGE, &*slots);
    assert!(slots.withdraw_what_is_lost(before, None));
    assert_eq!(places([&moved, &kept]), [true, true]);
    let before = slots.gone();
    drop(moved);
    assert!(slots.withdraw_what_is_lost(before, None));
    // The area is dropped already, its slot not yet.
    let dropped = in_file(&file());
    let slot = slots.put(&dropped, AT).unwrap();
    drop(dropped);
    let before = slots.gone();
    assert!(slots.withdraw_what_is_lost(before, None));
    assert!(slots.withdraw_what_is_lost(before, Some(AT)));
    drop(slot);
    assert!(slots.withdraw_what_is_lost(before, None));
    assert_eq!(places([&kept]), [true]);
    assert!(!slots.withdraw_what_is_lost(slots.gone(), Some(AT)));
}

#[test]
fn areas_of_devices_go_last_and_only_the_one_that_is_named() {
    let slots = slots();
    let cut = file();
    let areas = [in_file(&cut), in_file(&file()), of_device(), of_device()];
    let all = || places(areas.each_ref());
    let lost = |address| slots.withdraw_what_is_lost(slots.gone(), address);
    put(&slots, &areas.each_ref());
    // The guest's memory, and behind the areas: none of them is the reason.
    assert!(!lost(Some(0x1000)));
    assert!(!lost(Some(AT + 4 * PAGE)));
    assert!(!lost(Some(AT - 1)));
    assert_eq!(all(), [true; 4]);
    cut.set_len(0).unwrap();
    assert!(lost(Some(AT + 3 * PAGE + 8)));
    assert_eq!(all(), [true, true, true, false]);
    assert!(lost(None));
    assert_eq!(all(), [false, true, true, false]);
    assert!(lost(None));
    assert_eq!(all(), [false, false, true, false]);
    assert!(lost(None));
    assert_eq!(all(), [false; 4]);
    assert!(!lost(None));
}

#[test]
fn a_slot_that_cannot_be_taken_away_is_not_tried_for_ever() {
    let slots = slots();
    let (stays, other) = (in_file(&file()), in_file(&file()));
    put(&slots, &[&stays, &other]);
    // It is gone behind the table's back, so that KVM refuses to take it away.
    let one = Used {
        address: AT,
        len: PAGE,
        area: Weak::new(),
        stays: false,
    };
    slots.set(0, &one, 0, 0).unwrap();
    let lost = |address| slots.withdraw_what_is_lost(slots.gone(), address);
    assert!(!lost(Some(AT)), "nothing has changed");
    assert!(!lost(Some(AT)));
    // It hides no other.
    assert!(lost(None));
    assert_eq!(places([&other]), [false]);
    drop(stays);
    assert!(!lost(None));
}
