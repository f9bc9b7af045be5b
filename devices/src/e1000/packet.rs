//! Packets on their way out: gathering from descriptors, checksum insertion, VLAN tags, TCP
//! segmentation (3.3 to 3.5).
//!
//! ```text
//!   context descriptor ──► one of two contexts: segmentation (TSE), other
//!   legacy or data descriptors ──► packet data ── EOP ──► finished in place, sent
//!                                                  └ TSE ─► header + payload ──► segments, sent
//! ```

use serde::{Deserialize, Serialize};

use super::E1000;
use super::checksum::insert;
use super::filter::{FCS_BYTES, HEADER_BYTES};
use super::headers::{Context, POPTS_IXSM, POPTS_TXSM, TAG_BYTES, fix_up, insert_tag};
use super::regs::{CTRL, TCTL, VET, ctrl, tctl};
use super::rx::MIN_FRAME_BYTES;
use super::stats::{Cast, TSCTC, TSCTFC};
use super::tx_descriptor::{Budget, command};
use crate::wire::{MAX_FRAME_BYTES, SendOutcome};

/// Longest packet that the controller sends without segmentation, in bytes (3.3.3, 16288).
const MAX_PACKET_BYTES: usize = 16288;
/// Packet data that is kept allocated, in bytes; what a segmented packet needed beyond is given
/// back.
const KEPT_BYTES: usize = 96 << 10;

/// Descriptor types of extended descriptors, bits 23:20 of the third word.
const DTYP_CONTEXT: u32 = 0;
const DTYP_DATA: u32 = 1;

/// What the descriptors of the packet said so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Options {
    /// A descriptor of the packet was seen.
    started: bool,
    popts: u8,
    segment: bool,
    /// Tag to insert.
    vlan: Option<u16>,
    /// Checksum start and offset of a legacy descriptor.
    legacy_checksum: Option<(u8, u8)>,
    /// More data than a packet can have: it will not be sent.
    too_long: bool,
    /// The data is finished (checksums, tag, padding) and only has to be sent; it begins here.
    finished_at: Option<u32>,
    /// Payload bytes and segments that were sent.
    sent_bytes: u32,
    sent_segments: u32,
}

/// What the transmitter has besides registers.
#[derive(Debug, Default)]
pub struct Transmitter {
    other: Context,
    segmentation: Context,
    options: Options,
    /// Packet data after `TAG_BYTES`, `filled` bytes of it.
    data: Vec<u8>,
    filled: usize,
    /// The segment that is built.
    segment: Vec<u8>,
    /// The descriptor at the head ends the packet and was taken; the packet is not all sent.
    pub ending: bool,
    /// The wire was full.
    pub stalled: bool,
}

/// [`Transmitter`] in a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransmitterState {
    other: Context,
    segmentation: Context,
    options: Options,
    data: Vec<u8>,
    ending: bool,
    stalled: bool,
}

impl Transmitter {
    /// Forgets the packet that is gathered or sent.
    pub fn abandon_packet(&mut self) {
        self.options = Options::default();
        self.filled = 0;
        self.ending = false;
        self.stalled = false;
        if self.data.len() > KEPT_BYTES {
            self.data.truncate(KEPT_BYTES);
            self.data.shrink_to_fit();
        }
    }

    /// Forgets packet and contexts.
    pub fn reset(&mut self) {
        self.abandon_packet();
        self.other = Context::default();
        self.segmentation = Context::default();
    }

    /// For a checkpoint.
    pub fn save(&self) -> TransmitterState {
        TransmitterState {
            other: self.other,
            segmentation: self.segmentation,
            options: self.options,
            data: self.data[..self.data.len().min(TAG_BYTES + self.filled)].to_vec(),
            ending: self.ending,
            stalled: self.stalled,
        }
    }

    /// From a checkpoint; `None` where it cannot be one.
    pub fn restore(state: TransmitterState) -> Option<Self> {
        let longest = MAX_PACKET_BYTES.max(u8::MAX as usize + 0xf_ffff) + TAG_BYTES;
        let start = state.options.finished_at.unwrap_or(0) as usize;
        if state.data.len() > longest || start > TAG_BYTES.min(state.data.len()) {
            return None;
        }
        Some(Self {
            other: state.other,
            segmentation: state.segmentation,
            options: state.options,
            filled: state.data.len().saturating_sub(TAG_BYTES),
            data: state.data,
            segment: Vec::new(),
            ending: state.ending,
            stalled: state.stalled,
        })
    }

