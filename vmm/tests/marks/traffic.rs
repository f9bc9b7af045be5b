//! Rewinds of a guest whose card sends and receives all the time: memory, registers, devices and
//! what is on the wire are each time those of the mark.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use devices::nic::{NicModel, NicParts};
use devices::pci::config::InterruptPin;
use devices::state::{Form, Part, StateError};
use devices::wire::{SendOutcome, Wire, WritableFd};
use vmm::VmState;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::LIMIT;
use super::common::{Guest, Running, config};
use super::nic;
use super::whole::{Whole, assert_same, whole};

/// Frames that may be on their way to the guest.
const ROOM: usize = 16;

/// Answers each frame with one that is made of it. What is on its way is its state.
struct Answering {
    frames: VecDeque<Vec<u8>>,
    readable: EventFd,
    /// Nothing comes while this is set.
    still: Arc<AtomicBool>,
    answered: Arc<Mutex<u64>>,
}

const FORM: Form = Form {
    kind: "wire that answers",
    version: 1,
};

impl Answering {
    fn signal(&self) {
        // Only ever full if it is readable.
        let _ = self.readable.write(1);
    }
}

impl Wire for Answering {
    fn send(&mut self, frame: &[u8]) -> SendOutcome {
        if self.frames.len() < ROOM {
            let mut answer = frame.to_vec();
            answer[..6].copy_from_slice(&frame[6..12]);
            answer[6..12].fill(0x22);
            for byte in &mut answer[14..] {
                *byte = byte.wrapping_mul(31).wrapping_add(7);
            }
            self.frames.push_back(answer);
            *self.answered.lock().unwrap() += 1;
            self.signal();
        }
        SendOutcome::Sent
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let _ = self.readable.read();
        if self.still.load(Ordering::Acquire) {
            if !self.frames.is_empty() {
                self.signal();
            }
            return None;
        }
        let frame = self.frames.pop_front()?;
        if !self.frames.is_empty() {
            self.signal();
        }
        buffer[..frame.len()].copy_from_slice(&frame);
        Some(frame.len())
    }

    fn carrier(&self) -> bool {
        true
    }

    fn save(&self) -> Result<Option<Part>, StateError> {
        Part::new(FORM, &self.frames).map(Some)
    }

    fn restore(&mut self, state: &Option<Part>) -> Result<(), StateError> {
        if let Some(part) = state {
            self.frames = part.open(FORM)?;
            self.signal();
        }
        Ok(())
    }

    fn readable_fd(&self) -> RawFd {
        self.readable.as_raw_fd()
    }

    fn writable_fd(&self) -> Option<WritableFd> {
        None
    }
}

/// The guest, running.
struct Traffic {
    guest: Running,
    still: Arc<AtomicBool>,
    answered: Arc<Mutex<u64>>,
}

fn traffic() -> Traffic {
    let mut guest = Guest::new(config(nic::code(), 1));
    let (still, answered) = (Arc::default(), Arc::default());
    let wire = Answering {
        frames: VecDeque::new(),
        readable: EventFd::new(EFD_NONBLOCK).unwrap(),
        still: Arc::clone(&still),
        answered: Arc::clone(&answered),
    };
    let slot = guest.vm.reserve_pci_slot().unwrap();
    let card = NicModel::from_name("e1000").unwrap().make(NicParts {
        mac: nic::MAC,
        wire: Box::new(wire),
        dma: guest.vm.dma_space(),
        intx: slot.intx_line(InterruptPin::A),
        vectors: &mut |count| slot.msi_vectors(count).map_err(|error| error.to_string()),
    });
    let card = card.unwrap();
    guest.vm.add_subscriber(card.events.clone());
    guest.vm.add_pci(&slot, card.function).unwrap();
    Traffic {
        guest: guest.start(),
        still,
        answered,
    }
}

impl Traffic {
    /// Waits until the guest has sent so many frames more.
    fn wait(&self, frames: u64) {
        self.guest.drain();
        for _ in 0..frames {
            self.guest.report();
        }
    }

    /// Frames that the guest has sent and received, by its registers.
    fn counts(&self) -> (u64, u64) {
        let read = |vcpus: &mut vmm::PausedVcpus<'_>| {
            let regs = vcpus.get(0).unwrap().get_regs().unwrap();
            (regs.r12, regs.r14)
        };
        self.guest.handle.with_paused(read).unwrap()
    }

    /// Sets a mark with frames on their way, and gives all that there is at it.
    fn mark(&self, name: &str) -> Whole {
        let handle = &self.guest.handle;
        self.still.store(true, Ordering::Release);
        // With nothing coming, some are on their way; the guest goes on to send.
        self.wait(5);
        handle.pause().unwrap();
        handle.mark(name, LIMIT).unwrap();
        let then = whole(handle);
        handle.resume().unwrap();
        self.still.store(false, Ordering::Release);
        then
    }

    fn rewind(&self, name: &str, then: &Whole) {
        let handle = &self.guest.handle;
        self.still.store(true, Ordering::Release);
        handle.pause().unwrap();
        handle.rewind(Some(name), LIMIT).unwrap();
        assert_eq!(handle.state(), VmState::Paused);
        assert_same(&whole(handle), then, name);
        handle.resume().unwrap();
        self.still.store(false, Ordering::Release);
    }
}

#[test]
fn a_thousand_rewinds_under_traffic_give_memory_registers_and_devices_back_each_time() {
    const ROUNDS: u64 = 1000;
    let traffic = traffic();
    traffic.wait(50);
    let marks = [("a", traffic.mark("a")), ("b", traffic.mark("b"))];
    let devices = |mark: usize| &marks[mark].1.devices;
    assert!(
        devices(0) != devices(1),
        "nothing of the card's is in a mark"
    );
    let at = |name: &str, then: &Whole| {
        traffic.rewind(name, then);
        traffic.counts()
    };
    let (first, _) = at("a", &marks[0].1);
    for round in 0..ROUNDS {
        traffic.wait(round % 9);
        let (name, then) = &marks[usize::from(round % 7 == 0)];
        let (_, received) = at(name, then);
        // What was on its way at the mark comes again.
        let deadline = Instant::now() + Duration::from_secs(20);
        while round % 10 == 0 && traffic.counts().1 < received + 20 {
            assert!(Instant::now() < deadline, "nothing comes any more");
            traffic.wait(1);
        }
    }
    traffic.wait(100);
    // On a busy machine frames to the guest come late.
    let deadline = Instant::now() + Duration::from_secs(20);
    while traffic.counts().1 <= 50 {
        assert!(Instant::now() < deadline, "nothing comes any more");
        traffic.wait(1);
    }
    assert!(traffic.counts().0 > first);
    let answered = *traffic.answered.lock().unwrap();
    assert!(answered > ROUNDS, "{answered} answered");
    traffic.guest.power_off();
}
