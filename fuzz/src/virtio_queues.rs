//! Whatever a driver stores in the registers of a virtio disk or card and in the memory of its
//! queues: the device refuses it or needs a reset, a twin that is restored in the middle goes on,
//! and after a reset the device can be set up again. The first byte says which device.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use arbitrary::{Arbitrary, Unstructured};
use devices::dma::{DmaSpace, GuestMemory};
use devices::irq::{IrqLine, MsiMessage, MsiVectors};
use devices::pci::PciFunction;
use devices::virtio::VirtioDevice;
use devices::virtio::blk::{Block, Disk};
use devices::virtio::net::Net;
use devices::virtio::pci::VirtioPciFunction;
use devices::wire::{SendOutcome, Wire, WritableFd};
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Guest memory, in bytes: what fits into an address of 16 bits.
const MEMORY: usize = 64 << 10;
/// Descriptors of a queue.
const DESCRIPTORS: u16 = 16;
/// Where the queues' parts are, from one queue to the next, and from one part to the next.
const QUEUE_BYTES: u64 = 0x1000;
const PART_BYTES: u64 = 0x400;
const DISK_BYTES: u64 = 64 << 10;
/// Most that an input does.
const STEPS: usize = 256;

/// A register of the common configuration structure (virtio 1.2, 4.1.4.3).
mod common {
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const STATUS: u64 = 0x14;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}
/// Where a queue is notified, and how far apart.
const NOTIFY: u64 = 0x3000;
const NOTIFY_STEP: u64 = 4;

/// What a driver may do.
#[derive(Arbitrary)]
enum Step {
    Store {
        offset: u16,
        bytes: u8,
        value: u64,
    },
    Load {
        offset: u16,
        bytes: u8,
    },
    Configure {
        offset: u8,
        value: u32,
    },
    /// Bytes of its memory.
    Memory {
        at: u16,
        bytes: [u8; 16],
    },
    /// A descriptor of a queue, which is offered.
    Offer {
        queue: u8,
        index: u8,
        address: u16,
        length: u16,
        flags: u8,
        next: u8,
    },
    Notify {
        queue: u8,
    },
    /// The device's own descriptors are looked at.
    Events,
    /// A twin goes on.
    Restore,
    /// It begins anew.
    Start,
}

struct Line;

impl IrqLine for Line {
    fn set_level(&self, _asserted: bool) {}
}

struct Vectors(u16);

impl MsiVectors for Vectors {
    fn count(&self) -> u16 {
        self.0
    }
    fn route(&self, vector: u16, _message: Option<MsiMessage>) {
        assert!(vector < self.0);
    }
    fn trigger(&self, vector: u16) {
        assert!(vector < self.0);
    }
}

/// What is sent comes back, a few frames at most.
struct Echo {
    frames: VecDeque<Vec<u8>>,
    readable: EventFd,
}

impl Wire for Echo {
    fn send(&mut self, frame: &[u8]) -> SendOutcome {
        if self.frames.len() < 8 {
            self.frames.push_back(frame.to_owned());
        }
        SendOutcome::Sent
    }
    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let frame = self.frames.pop_front()?;
        buffer.get_mut(..frame.len())?.copy_from_slice(&frame);
        Some(frame.len())
    }
    fn carrier(&self) -> bool {
        true
    }
    fn writable_fd(&self) -> Option<WritableFd> {
        None
    }
    fn readable_fd(&self) -> RawFd {
        self.readable.as_raw_fd()
    }
}

fn disk() -> Block {
    let file = memfd_create("disk", MemfdFlags::CLOEXEC).expect("there are descriptors");
    let file = File::from(file);
    file.set_len(DISK_BYTES).expect("there is memory");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let disk = Disk::open(Path::new(&path), false).expect("it is a file");
    Block::new(disk, "fuzz")
}

fn card() -> Net {
    let readable = EventFd::new(EFD_NONBLOCK).expect("there are descriptors");
    let frames = VecDeque::new();
    Net::new([2, 0, 0, 0, 0, 1], Box::new(Echo { frames, readable }))
}

struct Machine<D: VirtioDevice + 'static> {
    memory: Arc<GuestMemory>,
    function: Arc<Mutex<VirtioPciFunction<D>>>,
    events: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>>,
    queues: u16,
}