    /// Makes room for `length` more bytes of packet data and gives it.
    fn grow(&mut self, length: usize) -> &mut [u8] {
        let start = TAG_BYTES + self.filled;
        let end = start + length;
        if self.data.len() < end {
            self.data.resize(end.next_power_of_two(), 0);
        }
        self.filled += length;
        &mut self.data[start..end]
    }
}

/// How far sending a packet came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All of it is sent, or dropped.
    Sent,
    /// The wire is full.
    Full,
    /// The call did enough.
    OutOfBudget,
}

impl E1000 {
    /// Takes a descriptor into the packet; true when it ends it.
    pub(super) fn take_descriptor(&mut self, descriptor: &[u8; 16], budget: &mut Budget) -> bool {
        let u32_at = |at: usize| {
            u32::from_le_bytes([
                descriptor[at],
                descriptor[at + 1],
                descriptor[at + 2],
                descriptor[at + 3],
            ])
        };
        let address = u64::from(u32_at(4)) << 32 | u64::from(u32_at(0));
        let (lower, upper) = (u32_at(8), u32_at(12));
        let kind = lower >> 20 & 0xf;
        let extended = lower & command::DEXT != 0;
        if extended && kind == DTYP_CONTEXT {
            let context = Context::decode(descriptor, lower);
            if lower & command::TSE != 0 {
                self.tx.segmentation = context;
            } else {
                self.tx.other = context;
            }
            return false;
        }
        if extended && kind != DTYP_DATA {
            self.complain(format_args!("transmit descriptor of unknown type {kind}"));
            return false;
        }
        let first = !std::mem::replace(&mut self.tx.options.started, true);
        let vlan_mode = self.regs.is_set(CTRL, ctrl::VME);
        let options = &mut self.tx.options;
        if lower & command::VLE != 0 && vlan_mode {
            options.vlan = Some((upper >> 16) as u16);
        }
        let length = if extended {
            if first {
                options.popts = (upper >> 8) as u8;
                options.segment = lower & command::TSE != 0;
            }
            lower & 0xf_ffff
        } else {
            if lower & command::IC != 0 {
                options.legacy_checksum = Some(((upper >> 8) as u8, (lower >> 16) as u8));
            }
            lower & 0xffff
        };
        self.gather(address, length as usize, budget);
        lower & command::EOP != 0
    }

    /// Reads `length` bytes of packet data.
    fn gather(&mut self, address: u64, length: usize, budget: &mut Budget) {
        let limit = if self.tx.options.segment {
            let context = &self.tx.segmentation;
            usize::from(context.hdrlen) + context.paylen as usize
        } else {
            MAX_PACKET_BYTES
        };
        let room = limit.saturating_sub(self.tx.filled);
        if length > room && !self.tx.options.segment {
            self.tx.options.too_long = true;
            return;
        }
        // What goes beyond the announced payload of a segmented packet is not part of it.
        let length = length.min(room);
        budget.spend_bytes(length);
        let data = self.tx.grow(length);
        if let Err(error) = self.dma.read(address, data) {
            self.tx.options.too_long = true;
            self.complain(format_args!("transmit data: {error}"));
        }
    }

    /// Sends the packet, or what is left of it.
    pub(super) fn send_packet(&mut self, budget: &mut Budget) -> Progress {
        self.tx.stalled = false;
        let progress = if self.tx.options.too_long {
            self.complain(format_args!(
                "a packet that cannot be read or is too long is not sent"
            ));
            Progress::Sent
        } else if self.tx.options.segment {
            let mut segment = std::mem::take(&mut self.tx.segment);
            let progress = self.send_segments(&mut segment, budget);
            self.tx.segment = segment;
            progress
        } else {
            self.send_whole(budget)
        };
        match progress {
            Progress::Sent => self.tx.abandon_packet(),
            Progress::Full => self.tx.stalled = true,
            Progress::OutOfBudget => {}
        }
        progress
    }

