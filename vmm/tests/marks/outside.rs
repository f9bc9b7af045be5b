//! Somebody outside who writes guest memory: through a mapping of their own, of which no log tells.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm::memory::MemorySource;
use vmm::{MarkError, Others, Outside, RewindError, VmHandle, VmState};

use super::LIMIT;
use super::whole::{mark, rewind};
use super::writer::writer;

/// Pages that the guest does not write.
const PAGES: std::ops::Range<u64> = 0x300..0x340;

#[derive(Debug, Default)]
struct Device {
    still: Arc<AtomicUsize>,
    times: AtomicUsize,
    refuses: AtomicBool,
}

#[derive(Debug)]
struct Still(Arc<AtomicUsize>);

impl Others for Still {
    fn stay(self: Box<Self>) {}
}

impl Drop for Still {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Outside for Device {
    fn writes(&self) -> bool {
        true
    }

    fn stand_still(&self) -> Result<Option<Box<dyn Others>>, String> {
        if self.refuses.load(Ordering::SeqCst) {
            return Err("it goes on".to_owned());
        }
        self.still.fetch_add(1, Ordering::SeqCst);
        self.times.fetch_add(1, Ordering::SeqCst);
        Ok(Some(Box::new(Still(self.still.clone()))))
    }
}

/// The file of guest memory.
fn file(handle: &VmHandle) -> File {
    let region = handle.ram().memory().iter().next().unwrap();
    region.file_offset().unwrap().file().try_clone().unwrap()
}

/// Writes `byte` to some of the pages, which depend on it, behind everybody's back.
fn write(file: &File, byte: u8) {
    for page in PAGES.filter(|page| page % 7 == u64::from(byte) % 7) {
        file.write_all_at(&[byte; 4096], page * 4096).unwrap();
    }
}

#[test]
fn what_somebody_outside_has_written_is_put_back_too() {
    let writing = writer(4 << 20, MemorySource::Fresh, 2, 64).start();
    writing.wait(50);
    let handle = writing.handle();
    let device = Arc::new(Device::default());
    handle.set_outside(device.clone());
    let file = file(handle);
    write(&file, 1);
    let mut marks = Vec::new();
    for byte in 2..6 {
        marks.push((format!("m{byte}"), mark(&writing, &format!("m{byte}"))));
        write(&file, byte);
        writing.wait(5);
    }
    for round in 0..40 {
        let (name, then) = &marks[round * 7 % 4];
        rewind(&writing, name, then);
        write(&file, 10 + round as u8);
        writing.wait(3);
    }
    // What is not followed any more was: only the last mark goes.
    handle.forget_mark("m5").unwrap();
    write(&file, 1);
    for (name, then) in &marks[..3] {
        rewind(&writing, name, then);
    }
    let counts = [&device.times, &device.still].map(|count| count.load(Ordering::SeqCst));
    assert_eq!(counts, [4 + 40 + 3, 0]);
    writing.guest.power_off();
}

#[test]
fn where_it_does_not_stand_still_nothing_is_marked_or_changed() {
    let writing = writer(4 << 20, MemorySource::Fresh, 1, 64).start();
    let handle = writing.handle();
    let device = Arc::new(Device::default());
    handle.set_outside(device.clone());
    device.refuses.store(true, Ordering::SeqCst);
    let refused =
        |error: &MarkError| matches!(error, MarkError::Others(why) if why == "it goes on");
    assert!(refused(&handle.mark("a", LIMIT).unwrap_err()));
    assert!(handle.marks().is_empty());
    device.refuses.store(false, Ordering::SeqCst);
    let then = mark(&writing, "a");
    device.refuses.store(true, Ordering::SeqCst);
    assert!(refused(&handle.mark("b", LIMIT).unwrap_err()));
    match handle.rewind(Some("a"), LIMIT).unwrap_err() {
        RewindError::Refused(error) => assert!(refused(&error)),
        RewindError::HalfWay { .. } => panic!("something was changed"),
    }
    assert_eq!(handle.state(), VmState::Running);
    writing.wait(5);
    device.refuses.store(false, Ordering::SeqCst);
    rewind(&writing, "a", &then);
    assert_eq!(device.still.load(Ordering::SeqCst), 0);
    writing.guest.power_off();
}
