//! A device's queues while it works on them: chains in, chains out, and what is to be signalled.

use crate::dma::GuestMemory;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{Ordering, fence};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::Chain;
use super::queue_error::QueueError;

/// Vector of a queue or of configuration changes that has none (section 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;
/// Bytes moved in one turn, before vCPU and other devices of the event loop get theirs: what a fast
/// disk or wire moves in a few milliseconds. What a device began is done to its end.
const TURN_BYTES: u64 = 4 << 20;
/// What taking a chain counts for besides what the device says that it moved.
const CHAIN_BYTES: u64 = 4 << 10;
/// Flag of the available ring: the driver wants no interrupts (section 2.7.6).
const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// Flags and index before the elements of the used ring, and one element (section 2.7.8).
const USED_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;

/// A queue and its vector.
pub(super) struct Virtqueue {
    pub(super) queue: Queue,
    pub(super) vector: u16,
    /// Chains were returned since the driver was last interrupted.
    returned: bool,
}

/// [`QueueState`] in a form that can be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtqueueState {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
    vector: u16,
}

impl Virtqueue {
    pub(super) fn new(max_size: u16) -> Result<Self, virtio_queue::Error> {
        Ok(Self {
            queue: Queue::new(max_size)?,
            vector: NO_VECTOR,
            returned: false,
        })
    }

    pub(super) fn reset(&mut self) {
        self.queue.reset();
        self.vector = NO_VECTOR;
        self.returned = false;
    }

    pub(super) fn save(&self) -> VirtqueueState {
        let state = self.queue.state();
        VirtqueueState {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
            vector: self.vector,
        }
    }

    /// A queue with this state, of a function with `vectors` vectors. Whether its rings are in
    /// memory is not looked at.
    pub(super) fn restore(
        state: &VirtqueueState,
        vectors: u16,
    ) -> Result<Self, virtio_queue::Error> {
        let queue = Queue::try_from(QueueState {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        })?;
        Ok(Self {
            queue,
            vector: if state.vector < vectors {
                state.vector
            } else {
                NO_VECTOR
            },
            returned: false,
        })
    }

    /// Whether the driver is to be interrupted for what was returned since this was last asked.
    pub(super) fn take_interrupt(
        &mut self,
        memory: &GuestMemory,
    ) -> Result<bool, virtio_queue::Error> {
        if !std::mem::take(&mut self.returned) {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(memory);
        }
        let flags: u16 = memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Acquire)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u16::from_le(flags) & AVAIL_F_NO_INTERRUPT == 0)
    }
}

/// The queues of one device, for the length of one call.
pub struct Queues<'a> {
    memory: &'a GuestMemory,
    queues: &'a mut [Virtqueue],
    /// There is a driver and nothing is broken.
    active: bool,
    /// Bytes left of this turn.
    budget: u64,
    /// The turn ended with work left.
    pub(super) again: bool,
    pub(super) config_changed: bool,
}

impl<'a> Queues<'a> {
    pub(super) fn new(memory: &'a GuestMemory, queues: &'a mut [Virtqueue], active: bool) -> Self {
        Self {
            memory,
            queues,
            active,
            budget: TURN_BYTES,
            again: false,
            config_changed: false,
        }
    }

