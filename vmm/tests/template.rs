//! Guests whose memory begins as a file's bytes: what they share, what becomes theirs, and what a
//! reset leaves.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "template/quiet.rs"]
mod quiet;
#[path = "template/shared.rs"]
mod shared;
mod writer;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::time::Duration;

use devices::dma::DmaSpace;
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::{GuestRam, MemoryError, MemorySource, Userfault};
use vmm::{DeviceStates, MachineState};
use writer::{Writing, all_of, writer};

const LIMIT: Duration = Duration::from_secs(20);
const MEMORY: u64 = 16 << 20;
const PAGES: u64 = 256;

struct Saved {
    file: Arc<File>,
    memory: Vec<u8>,
    state: MachineState,
    devices: DeviceStates,
}

/// A guest with `vcpus` vCPUs in the middle of its work, and what is in the file besides.
fn saved(vcpus: u8) -> Saved {
    saved_with(vcpus, |_| {})
}

/// The same, with what `fill` writes besides.
fn saved_with(vcpus: u8, fill: impl FnOnce(&devices::dma::GuestMemory)) -> Saved {
    let original = writer(MEMORY, MemorySource::Fresh, vcpus, PAGES).start();
    original.wait(300);
    let handle = original.handle();
    let written = GuestAddress(writer::CODE_END);
    let memory = handle.ram().memory();
    memory.write_slice(&[0x5a; 4096], written).unwrap();
    fill(memory);
    let (memory, state, devices) = handle
        .quiesce(LIMIT, |quiesced| {
            original.check(quiesced);
            let state = quiesced.save().unwrap();
            (all_of(handle), state, quiesced.save_devices().unwrap())
        })
        .unwrap();
    original.guest.power_off();
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY).unwrap();
    for (page, bytes) in memory.chunks(4096).enumerate() {
        if bytes.iter().any(|&byte| byte != 0) {
            file.write_all_at(bytes, page as u64 * 4096).unwrap();
        }
    }
    Saved {
        file: Arc::new(file),
        memory,
        state,
        devices,
    }
}

fn template(saved: &Saved) -> MemorySource {
    MemorySource::Template {
        file: saved.file.clone(),
        userfault: None,
    }
}

/// The same, for guests whose memory others may see before all of it is there.
fn template_on_demand(saved: &Saved) -> MemorySource {
    MemorySource::Template {
        file: saved.file.clone(),
        userfault: Some(Arc::new(Userfault::open().unwrap())),
    }
}

fn clone_of(saved: &Saved, vcpus: u8) -> Writing {
    clone_with(saved, template(saved), vcpus)
}

fn clone_with(saved: &Saved, source: MemorySource, vcpus: u8) -> Writing {
    let mut clone = writer(MEMORY, source, vcpus, PAGES);
    clone.guest.vm.restore(&saved.state).unwrap();
    clone.guest.vm.restore_devices(&saved.devices).unwrap();
    clone.go_on()
}

fn check(guest: &Writing) {
    guest
        .handle()
        .quiesce(LIMIT, |quiesced| guest.check(quiesced))
        .unwrap();
}

fn own_blocks(guest: &Writing) -> u64 {
    guest.handle().ram().memfd().metadata().unwrap().blocks()
}

#[test]
fn clones_go_on_from_the_same_file_and_leave_it_as_it_is() {
    let saved = saved(2);
    let clones: Vec<_> = (0..3).map(|_| clone_of(&saved, 2)).collect();
    for clone in &clones {
        clone.wait(300);
        assert!(clone.handle().ram().is_template());
        check(clone);
        assert_eq!(own_blocks(clone), 0);
        // Nobody may map a file that the bytes are not in.
        let dma: DmaSpace = clone.handle().dma_space();
        assert!(dma.regions().is_empty());
    }
    let mut now = vec![0; MEMORY as usize];
    saved.file.read_exact_at(&mut now, 0).unwrap();
    assert!(now == saved.memory, "the file changed");
    for clone in clones {
        clone.guest.power_off();
    }
}

#[test]
fn what_may_be_other_than_zero_is_found_in_the_file_and_in_what_was_written() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY).unwrap();
    file.write_all_at(&[1; 4096], 0x10_0000).unwrap();
    let source = MemorySource::Template {
        file: Arc::new(file),
        userfault: None,
    };
    let ram = GuestRam::from(source, MEMORY).unwrap();
    let write = |at| ram.memory().write_obj(2u8, GuestAddress(at)).unwrap();
    write(0x10_1000);
    write(0x80_0000);
    let _: u8 = ram.memory().read_obj(GuestAddress(0x20_0000)).unwrap();
    let found = ram.populated();
    let has = |page: u64| found.iter().any(|range| range.contains(&(page * 4096)));
    assert!(has(0x100) && has(0x101) && has(0x800));
    assert!(!has(0x200) && !has(0x300), "{found:x?}");
    assert!(found.is_sorted_by(|one, next| one.end < next.start));
}

#[test]
fn a_file_that_is_too_short_is_refused() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY - 1).unwrap();
    let source = MemorySource::Template {
        file: Arc::new(file),
        userfault: None,
    };
    let error = GuestRam::from(source, MEMORY).unwrap_err();
    assert!(matches!(error, MemoryError::TemplateSize { .. }), "{error}");
}

