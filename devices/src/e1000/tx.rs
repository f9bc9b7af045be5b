//! The transmitter's ring (3.4): fetches descriptors, gathers packets, writes back, raises causes.
//!
//! Sending happens in the write of TDT. A descriptor that ends a packet stays at the head until the
//! wire took all of the packet; a full wire stops the ring, which goes on when the wire has room.
//! What one call does is bounded by [`Budget`]; the event loop goes on with the rest.
//!
//! Per packet of one descriptor: a sixteenth or less of a descriptor read, one data read, one send,
//! one byte written back if RS is set. Nothing is allocated.

use super::E1000;
use super::packet::Progress;
use super::regs::{TADV, TCTL, TDBAL, TDH, TDT, TIDV, TXDCTL, icr, tctl};
use super::ring::{DESCRIPTOR_BYTES, Ring};
use super::timers::{Timer, delay_ns};
use super::tx_descriptor::{Budget, command};

/// Descriptors read at once.
const FETCH: usize = 16;
/// Status bit: descriptor done (3.3.3.2).
const DD: u8 = 1 << 0;

/// Descriptors that were read from the ring ahead of their turn, within one call.
struct Fetched {
    bytes: [u8; FETCH * DESCRIPTOR_BYTES as usize],
    next: usize,
    count: usize,
}

impl E1000 {
    fn may_transmit(&self) -> bool {
        self.regs.is_set(TCTL, tctl::EN)
            && self.dma_allowed()
            && (self.link_up() || self.in_loopback() || self.wire.loses_frames())
    }

    /// Whether the event loop should say when the wire has room.
    pub(super) fn wants_room(&self) -> bool {
        self.tx.stalled
    }

    /// Works on the ring until it is empty, the wire is full or the budget is spent.
    pub(super) fn transmit(&mut self) {
        if !self.may_transmit() {
            self.tx.stalled = false;
            return;
        }
        let mut causes = 0;
        self.transmit_ring(&mut causes);
        self.raise(causes);
        self.raise_receive_causes();
    }

    fn transmit_ring(&mut self, causes: &mut u32) {
        let mut ring = Ring::at(&self.regs, TDBAL);
        if ring.head == ring.tail {
            return;
        }
        if !ring.is_sane() {
            self.complain(format_args!(
                "transmit head {} or tail {} is outside a ring of {} descriptors",
                ring.head, ring.tail, ring.count
            ));
            return;
        }
        let before = ring.available();
        let mut fetched = Fetched {
            bytes: [0; _],
            next: 0,
            count: 0,
        };
        let mut budget = Budget::default();
        // The link may go away on the way.
        while ring.head != ring.tail && self.may_transmit() {
            if budget.is_spent() {
                self.kick();
                break;
            }
            let Some(descriptor) = self.next_descriptor(&ring, &mut fetched) else {
                break;
            };
            if !self.tx.ending {
                self.tx.ending = self.take_descriptor(&descriptor, &mut budget);
            }
            if self.tx.ending {
                match self.send_packet(&mut budget) {
                    Progress::Sent => self.tx.ending = false,
                    Progress::Full => break,
                    Progress::OutOfBudget => {
                        self.kick();
                        break;
                    }
                }
            }
            budget.spend_descriptor();
            self.write_back(ring.head_address(), &descriptor, causes);
            ring.advance();
        }
        self.regs.set(TDH, ring.head);
        if ring.head == ring.tail {
            *causes |= icr::TXQE;
        }
        let low = (self.regs.get(TXDCTL) >> 25) * 8;
        if low != 0 && before > low && ring.available() <= low {
            *causes |= icr::TXD_LOW;
        }
    }

    /// The descriptor at the head, from memory or from those read before.
    fn next_descriptor(&mut self, ring: &Ring, fetched: &mut Fetched) -> Option<[u8; 16]> {
        if fetched.next == fetched.count {
            fetched.count = (ring.contiguous() as usize).min(FETCH);
            fetched.next = 0;
            let bytes = &mut fetched.bytes[..fetched.count * DESCRIPTOR_BYTES as usize];
            if let Err(error) = self.dma.read(ring.head_address(), bytes) {
                self.complain(format_args!("transmit descriptor: {error}"));
                return None;
            }
        }
        let at = fetched.next * DESCRIPTOR_BYTES as usize;
        fetched.next += 1;
        fetched.bytes[at..].first_chunk().copied()
    }

    /// Reports a descriptor as done if it asked for that.
    fn write_back(&mut self, at: u64, descriptor: &[u8; 16], causes: &mut u32) {
        let lower =
            u32::from_le_bytes([descriptor[8], descriptor[9], descriptor[10], descriptor[11]]);
        if lower & (command::RS | command::RPS) == 0 {
            return;
        }
        if let Err(error) = self
            .dma
            .write(at.wrapping_add(12), &[descriptor[12] & 0xf0 | DD])
        {
            self.complain(format_args!("transmit write-back: {error}"));
        }
        let delay = delay_ns(self.regs.get(TIDV)).filter(|_| lower & command::IDE != 0);
        match delay {
            None => *causes |= icr::TXDW,
            Some(delay) => {
                self.timers.start(Timer::TransmitDelay, delay);
                if let Some(absolute) = delay_ns(self.regs.get(TADV)) {
                    self.timers.start_if_idle(Timer::TransmitAbsolute, absolute);
                }
            }
        }
    }

    /// TDH was written: what was gathered of a packet is forgotten.
    pub(super) fn write_transmit_head(&mut self, value: u32) {
        self.regs.set(TDH, value & 0xffff);
        self.tx.abandon_packet();
    }

    /// TDT was written.
    pub(super) fn write_transmit_tail(&mut self, value: u32) {
        self.regs.set(TDT, value & 0xffff);
        self.transmit();
    }

    /// A transmit timer ran out.
    pub(super) fn end_transmit_delay(&mut self) {
        self.timers.stop(Timer::TransmitDelay);
        self.timers.stop(Timer::TransmitAbsolute);
        self.raise(icr::TXDW);
    }

    /// TIDV was written with FPD: a delayed interrupt is due now.
    pub(super) fn flush_transmit_delay(&mut self) {
        let delayed = self.timers.stop(Timer::TransmitDelay);
        if self.timers.stop(Timer::TransmitAbsolute) || delayed {
            self.raise(icr::TXDW);
        }
    }
}
