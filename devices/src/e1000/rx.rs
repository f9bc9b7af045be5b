//! The receiver (3.2): frames from the wire or from loopback into descriptors and buffers.
//!
//! Frames are taken from the wire only while there are descriptors for them; otherwise they wait
//! there, so that a wire that can wait loses nothing. One frame that turned out to need more
//! descriptors than there are is held, as the packet buffer would hold it.
//!
//! Per frame: one read from the wire, 8 bytes read per descriptor, the data written once per
//! buffer, 8 bytes written per descriptor. Causes are raised once per batch. Nothing is allocated.

use super::E1000;
use super::checksum::fcs;
use super::filter::{FCS_BYTES, Verdict, judge};
use super::regs::{CTRL, RADV, RCTL, RDBAL, RDH, RDTR, RSRPD, ctrl, icr, rctl};
use super::ring::Ring;
use super::rx_checksum::{self, Errors};
use super::stats::{Cast, MPC, RNBC};
use super::timers::{Timer, delay_ns};
use crate::wire::MAX_FRAME_BYTES;

/// Frames that one call handles at most; the event loop goes on with the rest.
const BATCH_FRAMES: usize = 256;
/// Shortest frame without FCS on an Ethernet (802.3, 4A.2.3.2.4), in bytes.
pub const MIN_FRAME_BYTES: usize = 60;
const VLAN_TAG_BYTES: usize = 4;

/// Status bits of a receive descriptor (3.2.3.1).
mod rxd {
    pub const DD: u8 = 1 << 0;
    pub const EOP: u8 = 1 << 1;
    pub const VP: u8 = 1 << 3;
    pub const PIF: u8 = 1 << 7;
}

/// What the receiver has besides registers.
#[derive(Debug)]
pub struct Receiver {
    /// The frame that is handled or held, without FCS; room behind it for padding and FCS.
    pub buffer: Box<[u8]>,
    /// Length in bytes of the frame that is held for want of descriptors.
    pub held: Option<usize>,
    /// Causes to raise at the end of the batch.
    causes: u32,
}

impl Default for Receiver {
    fn default() -> Self {
        let buffer = vec![0; MAX_FRAME_BYTES + MIN_FRAME_BYTES + FCS_BYTES];
        Self {
            buffer: buffer.into_boxed_slice(),
            held: None,
            causes: 0,
        }
    }
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// In guest memory, or filtered.
    Done,
    /// It needs more descriptors than there are now.
    NoDescriptors,
    /// It needs more descriptors than there can be.
    TooLong,
}

impl E1000 {
    /// Whether frames from the wire are listened to at all: otherwise they are lost, as on a cable
    /// with nobody at this end.
    fn listening(&self) -> bool {
        self.regs.get(RCTL) & rctl::EN != 0 && self.link_up() && !self.in_loopback()
    }

    fn can_store(&self) -> bool {
        let ring = Ring::at(&self.regs, RDBAL);
        self.dma_allowed() && ring.is_sane() && ring.head != ring.tail
    }

    /// Whether the event loop should watch for frames.
    pub(super) fn wants_frames(&self) -> bool {
        !self.listening() || self.rx.held.is_none() && self.can_store()
    }

    /// Takes frames from the wire for as long as there are frames and descriptors, a batch at most.
    pub(super) fn receive_batch(&mut self) {
        for _ in 0..BATCH_FRAMES {
            let listening = self.listening();
            if listening && !self.can_store() {
                break;
            }
            let held = self.rx.held.take();
            let length = match held {
                Some(length) => length,
                None => match self.wire.receive(&mut self.rx.buffer[..MAX_FRAME_BYTES]) {
                    Some(length) => length.min(MAX_FRAME_BYTES),
                    None => {
                        // A wire may learn only now that nobody is at its other end.
                        self.update_link();
                        break;
                    }
                },
            };
            if listening && !self.receive_frame(length) {
                if held.is_none() {
                    self.regs.count(RNBC);
                }
                self.rx.held = Some(length);
                break;
            }
        }
        self.raise_receive_causes();
    }

    /// A frame that was sent in loopback comes back. What finds no descriptor is missed.
    pub(super) fn receive_loopback(&mut self, frame: &[u8]) {
        let room = self.regs.get(RCTL) & rctl::EN != 0 && self.rx.held.is_none();
        if let Some(buffer) = self.rx.buffer.get_mut(..frame.len())
            && room
        {
            buffer.copy_from_slice(frame);
            if !self.can_store() || !self.receive_frame(frame.len()) {
                self.regs.count(MPC);
                self.rx.causes |= icr::RXO;
            }
        }
    }

    /// Raises what a batch left to raise.
    pub(super) fn raise_receive_causes(&mut self) {
        let causes = std::mem::take(&mut self.rx.causes);
        self.raise(causes);
    }

    /// Handles the frame of `length` bytes in the buffer; false when it has to wait.
    fn receive_frame(&mut self, length: usize) -> bool {
        let mut buffer = std::mem::take(&mut self.rx.buffer);
        let fate = self.store(&mut buffer, length);
        self.rx.buffer = buffer;
        match fate {
            Fate::Done => {}
            Fate::NoDescriptors => return false,
            Fate::TooLong => {
                self.regs.count(MPC);
                self.rx.causes |= icr::RXO;
            }
        }
        true
    }

