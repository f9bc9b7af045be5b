//! Where a network's stack meets the wire: a frame that comes in, and the frames that wait for the
//! guest.
//!
//! ```text
//!   frame from the guest ──► Incoming ──► Port ──► smoltcp
//!                                          │
//!   guest ◄── Outbox (bounded) ◄───────────┘ tagged for the network's VLAN
//! ```

use std::collections::VecDeque;

use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

/// Shortest Ethernet frame without FCS (IEEE 802.3, clause 3.2.7): shorter ones are padded.
const MIN_FRAME_BYTES: usize = 60;
const ETHERNET_HEADER_BYTES: usize = 14;
/// Destination and source address: a VLAN tag comes behind them.
const ADDRESSES_BYTES: usize = 12;
const VLAN_TAG_BYTES: usize = 4;
const ETHERTYPE_VLAN: [u8; 2] = [0x81, 0x00];

/// A frame on its way to the guest.
pub(super) struct Outgoing {
    pub(super) frame: Vec<u8>,
    /// An echo request of the probe: of use only while it is fresh.
    pub(super) probe: bool,
}

/// Frames for the guest, bounded.
pub(super) struct Outbox {
    frames: VecDeque<Outgoing>,
    limit: usize,
    /// A stack wanted to send and could not.
    pub(super) blocked: bool,
}

impl Outbox {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            frames: VecDeque::new(),
            limit: limit.max(2),
            blocked: false,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.frames.len() >= self.limit
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Whether so much room came back that it is worth to wake who waited for it.
    pub(super) fn is_half_empty(&self) -> bool {
        self.frames.len() <= self.limit / 2
    }

    /// The frames that wait, without those that are of use only while they are fresh.
    pub(super) fn lasting(&self) -> impl Iterator<Item = &[u8]> {
        let lasting = self.frames.iter().filter(|outgoing| !outgoing.probe);
        lasting.map(|outgoing| outgoing.frame.as_slice())
    }

    /// Frames that can wait.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Holds these frames and no other.
    pub(super) fn replace(&mut self, frames: Vec<Vec<u8>>) {
        let probe = false;
        self.frames = frames
            .into_iter()
            .map(|frame| Outgoing { frame, probe })
            .collect();
    }

    pub(super) fn pop(&mut self) -> Option<Outgoing> {
        self.frames.pop_front()
    }

    pub(super) fn clear(&mut self) {
        self.frames.clear();
    }

    /// Adds a probe in place of one that the guest has not taken yet, so that a guest that comes
    /// back finds one fresh probe and not a queue of old ones.
    pub(super) fn replace_probe(&mut self, frame: Vec<u8>) {
        self.frames.retain(|outgoing| !outgoing.probe);
        if !self.is_full() {
            self.push(frame, true);
        }
    }

    /// How many frames wait.
    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    /// The frames that wait, but for the oldest `first`.
    pub(super) fn after(&self, first: usize) -> impl Iterator<Item = &[u8]> {
        let frames = self.frames.iter().skip(first);
        frames.map(|outgoing| outgoing.frame.as_slice())
    }

    fn push(&mut self, mut frame: Vec<u8>, probe: bool) {
        if frame.len() < MIN_FRAME_BYTES {
            frame.resize(MIN_FRAME_BYTES, 0);
        }
        self.frames.push_back(Outgoing { frame, probe });
    }
}

/// A frame from the guest, without its VLAN tag.
pub(super) struct Incoming<'a> {
    /// `None` for an untagged or priority-tagged frame.
    pub(super) vlan: Option<u16>,
    pub(super) frame: std::borrow::Cow<'a, [u8]>,
}

impl<'a> Incoming<'a> {
    /// Takes a VLAN tag off `frame`; `None` when it is too short to be one.
    pub(super) fn parse(frame: &'a [u8]) -> Option<Self> {
        let ethertype = frame.get(ADDRESSES_BYTES..ETHERNET_HEADER_BYTES)?;
        if ethertype != ETHERTYPE_VLAN {
            return Some(Self {
                vlan: None,
                frame: frame.into(),
            });
        }
        let tag = frame.get(ETHERNET_HEADER_BYTES..ETHERNET_HEADER_BYTES + 2)?;
        let id = u16::from_be_bytes([tag[0], tag[1]]) & 0xfff;
        let mut untagged = frame[..ADDRESSES_BYTES].to_vec();
        untagged.extend_from_slice(frame.get(ADDRESSES_BYTES + VLAN_TAG_BYTES..)?);
        Some(Self {
            vlan: (id != 0).then_some(id),
            frame: untagged.into(),
        })
    }
}

/// The stack's side of the wire during one run.
pub(super) struct Port<'a> {
    incoming: Option<&'a [u8]>,
    outbox: &'a mut Outbox,
    vlan: Option<u16>,
    mtu_bytes: usize,
}

impl<'a> Port<'a> {
    /// One that brings `incoming` and takes frames into `outbox`, tagged for `vlan`.
    pub(super) fn new(
        incoming: Option<&'a [u8]>,
        outbox: &'a mut Outbox,
        vlan: Option<u16>,
        mtu_bytes: usize,
    ) -> Self {
        Self {
            incoming,
            outbox,
            vlan,
            mtu_bytes,
        }
    }
}

impl phy::Device for Port<'_> {
    type RxToken<'b>
        = Received<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Slot<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Slot<'_>)> {
        if self.outbox.is_full() {
            return None;
        }
        let frame = self.incoming.take()?;
        Some((
            Received(frame),
            Slot {
                outbox: self.outbox,
                vlan: self.vlan,
            },
        ))
    }

    fn transmit(&mut self, _: Instant) -> Option<Slot<'_>> {
        if self.outbox.is_full() {
            self.outbox.blocked = true;
            return None;
        }
        Some(Slot {
            outbox: self.outbox,
            vlan: self.vlan,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu_bytes + ETHERNET_HEADER_BYTES;
        capabilities
    }
}

/// A frame that a stack takes.
pub(super) struct Received<'a>(&'a [u8]);

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for one frame in the outbox.
pub(super) struct Slot<'a> {
    outbox: &'a mut Outbox,
    vlan: Option<u16>,
}

impl phy::TxToken for Slot<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let Some(id) = self.vlan else {
            let mut frame = vec![0; length];
            let result = f(&mut frame);
            self.outbox.push(frame, false);
            return result;
        };
        let mut frame = vec![0; length + VLAN_TAG_BYTES];
        let result = f(&mut frame[VLAN_TAG_BYTES..]);
        if length >= ADDRESSES_BYTES {
            frame.copy_within(VLAN_TAG_BYTES..VLAN_TAG_BYTES + ADDRESSES_BYTES, 0);
            frame[ADDRESSES_BYTES..ETHERNET_HEADER_BYTES].copy_from_slice(&ETHERTYPE_VLAN);
            frame[ETHERNET_HEADER_BYTES..ETHERNET_HEADER_BYTES + 2]
                .copy_from_slice(&id.to_be_bytes());
        }
        self.outbox.push(frame, false);
        result
    }
}
