//! A small virtio driver over plain guest memory, for the tests of all devices.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::dma::GuestMemory;
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};

use super::VirtioDevice;
use super::pci::VirtioPciFunction;
use crate::dma::DmaSpace;
use crate::irq::IrqLine;
use crate::pci::PciFunction;
use crate::pci::msix::tests::RecordedVectors;
use crate::state::tests::stored;

pub(crate) const MEMORY_BYTES: usize = 16 << 20;
const QUEUE_SIZE: u16 = 16;
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;

#[derive(Default)]
pub(crate) struct Line {
    pub(crate) asserted: Mutex<bool>,
}

impl IrqLine for Line {
    fn set_level(&self, asserted: bool) {
        *self.asserted.lock().unwrap() = asserted;
    }
}

#[derive(Clone, Default)]
struct Ring {
    next_descriptor: u16,
    available: u16,
    used: u16,
    /// Address and length of the writable buffers, by head.
    writable: HashMap<u16, Vec<(u64, usize)>>,
}

/// A chain that the device gave back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) head: u16,
    pub(crate) data: Vec<u8>,
}

pub(crate) struct Driver<D: VirtioDevice + 'static> {
    pub(crate) memory: Arc<GuestMemory>,
    function: Arc<Mutex<VirtioPciFunction<D>>>,
    pub(crate) vectors: Arc<RecordedVectors>,
    pub(crate) line: Arc<Line>,
    events: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>>,
    rings: Vec<Ring>,
    next_buffer: u64,
    event_idx: bool,
}