    fn send_whole(&mut self, budget: &mut Budget) -> Progress {
        if self.tx.filled < HEADER_BYTES {
            let filled = self.tx.filled;
            if filled != 0 {
                self.complain(format_args!("a packet of {filled} bytes is not sent"));
            }
            return Progress::Sent;
        }
        if self.tx.options.finished_at.is_none() {
            self.finish_whole();
        }
        let start = self.tx.options.finished_at.unwrap_or(0) as usize;
        let data = std::mem::take(&mut self.tx.data);
        let frame = data.get(start..TAG_BYTES + self.tx.filled).unwrap_or(&[]);
        budget.spend_bytes(frame.len());
        let sent = self.send_frame(frame);
        self.tx.data = data;
        if sent { Progress::Sent } else { Progress::Full }
    }

    /// Inserts checksums and tag, pads.
    fn finish_whole(&mut self) {
        let options = self.tx.options;
        let context = self.tx.other;
        let frame = &mut self.tx.data[TAG_BYTES..TAG_BYTES + self.tx.filled];
        if let Some((start, offset)) = options.legacy_checksum {
            insert(frame, start, offset, 0, false);
        }
        if options.popts & POPTS_IXSM != 0 {
            insert(frame, context.ipcss, context.ipcso, context.ipcse, false);
        }
        if options.popts & POPTS_TXSM != 0 {
            insert(
                frame,
                context.tucss,
                context.tucso,
                context.tucse,
                !context.tcp,
            );
        }
        let mut start = TAG_BYTES;
        if let Some(tag) = options.vlan {
            insert_tag(&mut self.tx.data, self.regs.get(VET) as u16, tag);
            start = 0;
        }
        let length = TAG_BYTES + self.tx.filled - start;
        if length < MIN_FRAME_BYTES && self.regs.is_set(TCTL, tctl::PSP) {
            self.tx.grow(MIN_FRAME_BYTES - length).fill(0);
        }
        self.tx.options.finished_at = Some(start as u32);
    }

    fn send_segments(&mut self, segment: &mut Vec<u8>, budget: &mut Budget) -> Progress {
        let context = self.tx.segmentation;
        let (header, mss) = (usize::from(context.hdrlen), usize::from(context.mss));
        let possible = mss != 0
            && header >= HEADER_BYTES
            && header <= self.tx.filled
            && header + mss <= MAX_FRAME_BYTES - TAG_BYTES;
        if !possible {
            self.regs.count(TSCTFC);
            let filled = self.tx.filled;
            self.complain(format_args!(
                "segmentation with a header of {header} of {filled} bytes and segments of {mss} bytes"
            ));
            return Progress::Sent;
        }
        let payload = self.tx.filled - header;
        loop {
            let from = (self.tx.options.sent_bytes as usize).min(payload);
            let to = payload.min(from + mss);
            if budget.is_spent() {
                return Progress::OutOfBudget;
            }
            segment.clear();
            segment.resize(TAG_BYTES, 0);
            let data = &self.tx.data[TAG_BYTES..];
            segment.extend_from_slice(&data[..header]);
            segment.extend_from_slice(&data[header + from..header + to]);
            let options = self.tx.options;
            fix_up(
                &context,
                options.popts,
                options.sent_segments,
                to == payload,
                from,
                segment,
            );
            let mut start = TAG_BYTES;
            if let Some(tag) = options.vlan {
                insert_tag(segment, self.regs.get(VET) as u16, tag);
                start = 0;
            }
            if segment.len() - start < MIN_FRAME_BYTES && self.regs.is_set(TCTL, tctl::PSP) {
                segment.resize(start + MIN_FRAME_BYTES, 0);
            }
            // A segment costs at least as much as copying its headers.
            budget.spend_bytes((to - from).max(512));
            if !self.send_frame(&segment[start..]) {
                return Progress::Full;
            }
            self.tx.options.sent_bytes = to as u32;
            self.tx.options.sent_segments = options.sent_segments.wrapping_add(1);
            if to == payload {
                self.regs.count(TSCTC);
                return Progress::Sent;
            }
        }
    }

    /// Hands a frame to the wire or back to the receiver; false when the wire is full.
    fn send_frame(&mut self, frame: &[u8]) -> bool {
        if self.in_loopback() {
            self.receive_loopback(frame);
        } else {
            match self.wire.send(frame) {
                SendOutcome::Sent => {}
                SendOutcome::Full => return false,
                SendOutcome::Dropped => self.update_link(),
            }
        }
        // A frame that nobody takes left this station all the same.
        self.regs
            .count_transmitted(Cast::of(frame), frame.len() + FCS_BYTES);
        true
    }
}
