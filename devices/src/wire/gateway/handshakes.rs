//! With which numbers the guest's connections began: what a connection needs to go on elsewhere,
//! and the stack does not tell.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use smoltcp::wire::{EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet};
use smoltcp::wire::{TcpOption, TcpPacket};

/// Handshakes that may be under way; a guest that begins more has those before forgotten.
const BEGUN: usize = 64;
/// Connections that are remembered before those that have ended are forgotten.
const DONE: usize = 256;

/// A connection of the guest to a port of the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Tuple {
    pub(super) guest: Ipv4Addr,
    pub(super) guest_port: u16,
    pub(super) port: u16,
}

/// How a connection began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Handshake {
    pub(super) guest_mac: [u8; 6],
    /// Sequence number of the guest's SYN, and of ours.
    pub(super) guest_sequence: u32,
    pub(super) own_sequence: u32,
    /// Options of the guest's SYN.
    pub(super) max_segment_bytes: Option<u16>,
    pub(super) window_scale: Option<u8>,
    pub(super) selective: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Handshakes {
    begun: BTreeMap<Tuple, Handshake>,
    done: BTreeMap<Tuple, Handshake>,
}

impl Handshakes {
    /// How this connection began.
    pub(super) fn of(&self, tuple: Tuple) -> Option<Handshake> {
        self.done.get(&tuple).copied()
    }

    /// A connection began elsewhere.
    pub(super) fn insert(&mut self, tuple: Tuple, handshake: Handshake) {
        self.done.insert(tuple, handshake);
    }

    /// Whether frames to the guest are to be looked at.
    pub(super) fn under_way(&self) -> bool {
        !self.begun.is_empty()
    }

    /// Looks at a frame from the guest.
    pub(super) fn hear(&mut self, frame: &[u8]) {
        let Some((mac, ip)) = tcp_in(frame) else {
            return;
        };
        let Ok(segment) = TcpPacket::new_checked(ip.payload()) else {
            return;
        };
        if !segment.syn() || segment.ack() {
            return;
        }
        let mut handshake = Handshake {
            guest_mac: mac.0,
            guest_sequence: segment.seq_number().0 as u32,
            own_sequence: 0,
            max_segment_bytes: None,
            window_scale: None,
            selective: false,
        };
        let mut options = segment.options();
        while let Ok((rest, option)) = TcpOption::parse(options) {
            match option {
                TcpOption::EndOfList => break,
                TcpOption::MaxSegmentSize(bytes) => handshake.max_segment_bytes = Some(bytes),
                TcpOption::WindowScale(scale) => handshake.window_scale = Some(scale),
                TcpOption::SackPermitted => handshake.selective = true,
                _ => {}
            }
            options = rest;
            if options.is_empty() {
                break;
            }
        }
        if self.begun.len() >= BEGUN {
            self.begun.clear();
        }
        let tuple = Tuple {
            guest: ip.src_addr(),
            guest_port: segment.src_port(),
            port: segment.dst_port(),
        };
        self.begun.insert(tuple, handshake);
    }

    /// Looks at a frame to the guest, without its VLAN tag. `alive` tells whether there is such a
    /// connection.
    pub(super) fn say(&mut self, frame: &[u8], alive: impl Fn(&Tuple) -> bool) {
        let Some((_, ip)) = tcp_in(frame) else {
            return;
        };
        let Ok(segment) = TcpPacket::new_checked(ip.payload()) else {
            return;
        };
        let tuple = Tuple {
            guest: ip.dst_addr(),
            guest_port: segment.dst_port(),
            port: segment.src_port(),
        };
        if segment.rst() {
            self.begun.remove(&tuple);
        }
        let Some(begun) = self.begun.get(&tuple).filter(|_| segment.syn()) else {
            return;
        };
        if segment.ack_number().0 as u32 != begun.guest_sequence.wrapping_add(1) {
            return;
        }
        let done = Handshake {
            own_sequence: segment.seq_number().0 as u32,
            ..*begun
        };
        self.begun.remove(&tuple);
        if self.done.len() >= DONE {
            self.done.retain(|tuple, _| alive(tuple));
        }
        self.done.insert(tuple, done);
    }
}

/// The sender and the IP packet of a frame that has a TCP segment in it.
fn tcp_in(frame: &[u8]) -> Option<(EthernetAddress, Ipv4Packet<&[u8]>)> {
    let frame = EthernetFrame::new_checked(frame).ok()?;
    if frame.ethertype() != EthernetProtocol::Ipv4 {
        return None;
    }
    let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
    // A segment in fragments begins no connection that anybody needs to keep.
    let whole = !packet.more_frags() && packet.frag_offset() == 0;
    (whole && packet.next_header() == IpProtocol::Tcp).then_some((frame.src_addr(), packet))
}
