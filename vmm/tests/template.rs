//! Guests whose memory begins as a file's bytes: what they share, what becomes theirs, and what a
//! reset leaves.

#![allow(clippy::unwrap_used)]

mod common;
mod writer;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::time::Duration;

use devices::dma::{DmaSpace, ViewToken};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory};
use vmm::memory::{GuestRam, MemoryError, MemorySource, Userfault};
use vmm::{DeviceStates, MachineState, VmHandle};
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
    let original = writer(MEMORY, MemorySource::Fresh, vcpus, PAGES).start();
    original.wait(300);
    let handle = original.handle();
    let written = GuestAddress(writer::CODE_END);
    let memory = handle.ram().memory();
    memory.write_slice(&[0x5a; 4096], written).unwrap();
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

/// A second mapping of the guest's own file, as a private view is one.
struct View {
    mapping: vm_memory::MmapRegion<()>,
    _token: ViewToken,
}

impl View {
    fn of(handle: &VmHandle) -> Self {
        let memory = handle.ram().memory();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().clone();
        let (read, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        let mapping =
            vm_memory::MmapRegion::build(Some(file), MEMORY as usize, read, private).unwrap();
        let start = mapping.as_ptr() as u64;
        let missing = region.get_mmap().bitmap().missing_pages().unwrap();
        Self {
            _token: missing.view(start..start + MEMORY, 0).unwrap(),
            mapping,
        }
    }

    fn byte(&self, at: u64) -> u8 {
        self.mapping
            .as_volatile_slice()
            .read_obj(at as usize)
            .unwrap()
    }
}

/// Bytes that the guest's own file takes.
fn own_bytes(guest: &Writing) -> u64 {
    own_blocks(guest) * 512
}

#[test]
fn a_guest_whose_memory_is_shared_in_its_process_costs_what_it_touches() {
    if Userfault::open().is_err() {
        skipped::skip(
            concat!(module_path!(), "::a_guest_whose_memory_is_shared"),
            "no userfaultfd",
        );
        return;
    }
    let saved = saved(2);
    for _ in 0..4 {
        let clone = clone_with(&saved, template_on_demand(&saved), 2);
        let handle = clone.handle();
        // What was not zero in the file and is now, and what was zero and is not.
        let memory = handle.ram().memory();
        memory
            .write_slice(&[0; 4096], GuestAddress(writer::CODE_END))
            .unwrap();
        memory
            .write_slice(&[7; 4096], GuestAddress(MEMORY - 4096))
            .unwrap();
        clone.wait(50);
        // One of two is too late, which is no error.
        std::thread::scope(|scope| {
            let share = || handle.share_memory().unwrap();
            let (first, second) = (scope.spawn(share), scope.spawn(share));
            first.join().unwrap();
            second.join().unwrap();
        });
        assert!(handle.ram().comes_on_demand());
        let view = View::of(handle);
        assert_eq!((view.byte(writer::CODE_END), view.byte(MEMORY - 1)), (0, 7));
        clone.wait(300);
        check(&clone);
        // Its areas, code and tables, and no more of the 16 MiB than that.
        let areas = 2 * PAGES * 4096;
        assert!(
            own_bytes(&clone) <= areas + (1 << 20),
            "{}",
            own_bytes(&clone)
        );
        // Nobody in another process may map the file.
        assert!(handle.dma_space().regions().is_empty());
        handle
            .quiesce(LIMIT, |quiesced| {
                clone.check(quiesced);
                let all = all_of(handle);
                assert!(
                    (0..MEMORY)
                        .step_by(64)
                        .all(|at| view.byte(at) == all[at as usize])
                );
                let area = clone.areas[0].start as usize;
                let (before, now) = (&saved.memory[..area], &all[..area]);
                let differ = before
                    .chunks(4096)
                    .zip(now.chunks(4096))
                    .filter(|(one, two)| one != two);
                assert!(differ.count() < 32, "what it did not write is the file's");
            })
            .unwrap();
        clone.guest.power_off();
    }
    let mut now = vec![0; MEMORY as usize];
    saved.file.read_exact_at(&mut now, 0).unwrap();
    assert!(now == saved.memory, "the file changed");
}

#[test]
fn a_guest_whose_memory_is_shared_gets_all_of_it_when_somebody_else_is_to_map_it() {
    if Userfault::open().is_err() {
        skipped::skip(
            concat!(module_path!(), "::a_guest_whose_memory_is_shared_gets"),
            "no userfaultfd",
        );
        return;
    }
    let saved = saved(2);
    let clone = clone_with(&saved, template_on_demand(&saved), 2);
    let handle = clone.handle();
    handle.share_memory().unwrap();
    clone.wait(50);
    handle.own_memory().unwrap();
    assert!(!handle.ram().is_template());
    assert_eq!(handle.dma_space().regions().len(), 1);
    clone.wait(300);
    handle
        .quiesce(LIMIT, |quiesced| {
            clone.check(quiesced);
            let mut in_file = vec![0; MEMORY as usize];
            handle.ram().memfd().read_exact_at(&mut in_file, 0).unwrap();
            assert!(all_of(handle) == in_file);
            // Neither in the guest's areas nor written by it.
            let at = writer::CODE_END as usize;
            assert!(in_file[at..at + 4096] == saved.memory[at..at + 4096]);
        })
        .unwrap();
    clone.guest.power_off();
}

#[test]
fn a_reset_of_a_guest_whose_memory_is_shared_leaves_zeros() {
    if Userfault::open().is_err() {
        skipped::skip(
            concat!(module_path!(), "::a_reset_of_a_guest"),
            "no userfaultfd",
        );
        return;
    }
    let saved = saved(1);
    // Somebody who keeps the descriptor keeps nobody waiting.
    let source = template_on_demand(&saved);
    let clone = clone_with(&saved, source.clone(), 1);
    let handle = clone.handle();
    handle.share_memory().unwrap();
    let view = View::of(handle);
    handle.reset().unwrap();
    clone.guest.report();
    assert!(!handle.ram().is_template());
    let memory = all_of(handle);
    let area = clone.areas[0].start as usize;
    let pages = PAGES as usize * 4096;
    assert!(memory[area..area + pages].iter().all(|&byte| byte == 0));
    assert_eq!(view.byte(clone.areas[0].start), 0);
    clone.begin();
    clone.wait(300);
    check(&clone);
    clone.guest.power_off();
    drop(source);
}

#[test]
fn changes_of_a_guest_whose_memory_is_shared_are_told_and_its_marks_are_valid() {
    if Userfault::open().is_err() {
        skipped::skip(
            concat!(module_path!(), "::changes_of_a_guest"),
            "no userfaultfd",
        );
        return;
    }
    let saved = saved(2);
    let clone = clone_with(&saved, template_on_demand(&saved), 2);
    let handle = clone.handle();
    handle.track_changes(LIMIT).unwrap();
    let (mut before, _) = writer::look(handle);
    for round in 0..6 {
        if round == 2 {
            handle.share_memory().unwrap();
            handle.mark("shared", LIMIT).unwrap();
        }
        if round == 4 {
            handle.own_memory().unwrap();
            handle.rewind(Some("shared"), LIMIT).unwrap();
        }
        clone.wait(30);
        let (after, changed) = writer::look(handle);
        let told = |page: &u32| changed.pages().contains(page);
        assert!(writer::differing(&before, &after).iter().all(told));
        check(&clone);
        before = after;
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
    assert!(first.touched().unwrap().is_empty());
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
    let touched = first.touched().unwrap();
    let has = |at: u64| touched.iter().any(|range| range.contains(&at));
    assert!(has(pages[0]) && has(pages[2] + 4096), "{touched:x?}");
    assert!(!has(pages[1]) && !has(12 << 20), "{touched:x?}");
    let second = ram();
    // Beyond the memory, as a file may say that is wrong, there is nothing.
    let beyond = MEMORY - 4096..MEMORY + 8192;
    second.fetch_ahead(&[touched.clone(), vec![beyond]].concat());
    let fetched = second.touched().unwrap();
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
    assert!(second.touched().unwrap().is_empty());
    assert_eq!(
        std::os::unix::fs::MetadataExt::blocks(&second.memfd().metadata().unwrap()),
        0
    );
}
