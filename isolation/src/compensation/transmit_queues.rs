//! Transmit queues of the guest whose packets are kept out.
//!
//! ```text
//!   open call:   part ─► guest ...................... ─► part ─► guest ... ─► end
//!   packet:                transmit: busy, queue stopped  │                    │
//!   queue:                                                let go               let go, scheduled
//! ```
//!
//! The kernel comes with a packet that was answered `NETDEV_TX_BUSY` again at once, for as long as
//! its queue is not stopped. A driver whose ring is full stops it, and so does the host, in the
//! driver's place. The driver never finds a queue stopped that it has not stopped itself: the queue
//! is let go before each part of a call that is in the guest. Once packets may pass, the guest
//! calls `netif_schedule_queue`, which does nothing for a queue that the driver has stopped in the
//! end.

use std::collections::BTreeSet;

use devices::dma::GuestMemory;
use vm_memory::Bytes;

use crate::domain::effects::KernelCall;
use crate::guest::addr::Gva;
use crate::guest::btf::Btf;
use crate::guest::paging::VirtMemory;
use crate::guest::symbols::SymbolTable;

/// Has the packets of a queue sent (`net/core/dev.c`).
const SCHEDULE: &str = "netif_schedule_queue";

/// Bit of `netdev_queue.state` with which a driver stops the queue (`include/linux/netdevice.h`).
const DRIVER_STOPPED: &str = "__QUEUE_STATE_DRV_XOFF";

/// Most queues that are stopped at a time; further ones are not, and the kernel tries again and
/// again.
const MAX_STOPPED: usize = 64;

/// What has to be known of the kernel's structures, offsets and sizes in bytes.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// `sk_buff.queue_mapping`, 2 bytes.
    mapping: u64,
    /// `net_device._tx`.
    queues: u64,
    /// `net_device.num_tx_queues`, 4 bytes.
    count: u64,
    /// `netdev_queue`.
    queue_bytes: u64,
    /// The byte of `netdev_queue.state` with the bit.
    state: u64,
    /// The bit in it.
    stopped: u8,
    /// Address of [`SCHEDULE`].
    schedule: u64,
}

impl Layout {
    fn new(types: &Btf, symbols: &SymbolTable) -> Option<Self> {
        let offset = |of: &str, member: &str| {
            let member = types.find_member(types.find_struct(of)?, member)?;
            Some(u64::from(member.bit_offset / 8))
        };
        let bit = u64::try_from(types.enum_value(DRIVER_STOPPED)?).ok()?;
        Some(Self {
            mapping: offset("sk_buff", "queue_mapping")?,
            queues: offset("net_device", "_tx")?,
            count: offset("net_device", "num_tx_queues")?,
            queue_bytes: types.size_of(types.find_struct("netdev_queue")?)?,
            state: offset("netdev_queue", "state")?.checked_add(bit / 8)?,
            stopped: 1 << (bit % 8),
            schedule: symbols.kernel_symbol(SCHEDULE)?.at.0,
        })
    }
}

/// The queues that were stopped.
#[derive(Debug, Default)]
pub struct TransmitQueues {
    /// `None` if the kernel's structures are not as expected: nothing is stopped then.
    layout: Option<Layout>,
    /// Addresses of their `netdev_queue`.
    stopped: BTreeSet<u64>,
}

impl TransmitQueues {
    /// Of a guest with these types and symbols.
    pub fn new(types: &Btf, symbols: &SymbolTable) -> Self {
        Self {
            layout: Layout::new(types, symbols),
            stopped: BTreeSet::new(),
        }
    }

    /// Stops the queue in which the `sk_buff` at `packet` came to the `net_device` at `device`. The
    /// guest's other processors are held.
    pub fn stop(&mut self, packet: u64, device: u64, virt: VirtMemory<'_, GuestMemory>) {
        let Some(layout) = self.layout else { return };
        let Some(queue) = layout.queue_of(packet, device, virt) else {
            return;
        };
        if self.stopped.len() >= MAX_STOPPED && !self.stopped.contains(&queue) {
            return;
        }
        if layout.change(queue, virt, |state| state | layout.stopped) {
            self.stopped.insert(queue);
        }
    }