#[test]
fn a_guest_gets_memory_of_its_own_while_it_runs() {
    let saved = saved(3);
    for _ in 0..4 {
        let clone = clone_of(&saved, 3);
        let handle = clone.handle();
        // Pages that were not zero in the file and are now.
        let zero = GuestAddress(writer::CODE_END);
        let memory = handle.ram().memory();
        memory.write_slice(&[0; 4096], zero).unwrap();
        clone.wait(50);
        // One of two is too late, which is no error.
        std::thread::scope(|scope| {
            let owner = || handle.own_memory().unwrap();
            let (first, second) = (scope.spawn(owner), scope.spawn(owner));
            first.join().unwrap();
            second.join().unwrap();
        });
        assert!(!handle.ram().is_template());
        clone.wait(300);
        handle
            .quiesce(LIMIT, |quiesced| {
                clone.check(quiesced);
                let mapped = all_of(handle);
                let mut in_file = vec![0; MEMORY as usize];
                let own = handle.ram().memfd();
                own.read_exact_at(&mut in_file, 0).unwrap();
                assert!(
                    mapped == in_file,
                    "others that map the file see something else"
                );
            })
            .unwrap();
        assert_eq!(handle.dma_space().regions().len(), 1);
        clone.guest.power_off();
    }
    let mut now = vec![0; MEMORY as usize];
    saved.file.read_exact_at(&mut now, 0).unwrap();
    assert!(now == saved.memory, "the file changed");
}

#[test]
fn a_reset_leaves_zeros_and_not_the_file() {
    let saved = saved(1);
    let clone = clone_of(&saved, 1);
    let handle = clone.handle();
    clone.wait(50);
    handle.reset().unwrap();
    // Loaded anew, it reports again.
    clone.guest.report();
    assert!(!handle.ram().is_template());
    let memory = all_of(handle);
    let area = clone.areas[0].start as usize;
    let pages = PAGES as usize * 4096;
    assert!(saved.memory[area..area + pages] != vec![0; pages]);
    assert!(memory[area..area + pages].iter().all(|&byte| byte == 0));
    clone.begin();
    clone.wait(300);
    check(&clone);
    clone.guest.power_off();
}

#[test]
fn changes_of_a_guest_with_a_template_are_told_before_and_after_it_owns_its_memory() {
    let saved = saved(2);
    let clone = clone_of(&saved, 2);
    let handle = clone.handle();
    handle.track_changes(LIMIT).unwrap();
    let look = || writer::look(handle);
    let (mut before, _) = look();
    for round in 0..6 {
        if round == 3 {
            handle.own_memory().unwrap();
        }
        clone.wait(30);
        let (after, changed) = look();
        let told = |page: &u32| changed.pages().contains(page);
        assert!(writer::differing(&before, &after).iter().all(told));
        assert!(changed.pages().len() < 600, "copying is no change");
        before = after;
    }
    clone.guest.power_off();
}

#[test]
fn marks_of_a_guest_with_a_template_are_valid_when_it_owns_its_memory() {
    let saved = saved(2);
    let clone = clone_of(&saved, 2);
    let handle = clone.handle();
    clone.wait(30);
    handle.pause().unwrap();
    handle.mark("a", LIMIT).unwrap();
    let then = all_of(handle);
    handle.resume().unwrap();
    for round in 0..6 {
        clone.wait(100);
        if round == 3 {
            handle.own_memory().unwrap();
        }
        handle.pause().unwrap();
        handle.rewind(Some("a"), LIMIT).unwrap();
        assert!(writer::differing(&then, &all_of(handle)).is_empty());
        handle.resume().unwrap();
        check(&clone);
    }
    clone.guest.power_off();
}

#[test]
fn what_was_touched_of_a_template_is_told_and_fetching_it_ahead_changes_nothing() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY).unwrap();
    // Apart by more than the kernel maps with a page that is touched.
    let pages = [1u64, 5, 9].map(|number| number << 20);
    for page in pages {
        file.write_all_at(&[0x5a; 8192], page).unwrap();
    }
    let file = Arc::new(file);
    let ram = || {
        let source = MemorySource::Template {
            file: file.clone(),
            userfault: None,
        };
        GuestRam::from(source, MEMORY).unwrap()
    };
    let first = ram();
    assert!(first.touched().unwrap().unwrap().is_empty());
    let _: u8 = first.memory().read_obj(GuestAddress(pages[0])).unwrap();
    first
        .memory()
        .write_obj(1u8, GuestAddress(pages[2] + 4096))
        .unwrap();
    // Of what is a hole in the file nothing is to be fetched.
    first
        .memory()
        .write_obj(1u8, GuestAddress(12 << 20))
        .unwrap();
    let touched = first.touched().unwrap().unwrap();
    let has = |at: u64| touched.iter().any(|range| range.contains(&at));
    assert!(has(pages[0]) && has(pages[2] + 4096), "{touched:x?}");
    assert!(!has(pages[1]) && !has(12 << 20), "{touched:x?}");
    let second = ram();
    // Beyond the memory, as a file may say that is wrong, there is nothing.
    let beyond = MEMORY - 4096..MEMORY + 8192;
    second.fetch_ahead(&[touched.clone(), vec![beyond]].concat());
    let fetched = second.touched().unwrap().unwrap();
    assert!(touched.iter().all(|range| {
        fetched
            .iter()
            .any(|other| other.contains(&range.start) && range.end <= other.end)
    }));
    let byte: u8 = second
        .memory()
        .read_obj(GuestAddress(pages[2] + 4096))
        .unwrap();
    assert_eq!(byte, 0x5a);
    // Memory of its own is not the template's, and nothing of it is fetched.
    second.clear().unwrap();
    second.fetch_ahead(&touched);
    assert!(second.touched().unwrap().is_none());
    assert_eq!(
        std::os::unix::fs::MetadataExt::blocks(&second.memfd().metadata().unwrap()),
        0
    );
}
