//! Random histories of virtio functions: at any point of one, a twin that was restored from the
//! stored state goes on as the original does.

use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use super::VirtioDevice;
use super::blk::{Block, Disk};
use super::net::Net;
use super::net::tests::CableEnd;
use super::testing::{Driver, EVENT_IDX, MEMORY_BYTES};
use crate::pci::PciFunction;
use crate::state::tests::Random;

/// A device with what is behind it.
trait Subject {
    type Device: VirtioDevice + 'static;
    /// A request for `queue`: what the device reads and how much it may write.
    fn request(&self, queue: usize, random: &mut Random) -> (Vec<Vec<u8>>, Vec<usize>);
    /// Something happens behind the device.
    fn behind(&self, random: &mut Random);
    /// What could be seen behind the device since this was last asked.
    fn seen(&self) -> Vec<u8>;
}

struct Run<'a, S: Subject> {
    driver: Driver<S::Device>,
    subject: &'a S,
    seen: Vec<u8>,
}

impl<S: Subject> Run<'_, S> {
    /// One thing happens; the same things for the same random numbers.
    fn step(&mut self, random: &mut Random) {
        let driver = &mut self.driver;
        let queue = random.below(driver.queue_count() as u64) as usize;
        match random.below(16) {
            0..=5 => {
                let (out, into) = self.subject.request(queue, random);
                let kick = random.below(4) != 0;
                if driver.outstanding(queue) < 4 {
                    let out: Vec<&[u8]> = out.iter().map(Vec::as_slice).collect();
                    driver.post(queue, &out, &into);
                }
                if kick {
                    driver.kick(queue);
                }
            }
            6 | 7 => self.subject.behind(random),
            8 | 9 => driver.run_events(),
            10 => {
                // A vector is masked or not, and where its message goes.
                let vector = random.below(driver.queue_count() as u64 + 1);
                let dword = random.below(4);
                let value = random.below(4) << (4 * dword);
                driver.write(0x4000 + 16 * vector + 4 * dword, 4, value);
            }
            11 => {
                let at = driver.capability(0x11);
                let control = [0x8000u16, 0x8000, 0xc000, 0x0000][random.below(4) as usize];
                driver
                    .function()
                    .config_write(at + 2, &control.to_le_bytes());
            }
            12 => {
                // Bus mastering, interrupts by the pin.
                let command = 0x0002 | random.below(2) << 2 | random.below(2) << 10;
                driver
                    .function()
                    .config_write(4, &(command as u16).to_le_bytes());
            }
            13 => {
                driver.write(0x16, 2, queue as u64);
                driver.write(0x1a, 2, random.below(8));
                driver.write(0x10, 2, random.below(4));
            }
            14 if random.below(4) == 0 => {
                driver.set_bus_master(true);
                driver.reuse_buffers();
                driver.start(if random.below(2) == 0 { EVENT_IDX } else { 0 });
            }
            _ => {
                let at = [0x00, 0x14, 0x1000, 0x2000, 0x2008, 0x5000][random.below(6) as usize];
                let value = driver.read(at, 4);
                self.seen.extend(value.to_le_bytes());
            }
        }
        self.look();
    }

    /// Notes what a driver sees.
    fn look(&mut self) {
        let driver = &mut self.driver;
        let line = *driver.line.asserted.lock().unwrap();
        self.seen.push(u8::from(line));
        for vector in driver.vectors.take_triggered() {
            self.seen.extend(vector.to_le_bytes());
        }
        for queue in 0..driver.queue_count() {
            for used in driver.used(queue) {
                self.seen.extend(used.head.to_le_bytes());
                self.seen.extend(used.data);
            }
        }
        self.seen.extend(self.subject.seen());
    }

    /// Lets everything happen that can: with notifications, or only what the device does by itself.
    fn settle(&mut self, notified: bool) {
        for _ in 0..4 {
            for queue in 0..self.driver.queue_count() {
                if notified {
                    self.driver.kick(queue);
                }
            }
            self.driver.run_events();
        }
        self.look();
    }

    /// Puts requests into the queues that nobody is notified about.
    fn ask_silently(&mut self, random: &mut Random) -> u16 {
        let mut asked = 0;
        for queue in 0..self.driver.queue_count() {
            while self.driver.outstanding(queue) < 4 {
                let (out, into) = self.subject.request(queue, random);
                let out: Vec<&[u8]> = out.iter().map(Vec::as_slice).collect();
                self.driver.post(queue, &out, &into);
                asked += 1;
            }
        }
        asked
    }

    fn memory(&self) -> Vec<u8> {
        let mut all = vec![0; MEMORY_BYTES];
        let memory = &self.driver.memory;
        memory.read_slice(&mut all, GuestAddress(0)).unwrap();
        all
    }
}