impl<D: VirtioDevice + 'static> Machine<D> {
    fn new(device: D, memory: Arc<GuestMemory>) -> Self {
        let queues = device.queue_sizes().len() as u16;
        let vectors = Arc::new(Vectors(queues + 1));
        let dma = DmaSpace::new(memory.clone());
        let function = VirtioPciFunction::new(device, dma, Arc::new(Line), vectors);
        let function = Arc::new(Mutex::new(function.expect("its vectors fit")));
        let mut events = EventManager::<Arc<Mutex<dyn MutEventSubscriber + Send>>>::new()
            .expect("there are descriptors");
        events.add_subscriber(function.clone());
        Self {
            memory,
            function,
            events,
            queues,
        }
    }

    fn function(&self) -> std::sync::MutexGuard<'_, VirtioPciFunction<D>> {
        self.function.lock().expect("nobody panicked with it")
    }

    fn store(&self, offset: u64, bytes: usize, value: u64) {
        self.function()
            .bar_write(0, offset, &value.to_le_bytes()[..bytes]);
    }

    fn load(&self, offset: u64, bytes: usize) -> u64 {
        let mut data = [0; 8];
        self.function().bar_read(0, offset, &mut data[..bytes]);
        u64::from_le_bytes(data)
    }

    /// What every driver does first (3.1.1).
    fn start(&self) {
        self.function().config_write(4, &6u16.to_le_bytes());
        self.store(common::STATUS, 1, 0);
        self.store(common::STATUS, 1, 3);
        self.store(common::DRIVER_FEATURE_SELECT, 4, 0);
        self.store(common::DRIVER_FEATURE, 4, 0);
        self.store(common::DRIVER_FEATURE_SELECT, 4, 1);
        // VIRTIO_F_VERSION_1.
        self.store(common::DRIVER_FEATURE, 4, 1);
        self.store(common::STATUS, 1, 11);
        for queue in 0..u64::from(self.queues) {
            let at = queue * QUEUE_BYTES;
            self.write(at, &[0; QUEUE_BYTES as usize]);
            self.store(common::QUEUE_SELECT, 2, queue);
            self.store(common::QUEUE_SIZE, 2, DESCRIPTORS.into());
            self.store(common::QUEUE_MSIX_VECTOR, 2, queue + 1);
            self.store(common::QUEUE_DESC, 8, at);
            self.store(common::QUEUE_DRIVER, 8, at + PART_BYTES);
            self.store(common::QUEUE_DEVICE, 8, at + 2 * PART_BYTES);
            self.store(common::QUEUE_ENABLE, 2, 1);
        }
        self.store(common::STATUS, 1, 15);
        assert_eq!(self.load(common::STATUS, 1), 15, "it cannot be set up");
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        // What is behind the end is left out.
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
    }

    fn offer(&self, queue: u64, index: u16, descriptor: &[u8; 16]) {
        let (at, index) = (queue * QUEUE_BYTES, index % DESCRIPTORS);
        self.write(at + 16 * u64::from(index), descriptor);
        let next = GuestAddress(at + PART_BYTES + 2);
        let next_index: u16 = self.memory.read_obj(next).expect("it is in memory");
        let slot = at + PART_BYTES + 4 + 2 * u64::from(next_index % DESCRIPTORS);
        self.write(slot, &index.to_le_bytes());
        self.write(next.0, &next_index.wrapping_add(1).to_le_bytes());
    }

    fn notify(&self, queue: u64) {
        self.store(NOTIFY + queue * NOTIFY_STEP, 2, queue);
    }
}

fn exercise<D: VirtioDevice + 'static>(device: fn() -> D, input: &mut Unstructured<'_>) {
    let ranges = [(GuestAddress(0), MEMORY)];
    let memory = Arc::new(GuestMemory::from_ranges(&ranges).expect("there is memory"));
    let mut machine = Machine::new(device(), memory.clone());
    machine.start();
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(input) else {
            break;
        };
        let size = |bytes: u8| [1, 2, 4, 8][usize::from(bytes % 4)];
        match step {
            Step::Store {
                offset,
                bytes,
                value,
            } => {
                machine.store(u64::from(offset), size(bytes), value);
            }
            Step::Load { offset, bytes } => drop(machine.load(u64::from(offset), size(bytes))),
            Step::Configure { offset, value } => {
                machine
                    .function()
                    .config_write(u16::from(offset), &value.to_le_bytes());
            }
            Step::Memory { at, bytes } => machine.write(u64::from(at), &bytes),
            Step::Offer {
                queue,
                index,
                address,
                length,
                flags,
                next,
            } => {
                let mut descriptor = [0; 16];
                descriptor[..2].copy_from_slice(&address.to_le_bytes());
                descriptor[8..10].copy_from_slice(&length.to_le_bytes());
                descriptor[12] = flags;
                descriptor[14] = next % DESCRIPTORS as u8;
                let queue = u64::from(queue) % u64::from(machine.queues);
                machine.offer(queue, u16::from(index), &descriptor);
            }
            Step::Notify { queue } => {
                machine.notify(u64::from(queue) % u64::from(machine.queues));
            }
            Step::Events => drop(machine.events.run_with_timeout(0)),
            Step::Restore => {
                let state = machine.function().save().expect("it can be saved");
                let twin = Machine::new(device(), memory.clone());
                let restored = twin.function().restore(&state);
                restored.unwrap_or_else(|error| panic!("its own state is refused: {error}"));
                machine = twin;
            }
            Step::Start => machine.start(),
        }
    }
    machine.start();
}

/// One input.
pub fn run(input: &[u8]) {
    let Some((which, data)) = input.split_first() else {
        return;
    };
    let mut data = Unstructured::new(data);
    match which % 2 {
        0 => exercise(disk, &mut data),
        _ => exercise(card, &mut data),
    }
}
