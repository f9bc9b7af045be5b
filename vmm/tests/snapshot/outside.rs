//! A machine that goes back to a snapshot of it while somebody outside writes its memory, of which
//! no log tells.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm::snapshot::{Chain, GoBackError};
use vmm::{Others, Outside, VmState};

use super::LIMIT;
use super::common::{MEMORY, Running};
use super::counting::{count_on, guest, snapshot};

/// Pages that the guest does not touch, some of which are zero when it is saved.
const PAGES: std::ops::Range<u64> = MEMORY / 4096 - 40..MEMORY / 4096 - 8;

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

/// Writes `byte` to some of the pages, which depend on it, by a mapping that is not the machine's.
fn write(file: &File, byte: u8) {
    for page in PAGES.filter(|page| page % 5 == u64::from(byte) % 5) {
        file.write_all_at(&[byte; 4096], page * 4096).unwrap();
    }
}

fn pages(guest: &Running) -> Vec<u8> {
    let mut bytes = vec![0; ((PAGES.end - PAGES.start) * 4096) as usize];
    let memory = guest.handle.ram().memory();
    memory
        .read_slice(&mut bytes, GuestAddress(PAGES.start * 4096))
        .unwrap();
    bytes
}

#[test]
fn what_somebody_outside_has_written_since_a_snapshot_goes_back_with_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("full");
    let guest = guest().start();
    let device = Arc::new(Device::default());
    guest.handle.set_outside(device.clone());
    let region = guest.handle.ram().memory().iter().next().unwrap();
    let file = region.file_offset().unwrap().file().try_clone().unwrap();
    write(&file, 1);
    write(&file, 2);
    let then = pages(&guest);
    let mut last = guest.report();
    count_on(&guest, &mut last, 50);
    snapshot(&guest, &dir, None);
    let chain = Chain::open(&dir).unwrap();
    // What was written since, of pages that had something and of such that had not.
    for round in 0..8 {
        write(&file, 10 + round);
        assert!(pages(&guest) != then);
        guest
            .handle
            .go_back_to(&chain, LIMIT, &mut |_| true)
            .unwrap();
        assert!(pages(&guest) == then, "round {round}");
    }
    let counts = [&device.times, &device.still].map(|count| count.load(Ordering::SeqCst));
    assert_eq!(counts, [1 + 8, 0]);

    // Where it does not stand still nothing has changed.
    write(&file, 3);
    let now = pages(&guest);
    device.refuses.store(true, Ordering::SeqCst);
    let refused = guest.handle.go_back_to(&chain, LIMIT, &mut |_| true);
    assert!(
        matches!(&refused, Err(GoBackError::Others(why)) if why == "it goes on"),
        "{refused:?}"
    );
    assert!(pages(&guest) == now);
    assert_eq!(guest.handle.state(), VmState::Running);
    guest.drain();
    let mut last = guest.report();
    count_on(&guest, &mut last, 50);
    guest.power_off();
}