/// Runs histories of `make`'s subjects; `twin` makes another as one is now.
fn histories<S: Subject>(make: impl Fn() -> (S, S::Device), twin: impl Fn(&S) -> (S, S::Device)) {
    let mut asked = 0;
    for seed in 1..=60u64 {
        let mut random = Random(seed << 32);
        let (subject, device) = make();
        let mut driver = Driver::new(device);
        driver.enable_msix();
        driver.start(if seed % 2 == 0 { EVENT_IDX } else { 0 });
        let mut original = Run {
            driver,
            subject: &subject,
            seen: Vec::new(),
        };
        for _ in 0..100 + random.below(100) {
            original.step(&mut random);
        }
        asked += u32::from(original.ask_silently(&mut random));
        let (other, device) = twin(&subject);
        let mut restored = Run {
            driver: original.driver.twin(device),
            subject: &other,
            seen: Vec::new(),
        };
        // What was asked for and not done: the original is notified, the twin looks by itself.
        original.settle(true);
        restored.settle(false);
        (original.seen, restored.seen) = (Vec::new(), Vec::new());
        let state = |run: &Run<'_, S>| run.driver.function().save().unwrap();
        assert_eq!(state(&original), state(&restored), "seed {seed}");
        for step in 0..150 {
            let mut same = Random(random.0);
            original.step(&mut random);
            restored.step(&mut same);
            assert!(
                original.seen == restored.seen,
                "seed {seed}, step {step}: {:?} {:?}",
                original.seen,
                restored.seen
            );
        }
        assert_eq!(state(&original), state(&restored), "seed {seed}");
        assert!(original.memory() == restored.memory(), "seed {seed}");
        assert!(original.seen.len() > 200, "something happened");
    }
    assert!(asked > 60, "{asked} requests were under way");
}

impl Subject for CableEnd {
    type Device = Net;

    fn request(&self, queue: usize, random: &mut Random) -> (Vec<Vec<u8>>, Vec<usize>) {
        let bytes = 60 + random.below(1000) as usize;
        match queue {
            0 => (Vec::new(), vec![12 + bytes]),
            _ => {
                let mut header = vec![0; 12];
                header[1] = u8::from(random.below(8) == 0);
                (vec![header, vec![random.next() as u8; bytes]], Vec::new())
            }
        }
    }

    fn behind(&self, random: &mut Random) {
        match random.below(8) {
            0 => self.set_carrier(random.below(2) == 0),
            1 => self.set_room(random.below(20) as usize),
            2 => self.set_room(usize::MAX),
            _ => {
                let length = 20 + random.below(600) as usize;
                self.arrive(vec![random.next() as u8; length]);
            }
        }
    }

    fn seen(&self) -> Vec<u8> {
        self.sent().concat()
    }
}

#[test]
fn a_restored_network_card_behaves_as_the_original() {
    let card = |cable: &CableEnd| Net::new([2, 0, 0, 0, 0, 1], Box::new(cable.clone()));
    histories(
        || {
            let cable = CableEnd::new();
            let device = card(&cable);
            (cable, device)
        },
        |cable| {
            let twin = cable.twin();
            let device = card(&twin);
            (twin, device)
        },
    );
}

struct Image(tempfile::TempDir);

const SECTORS: u64 = 64;

impl Image {
    fn path(&self) -> std::path::PathBuf {
        self.0.path().join("disk.img")
    }

    fn of(content: &[u8]) -> (Self, Block) {
        let image = Self(tempfile::tempdir().unwrap());
        std::fs::write(image.path(), content).unwrap();
        let device = Self::block(&image.path());
        (image, device)
    }

    fn block(path: &Path) -> Block {
        Block::new(Disk::open(path, false).unwrap(), "histories")
    }
}

impl Subject for Image {
    type Device = Block;

    fn request(&self, _: usize, random: &mut Random) -> (Vec<Vec<u8>>, Vec<usize>) {
        // Reads, writes, flushes, identity, discards, zeroes, and what is none of them.
        let kind = [0u32, 0, 1, 1, 4, 8, 13, 99][random.below(8) as usize];
        let sector = random.below(SECTORS + 1);
        let bytes = 512 * random.below(4) as usize;
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        match kind {
            1 => (vec![header, vec![random.next() as u8; bytes]], vec![1]),
            13 => {
                let range = [
                    &sector.to_le_bytes()[..],
                    &(random.below(4) as u32).to_le_bytes(),
                    &[0; 4],
                ];
                (vec![header, range.concat()], vec![1])
            }
            _ => (vec![header], vec![bytes, 1]),
        }
    }

    fn behind(&self, _: &mut Random) {}

    fn seen(&self) -> Vec<u8> {
        let content = std::fs::read(self.path()).unwrap();
        crc32fast::hash(&content).to_le_bytes().to_vec()
    }
}

#[test]
fn a_restored_disk_behaves_as_the_original() {
    histories(
        || Image::of(&vec![0xa5; SECTORS as usize * 512]),
        |image| Image::of(&std::fs::read(image.path()).unwrap()),
    );
}

/// A console that no client comes to.
struct Lonely;

impl Subject for Lonely {
    type Device = super::console::Console;

    fn request(&self, queue: usize, random: &mut Random) -> (Vec<Vec<u8>>, Vec<usize>) {
        match queue {
            3 => {
                let event = random.below(8) as u16;
                let message = [
                    &(random.below(2) as u32).to_le_bytes()[..],
                    &event.to_le_bytes(),
                    &(random.below(2) as u16).to_le_bytes(),
                ];
                (vec![message.concat()], Vec::new())
            }
            1 | 5 => (vec![vec![7; 30]], Vec::new()),
            _ => (Vec::new(), vec![64]),
        }
    }

    fn behind(&self, _: &mut Random) {}

    fn seen(&self) -> Vec<u8> {
        Vec::new()
    }
}

#[test]
fn a_restored_console_behaves_as_the_original() {
    let make = || (Lonely, super::console::tests::console());
    histories(make, |_| make());
}