    /// Bytes of a receive buffer (13.4.22, BSIZE and BSEX).
    fn buffer_bytes(&self) -> usize {
        let control = self.regs.get(RCTL);
        let size = 2048 >> (control >> rctl::BSIZE_SHIFT & 3);
        // Size 0 with the extension is reserved.
        if control & rctl::BSEX != 0 && size < 2048 {
            size * 16
        } else {
            size
        }
    }

    fn store(&mut self, buffer: &mut [u8], length: usize) -> Fate {
        let verdict = judge(&self.regs, &buffer[..length]);
        let padded = length.max(MIN_FRAME_BYTES);
        let Verdict::Accept { inexact, tagged } = verdict else {
            self.regs.count_seen(padded + FCS_BYTES);
            if let Verdict::Reject(Some(counter)) = verdict {
                self.regs.count(counter);
            }
            return Fate::Done;
        };
        let strip_tag = tagged && self.regs.is_set(CTRL, ctrl::VME);
        let stored_fcs = if self.regs.is_set(RCTL, rctl::SECRC) {
            0
        } else {
            FCS_BYTES
        };
        let skip = if strip_tag { VLAN_TAG_BYTES } else { 0 };
        let bytes = padded - skip + stored_fcs;
        let buffer_bytes = self.buffer_bytes();
        let needed = bytes.div_ceil(buffer_bytes) as u32;
        let mut ring = Ring::at(&self.regs, RDBAL);
        // One descriptor of a ring is never available: head and tail would be equal.
        if needed >= ring.count {
            self.complain(format_args!(
                "a frame needs {needed} of {} descriptors",
                ring.count
            ));
            return Fate::TooLong;
        }
        let available = ring.available();
        if needed > available {
            return Fate::NoDescriptors;
        }

        self.regs.count_seen(padded + FCS_BYTES);
        self.regs
            .count_received(Cast::of(buffer), padded + FCS_BYTES);
        buffer[length..padded].fill(0);
        if stored_fcs != 0 {
            let sequence = fcs(&buffer[..padded]);
            buffer[padded..padded + FCS_BYTES].copy_from_slice(&sequence);
        }
        let mut status = if inexact { rxd::PIF } else { 0 };
        let mut special = 0;
        if strip_tag {
            special = u16::from_be_bytes([buffer[14], buffer[15]]);
            status |= rxd::VP;
            buffer.copy_within(..12, VLAN_TAG_BYTES);
        }
        let report = rx_checksum::check(&self.regs, &buffer[skip..padded]);
        status |= report.status;
        let data = &buffer[skip..padded + stored_fcs];
        self.write_descriptors(&mut ring, data, buffer_bytes, status, &report, special);
        self.regs.set(RDH, ring.head);

        let threshold = ring.count >> ((self.regs.get(RCTL) >> rctl::RDMTS_SHIFT & 3) + 1).min(3);
        if available > threshold && available - needed <= threshold {
            self.rx.causes |= icr::RXDMT0;
        }
        self.delay_receive_interrupt(bytes);
        Fate::Done
    }

    fn write_descriptors(
        &mut self,
        ring: &mut Ring,
        data: &[u8],
        buffer_bytes: usize,
        status: u8,
        report: &rx_checksum::Report,
        special: u16,
    ) {
        let mut chunks = data.chunks(buffer_bytes).peekable();
        while let Some(chunk) = chunks.next() {
            let at = ring.head_address();
            let last = chunks.peek().is_none();
            let mut address = [0; 8];
            let stored = self.dma.read(at, &mut address).and_then(|()| {
                // A descriptor without a buffer takes the data nowhere.
                match u64::from_le_bytes(address) {
                    0 => Ok(()),
                    address => self.dma.write(address, chunk),
                }
            });
            let status = status | rxd::DD | if last { rxd::EOP } else { 0 };
            let Errors(errors) = report.errors;
            let mut back = [0; 8];
            back[..2].copy_from_slice(&(chunk.len() as u16).to_le_bytes());
            back[2..4].copy_from_slice(&report.packet_checksum.to_le_bytes());
            back[4] = status;
            back[5] = errors;
            back[6..].copy_from_slice(&special.to_le_bytes());
            // The data has to be there before the descriptor says so.
            std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
            if let Err(error) = stored.and_then(|()| self.dma.write(at.wrapping_add(8), &back)) {
                self.complain(format_args!("receive: {error}"));
            }
            ring.advance();
        }
    }

    fn delay_receive_interrupt(&mut self, bytes: usize) {
        let small = self.regs.get(RSRPD);
        if small != 0 && bytes as u64 <= u64::from(small) {
            self.rx.causes |= icr::SRPD;
        }
        match delay_ns(self.regs.get(RDTR)) {
            None => self.rx.causes |= icr::RXT0,
            Some(delay) => {
                self.timers.start(Timer::ReceiveDelay, delay);
                if let Some(absolute) = delay_ns(self.regs.get(RADV)) {
                    self.timers.start_if_idle(Timer::ReceiveAbsolute, absolute);
                }
            }
        }
    }

    /// A receive timer ran out or was flushed: the interrupt comes now if one is due.
    pub(super) fn end_receive_delay(&mut self) {
        self.timers.stop(Timer::ReceiveDelay);
        self.timers.stop(Timer::ReceiveAbsolute);
        self.raise(icr::RXT0);
    }

    /// RDTR was written with FPD: a delayed interrupt is due now.
    pub(super) fn flush_receive_delay(&mut self) {
        let delayed = self.timers.stop(Timer::ReceiveDelay);
        if self.timers.stop(Timer::ReceiveAbsolute) || delayed {
            self.raise(icr::RXT0);
        }
    }
}