    /// Lets all of them go. They are still to be scheduled.
    pub fn let_go(&self, virt: VirtMemory<'_, GuestMemory>) {
        let Some(layout) = self.layout else { return };
        for queue in &self.stopped {
            layout.change(*queue, virt, |state| state & !layout.stopped);
        }
    }

    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.stopped.is_empty()
    }

    /// Lets all of them go, and does not wait for anything to schedule them: the next packet does.
    pub fn give_up(&mut self, virt: VirtMemory<'_, GuestMemory>) {
        self.let_go(virt);
        self.stopped.clear();
    }

    /// The guest is as it was when none was stopped.
    pub fn forget(&mut self) {
        self.stopped.clear();
    }

    /// What the guest has to call once packets may pass.
    pub fn schedule(&mut self) -> Vec<KernelCall> {
        let Some(layout) = self.layout else {
            return Vec::new();
        };
        let queues = std::mem::take(&mut self.stopped).into_iter();
        let call = |queue| KernelCall {
            function: layout.schedule,
            arguments: [queue, 0, 0, 0, 0, 0],
        };
        queues.map(call).collect()
    }
}

impl Layout {
    /// Address of the `netdev_queue`; `None` if the guest's memory does not say so.
    fn queue_of(&self, packet: u64, device: u64, virt: VirtMemory<'_, GuestMemory>) -> Option<u64> {
        let at = |start: u64, offset: u64| start.checked_add(offset).map(Gva);
        let (mut mapping, mut count) = ([0; 2], [0; 4]);
        virt.read(at(packet, self.mapping)?, &mut mapping).ok()?;
        virt.read(at(device, self.count)?, &mut count).ok()?;
        let mapping = u16::from_le_bytes(mapping);
        if u32::from(mapping) >= u32::from_le_bytes(count) {
            return None;
        }
        let first = virt.read_u64(at(device, self.queues)?).ok()?;
        first.checked_add(u64::from(mapping).checked_mul(self.queue_bytes)?)
    }