impl<D: VirtioDevice + 'static> Driver<D> {
    /// A function with `device` that nobody has touched yet.
    pub(crate) fn new(device: D) -> Self {
        let memory =
            Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap());
        let queues = device.queue_sizes().len();
        let vectors = RecordedVectors::new(queues + 1);
        let line = Arc::new(Line::default());
        let dma = DmaSpace::new(memory.clone());
        let function = VirtioPciFunction::new(device, dma, line.clone(), vectors.clone()).unwrap();
        let function = Arc::new(Mutex::new(function));
        let mut events = EventManager::<Arc<Mutex<dyn MutEventSubscriber + Send>>>::new().unwrap();
        events.add_subscriber(function.clone());
        let rings = (0..queues).map(|_| Ring::default()).collect();
        Self {
            memory,
            function,
            vectors,
            line,
            events,
            rings,
            next_buffer: 1 << 20,
            event_idx: false,
        }
    }

    /// A driver of the same function with `device` in it, whose memory and state are as this one's
    /// are now. What was asked of the device is found when the event loop runs.
    pub(crate) fn twin(&self, device: D) -> Self {
        let mut twin = Self::new(device);
        let mut all = vec![0; MEMORY_BYTES];
        self.memory.read_slice(&mut all, GuestAddress(0)).unwrap();
        twin.memory.write_slice(&all, GuestAddress(0)).unwrap();
        twin.rings = self.rings.clone();
        twin.next_buffer = self.next_buffer;
        twin.event_idx = self.event_idx;
        let state = stored(&self.function().save().unwrap());
        twin.function().restore(&state).unwrap();
        twin
    }

    /// Chains that the device has not given back.
    pub(crate) fn outstanding(&self, queue: usize) -> u16 {
        let ring = &self.rings[queue];
        ring.available.wrapping_sub(ring.used)
    }

    pub(crate) fn queue_count(&self) -> usize {
        self.rings.len()
    }

    pub(crate) fn function(&self) -> MutexGuard<'_, VirtioPciFunction<D>> {
        self.function.lock().unwrap()
    }

    /// Runs the event loop once, for what is ready now.
    pub(crate) fn run_events(&mut self) {
        self.events.run_with_timeout(0).unwrap();
    }

    pub(crate) fn read(&self, offset: u64, length: usize) -> u64 {
        let mut data = [0; 8];
        self.function().bar_read(0, offset, &mut data[..length]);
        u64::from_le_bytes(data)
    }

    pub(crate) fn write(&self, offset: u64, length: usize, value: u64) {
        self.function()
            .bar_write(0, offset, &value.to_le_bytes()[..length]);
    }

    pub(crate) fn status(&self) -> u8 {
        self.read(0x14, 1) as u8
    }

    pub(crate) fn enable_msix(&self) {
        let at = self.capability(0x11);
        self.function()
            .config_write(at + 2, &0x8000u16.to_le_bytes());
        for vector in 0..self.rings.len() as u64 + 1 {
            self.write(0x4000 + vector * 16 + 12, 4, 0);
        }
    }

    /// Offset of the first capability with `id`.
    pub(crate) fn capability(&self, id: u8) -> u16 {
        let mut function = self.function();
        let mut byte = |at: u16| {
            let mut data = [0];
            function.config_read(at, &mut data);
            data[0]
        };
        let mut at = byte(0x34);
        while byte(at.into()) != id {
            at = byte(u16::from(at) + 1);
            assert_ne!(at, 0, "no capability {id:#x}");
        }
        at.into()
    }

    /// Lets the function master the bus, or not.
    pub(crate) fn set_bus_master(&self, on: bool) {
        let command: u16 = if on { 0x06 } else { 0x02 };
        self.function().config_write(0x04, &command.to_le_bytes());
    }

    /// Resets the device and negotiates `features` up to FEATURES_OK.
    pub(crate) fn negotiate(&mut self, features: u64) {
        self.set_bus_master(true);
        self.write(0x14, 1, 0);
        self.write(0x14, 1, 3);
        self.write(0x08, 4, 0);
        self.write(0x0c, 4, features & 0xffff_ffff);
        self.write(0x08, 4, 1);
        self.write(0x0c, 4, features >> 32);
        self.write(0x14, 1, 11);
        self.event_idx = features & EVENT_IDX != 0;
    }

    /// Sets all queues up, queue `n` with vector `n + 1`, configuration changes with vector 0.
    pub(crate) fn set_queues_up(&mut self) {
        self.write(0x10, 2, 0);
        for queue in 0..self.rings.len() {
            self.rings[queue] = Ring::default();
            let (descriptors, available, used) = addresses(queue);
            let zero = [0; 0x1000];
            self.memory
                .write_slice(&zero, GuestAddress(descriptors))
                .unwrap();
            self.memory
                .write_slice(&zero, GuestAddress(available))
                .unwrap();
            self.memory.write_slice(&zero, GuestAddress(used)).unwrap();
            self.write(0x16, 2, queue as u64);
            self.write(0x18, 2, QUEUE_SIZE.into());
            self.write(0x1a, 2, queue as u64 + 1);
            self.write(0x20, 8, descriptors);
            self.write(0x28, 4, available);
            self.write(0x2c, 4, 0);
            self.write(0x30, 8, used);
            self.write(0x1c, 2, 1);
        }
    }

    /// Everything that a driver does before it uses the device.
    pub(crate) fn start(&mut self, features: u64) {
        self.negotiate(features | VERSION_1);
        self.set_queues_up();
        self.write(0x14, 1, 15);
        assert_eq!(self.status(), 15);
    }

    /// Memory for a buffer is taken from the beginning again.
    pub(crate) fn reuse_buffers(&mut self) {
        if self.next_buffer > MEMORY_BYTES as u64 / 2 {
            self.next_buffer = 1 << 20;
        }
    }

    fn alloc(&mut self, length: usize) -> u64 {
        let address = self.next_buffer;
        self.next_buffer += (length as u64).next_multiple_of(16).max(16);
        assert!(self.next_buffer < MEMORY_BYTES as u64);
        address
    }

    /// Writes a descriptor as it is.
    pub(crate) fn descriptor(
        &mut self,
        queue: usize,
        index: u16,
        (address, length): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let mut bytes = Vec::new();
        bytes.extend(address.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let at = addresses(queue).0 + u64::from(index) * 16;
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Puts `head` into the available ring.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let available = addresses(queue).1;
        let ring = &mut self.rings[queue];
        let slot = available + 4 + u64::from(ring.available % QUEUE_SIZE) * 2;
        ring.available = ring.available.wrapping_add(1);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.memory
            .write_obj(ring.available, GuestAddress(available + 2))
            .unwrap();
    }

    /// Makes a chain of buffers available: `out` with data, then `into` with these lengths.
    pub(crate) fn post(&mut self, queue: usize, out: &[&[u8]], into: &[usize]) -> u16 {
        let mut buffers = Vec::new();
        for data in out {
            let address = self.alloc(data.len());
            self.memory
                .write_slice(data, GuestAddress(address))
                .unwrap();
            buffers.push((address, data.len(), 0));
        }
        for length in into {
            buffers.push((self.alloc(*length), *length, 2));
        }
        let first = self.rings[queue].next_descriptor;
        let count = buffers.len() as u16;
        for (n, (address, length, flags)) in buffers.iter().enumerate() {
            let index = (first + n as u16) % QUEUE_SIZE;
            let more = u16::from(n + 1 < buffers.len());
            let buffer = (*address, *length as u32);
            self.descriptor(queue, index, buffer, flags | more, (index + 1) % QUEUE_SIZE);
        }
        let writable = buffers
            .iter()
            .filter(|b| b.2 == 2)
            .map(|b| (b.0, b.1))
            .collect();
        let ring = &mut self.rings[queue];
        ring.next_descriptor = (first + count) % QUEUE_SIZE;
        ring.writable.insert(first, writable);
        self.offer(queue, first);
        first
    }

    /// Notifies the device, as it wants to be.
    pub(crate) fn kick(&self, queue: usize) {
        self.write(0x3000 + queue as u64 * 4, 2, queue as u64);
    }

    /// Whether the device asked to be notified about the next chain (EVENT_IDX).
    pub(crate) fn wants_kick(&self, queue: usize) -> bool {
        let at = addresses(queue).2 + 4 + 8 * u64::from(QUEUE_SIZE);
        let avail_event: u16 = self.memory.read_obj(GuestAddress(at)).unwrap();
        avail_event == self.rings[queue].available.wrapping_sub(1)
    }

    /// How many chains the device gave back in all, modulo 65536.
    pub(crate) fn used_index(&self, queue: usize) -> u16 {
        let at = addresses(queue).2 + 2;
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// What the device gave back since this was last asked.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<Used> {
        let used = addresses(queue).2;
        let index: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
        let ring = &mut self.rings[queue];
        let mut chains = Vec::new();
        while ring.used != index {
            let at = used + 4 + u64::from(ring.used % QUEUE_SIZE) * 8;
            let element: u64 = self.memory.read_obj(GuestAddress(at)).unwrap();
            ring.used = ring.used.wrapping_add(1);
            let head = element as u16;
            let mut left = (element >> 32) as usize;
            let mut data = Vec::new();
            for (address, length) in ring.writable.remove(&head).unwrap_or_default() {
                let mut piece = vec![0; length.min(left)];
                self.memory
                    .read_slice(&mut piece, GuestAddress(address))
                    .unwrap();
                left -= piece.len();
                data.extend(piece);
            }
            assert_eq!(
                left, 0,
                "the device claims to have written more than it was given"
            );
            chains.push(Used { head, data });
        }
        if self.event_idx {
            // Interrupt for the next one.
            let used_event = addresses(queue).1 + 4 + 2 * u64::from(QUEUE_SIZE);
            self.memory
                .write_obj(ring.used, GuestAddress(used_event))
                .unwrap();
        }
        chains
    }
}

/// Descriptor table, available ring and used ring of a queue.
fn addresses(queue: usize) -> (u64, u64, u64) {
    let base = 0x1_0000 + queue as u64 * 0x4000;
    (base, base + 0x1000, base + 0x2000)
}