    /// Guest memory that the chains' buffers lie in.
    pub fn memory(&self) -> &'a GuestMemory {
        self.memory
    }

    /// Whether there is a driver that is ready.
    pub fn active(&self) -> bool {
        self.active
    }

    /// Tells the driver that the device's configuration structure changed.
    pub fn signal_config_change(&mut self) {
        self.config_changed = self.active;
    }

    /// The device moved `bytes` bytes, or did what takes as long: they count towards the end of
    /// this turn.
    pub fn spend(&mut self, bytes: u64) {
        self.budget = self.budget.saturating_sub(bytes);
    }

    /// Has the event loop go on with all queues when others had their turn.
    pub fn go_on_later(&mut self) {
        self.again = true;
    }

    /// Takes the next chain that the driver made available in `queue`. When there is none the
    /// driver is asked to notify about the next.
    pub fn pop(&mut self, queue: u16) -> Result<Option<Chain>, QueueError> {
        if !self.active {
            return Ok(None);
        }
        let Some(virtqueue) = self.queues.get_mut(usize::from(queue)) else {
            return Ok(None);
        };
        let virtqueue = &mut virtqueue.queue;
        if !virtqueue.ready() {
            return Ok(None);
        }
        let memory = self.memory;
        let ring = |source| QueueError::Ring { queue, source };
        // Once more if the driver put one in before it could see that notifications are wanted.
        for _ in 0..2 {
            if self.budget == 0 {
                self.again = true;
                return Ok(None);
            }
            let next = virtqueue.iter(memory).map_err(ring)?.next();
            if let Some(descriptors) = next {
                self.spend(CHAIN_BYTES);
                return Chain::walk(descriptors).map(Some);
            }
            if !virtqueue.enable_notification(memory).map_err(ring)? {
                break;
            }
        }
        Ok(None)
    }

    /// How many chains the driver has made available in `queue` that were not taken yet. It is
    /// asked to notify about the next that it adds, however many there are.
    pub fn available(&mut self, queue: u16) -> Result<u16, QueueError> {
        let Some(virtqueue) = self.queues.get_mut(usize::from(queue)) else {
            return Ok(0);
        };
        let virtqueue = &mut virtqueue.queue;
        if !self.active || !virtqueue.ready() {
            return Ok(0);
        }
        let ring = |source| QueueError::Ring { queue, source };
        virtqueue.enable_notification(self.memory).map_err(ring)?;
        let mut index = virtqueue
            .avail_idx(self.memory, Ordering::Acquire)
            .map_err(ring)?;
        if virtqueue.event_idx_enabled() {
            // What was just enabled is to hear of the first chain that was not taken, which may be
            // there already. Those that come while this is written are seen by another look, and a
            // driver has room for no more of them than this.
            for _ in 0..=virtqueue.size() {
                let asked = index;
                ask_to_hear_of(virtqueue, self.memory, asked.0).map_err(ring)?;
                fence(Ordering::SeqCst);
                index = virtqueue
                    .avail_idx(self.memory, Ordering::Acquire)
                    .map_err(ring)?;
                if index == asked {
                    break;
                }
            }
        }
        Ok(index.0.wrapping_sub(virtqueue.next_avail()))
    }

    /// Leaves the chain that was popped last from `queue` for later, as if it had not been.
    pub fn put_back(&mut self, queue: u16) {
        if let Some(virtqueue) = self.queues.get_mut(usize::from(queue)) {
            virtqueue.queue.go_to_previous_position();
        }
    }

    /// Gives `chain` back to the driver, `written` bytes of it written.
    pub fn push(&mut self, queue: u16, chain: &Chain, written: usize) -> Result<(), QueueError> {
        let Some(virtqueue) = self.queues.get_mut(usize::from(queue)) else {
            return Ok(());
        };
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        virtqueue
            .queue
            .add_used(self.memory, chain.head(), written)
            .map_err(|source| QueueError::Ring { queue, source })?;
        virtqueue.returned = true;
        Ok(())
    }
}

/// Has the driver notify the device when it adds the chain with `index` in the available ring:
/// `avail_event` behind the used ring (section 2.7.10).
fn ask_to_hear_of(
    queue: &Queue,
    memory: &GuestMemory,
    index: u16,
) -> Result<(), virtio_queue::Error> {
    let offset = USED_HEADER_BYTES + USED_ELEMENT_BYTES * u64::from(queue.size());
    let at = queue
        .used_ring()
        .checked_add(offset)
        .ok_or(virtio_queue::Error::AddressOverflow)?;
    memory
        .store(index.to_le(), GuestAddress(at), Ordering::Relaxed)
        .map_err(virtio_queue::Error::GuestMemory)
}