    /// Changes the byte with the bit; `false` if it is not mapped.
    fn change(
        &self,
        queue: u64,
        virt: VirtMemory<'_, GuestMemory>,
        how: impl Fn(u8) -> u8,
    ) -> bool {
        let at = queue.checked_add(self.state).map(Gva);
        let Some(found) = at.and_then(|at| virt.space.walk(virt.memory, at).ok()) else {
            return false;
        };
        let state = virt.memory.read_obj::<u8>(found.gpa);
        state.is_ok_and(|state| virt.memory.write_obj(how(state), found.gpa).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::guest::btf::encode::Encoder;
    use crate::guest::paging::testing::TestGuest;
    use crate::guest::paging::{AddressSpace, Levels};
    use crate::guest::symbols::{Line, SymbolTableBuilder};

    const PACKET: u64 = 0xffff_8880_0000_0100;
    const DEVICE: u64 = 0xffff_8880_0000_0200;
    const QUEUES: u64 = 0xffff_8880_0000_0400;
    const SCHEDULE_AT: u64 = 0xffff_ffff_8180_0000;
    /// Bytes of a `netdev_queue`, and where its state is.
    const QUEUE: (u64, u64) = (0x40, 0x10);

    struct World {
        memory: GuestMemory,
        space: AddressSpace,
        queues: TransmitQueues,
    }

    impl World {
        /// A device with two queues, whose packet is in the one with this number.
        fn new(number: u16) -> Self {
            let mut guest = TestGuest::new(Levels::Four);
            guest.put(Gva(PACKET + 8), &number.to_le_bytes(), 3);
            guest.put(Gva(DEVICE + 0x20), &QUEUES.to_le_bytes(), 3);
            guest.put(Gva(DEVICE + 0x28), &2u32.to_le_bytes(), 3);
            guest.put(Gva(QUEUES), &[0; 0x80], 3);
            let ranges = [
                (GuestAddress(0), 4 << 20),
                (GuestAddress(0x4000_0000), 1 << 20),
            ];
            let memory = GuestMemory::from_ranges(&ranges).unwrap();
            for (page, bytes) in &guest.memory.pages {
                let at = GuestAddress(page << 12);
                memory.write_slice(&bytes[..], at).unwrap();
            }
            let mut e = Encoder::new(None);
            let (word, half) = (e.int("u64", 8, 0), e.int("u32", 4, 0));
            let short = e.int("u16", 2, 0);
            e.structure("sk_buff", 0x80, &[("queue_mapping", short, 8)]);
            e.structure(
                "net_device",
                0x80,
                &[("_tx", word, 0x20), ("num_tx_queues", half, 0x28)],
            );
            let (bytes, state) = QUEUE;
            let bytes = u32::try_from(bytes).unwrap();
            let state = u32::try_from(state).unwrap();
            e.structure("netdev_queue", bytes, &[("state", word, state)]);
            e.enumeration_of("netdev_queue_state_t", &[(DRIVER_STOPPED, 0)]);
            let types = Btf::parse(&e.bytes(), None).unwrap();
            let mut symbols = SymbolTableBuilder::default();
            symbols
                .add(&Line {
                    address: SCHEDULE_AT,
                    kind: 'T',
                    name: SCHEDULE,
                    module: None,
                })
                .unwrap();
            Self {
                memory,
                space: guest.space,
                queues: TransmitQueues::new(&types, &symbols.finish()),
            }
        }

        fn virt(&self) -> VirtMemory<'_, GuestMemory> {
            VirtMemory {
                space: self.space,
                memory: &self.memory,
            }
        }

        fn stop(&mut self, packet: u64) {
            let mut queues = std::mem::take(&mut self.queues);
            queues.stop(packet, DEVICE, self.virt());
            self.queues = queues;
        }

        /// States of both queues.
        fn states(&self) -> [u64; 2] {
            let state = |number: u64| {
                let at = QUEUES + number * QUEUE.0 + QUEUE.1;
                self.virt().read_u64(Gva(at)).unwrap()
            };
            [state(0), state(1)]
        }
    }

    #[test]
    fn the_queue_of_a_packet_is_stopped_let_go_and_scheduled() {
        let mut world = World::new(1);
        world.stop(PACKET);
        assert_eq!(world.states(), [0, 1]);
        world.queues.let_go(world.virt());
        assert_eq!(world.states(), [0, 0]);
        // It may be stopped again before packets pass.
        world.stop(PACKET);
        assert_eq!(world.states(), [0, 1]);
        world.queues.let_go(world.virt());
        let calls = world.queues.schedule();
        let calls: Vec<_> = calls
            .iter()
            .map(|call| (call.function, call.arguments[0]))
            .collect();
        assert_eq!(calls, [(SCHEDULE_AT, QUEUES + QUEUE.0)]);
        assert!(world.queues.schedule().is_empty());
        assert_eq!(world.states(), [0, 0]);
    }

    #[test]
    fn queues_that_are_given_up_are_not_stopped_any_more() {
        let mut world = World::new(0);
        world.stop(PACKET);
        assert!(!world.queues.is_empty());
        let mut queues = std::mem::take(&mut world.queues);
        queues.give_up(world.virt());
        assert_eq!(world.states(), [0, 0]);
        assert!(queues.is_empty() && queues.schedule().is_empty());
    }

    #[test]
    fn what_is_no_packet_of_the_device_stops_nothing() {
        let mut world = World::new(2);
        world.stop(PACKET);
        world.stop(0);
        world.stop(u64::MAX);
        assert_eq!(world.states(), [0, 0]);
        assert!(world.queues.schedule().is_empty());
    }

    #[test]
    fn a_kernel_that_is_not_known_is_left_alone() {
        let mut world = World::new(0);
        world.queues = TransmitQueues::default();
        world.stop(PACKET);
        assert_eq!(world.states(), [0, 0]);
    }
}
