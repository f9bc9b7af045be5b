//! Guests that share what is in their memory with further mappings of it, before all of a template
//! is there.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::channel;

use devices::dma::{MissingPages, ViewToken};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory};
use vmm::VmHandle;
use vmm::memory::Userfault;

use crate::writer::{Writing, all_of};
use crate::{
    LIMIT, MEMORY, PAGES, check, clone_with, own_blocks, saved, template_on_demand, writer,
};

/// A second mapping of the guest's own file, as a private view is one.
struct View {
    mapping: vm_memory::MmapRegion<()>,
    _token: ViewToken,
}

impl View {
    fn of(handle: &VmHandle) -> Self {
        Self::with(handle, &missing_pages(handle))
    }

    /// Of which `missing` is told.
    fn with(handle: &VmHandle, missing: &Arc<dyn MissingPages>) -> Self {
        let memory = handle.ram().memory();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().clone();
        let (read, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        let mapping =
            vm_memory::MmapRegion::build(Some(file), MEMORY as usize, read, private).unwrap();
        let start = mapping.as_ptr() as u64;
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

fn missing_pages(handle: &VmHandle) -> Arc<dyn MissingPages> {
    let memory = handle.ram().memory();
    let region = memory.iter().next().unwrap();
    region.get_mmap().bitmap().missing_pages().unwrap()
}

/// Whether this process may have what these tests need.
pub fn can_share() -> bool {
    let opened = Userfault::open();
    if let Err(error) = &opened {
        skipped::skip(module_path!(), &format!("no userfaultfd: {error}"));
    }
    opened.is_ok()
}

/// Bytes that the guest's own file takes.
pub fn own_bytes(guest: &Writing) -> u64 {
    own_blocks(guest) * 512
}

#[test]
fn a_guest_whose_memory_is_shared_in_its_process_costs_what_it_touches() {
    if !can_share() {
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
    if !can_share() {
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
    if !can_share() {
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
    if !can_share() {
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
fn a_view_that_comes_when_pages_come_no_more_keeps_nobody_waiting() {
    if !can_share() {
        return;
    }
    let saved = saved(1);
    for is_reset in [false, true] {
        // The descriptor stays open: nobody is let go by its end.
        let source = template_on_demand(&saved);
        let clone = clone_with(&saved, source.clone(), 1);
        let handle = clone.handle();
        handle.share_memory().unwrap();
        // As somebody does who asks just before the guest gets memory of its own.
        let missing = missing_pages(handle);
        match is_reset {
            false => handle.own_memory().unwrap(),
            true => handle.reset().unwrap(),
        }
        let view = View::with(handle, &missing);
        let (say, said) = channel();
        // Zero in the file, and in nobody's memory yet.
        std::thread::spawn(move || say.send(view.byte(MEMORY - 1)));
        let byte = said.recv_timeout(LIMIT).expect("who looks waits");
        assert_eq!(byte, 0);
        if is_reset {
            clone.guest.report();
        }
        clone.guest.power_off();
    }
}

#[test]
fn a_reset_while_all_of_the_shared_memory_is_brought_leaves_zeros() {
    if !can_share() {
        return;
    }
    let saved = saved(1);
    for _ in 0..4 {
        let clone = clone_with(&saved, template_on_demand(&saved), 1);
        let handle = clone.handle();
        handle.share_memory().unwrap();
        std::thread::scope(|scope| {
            let owned = scope.spawn(|| handle.own_memory());
            handle.reset().unwrap();
            owned.join().unwrap().unwrap();
        });
        clone.guest.report();
        assert!(!handle.ram().is_template());
        let memory = all_of(handle);
        let area = clone.areas[0].start as usize;
        let pages = PAGES as usize * 4096;
        assert!(memory[area..area + pages].iter().all(|&byte| byte == 0));
        clone.guest.power_off();
    }
}

#[test]
fn a_first_mark_while_memory_is_shared_finds_no_page_missing() {
    if !can_share() {
        return;
    }
    let saved = saved(1);
    for round in 0..4 {
        let clone = clone_with(&saved, template_on_demand(&saved), 1);
        let handle = clone.handle();
        clone.wait(30);
        std::thread::scope(|scope| {
            let marked = scope.spawn(|| handle.mark("a", LIMIT).map(|_| ()));
            // At another moment of the mark each time.
            (0..round * 20).for_each(|_| std::thread::yield_now());
            handle.share_memory().unwrap();
            marked.join().unwrap().unwrap();
        });
        // Neither in the guest's areas nor written by it: those are looked at by `check`.
        let look = || {
            let all = all_of(handle);
            let same = |at: usize| all[at..at + 4096] == saved.memory[at..at + 4096];
            let area = clone.areas[0].start as usize;
            (0..area).step_by(4096).filter(|&at| !same(at)).count()
        };
        handle.quiesce(LIMIT, |_| assert!(look() < 32)).unwrap();
        check(&clone);
        handle.rewind(Some("a"), LIMIT).unwrap();
        handle.quiesce(LIMIT, |_| assert!(look() < 32)).unwrap();
        check(&clone);
        clone.guest.power_off();
    }
}
