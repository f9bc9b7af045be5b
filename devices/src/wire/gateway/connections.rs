//! The guest's connections as values, and sockets that go on from them.
//!
//! `smoltcp` neither gives a connection away nor takes one. What is kept of one is the numbers that
//! it began with, how many bytes have gone each way, and those that are under way. A socket that
//! goes on from there is made by a *rehearsal*: in a stack of its own, where nobody hears it, it is
//! led through a handshake whose numbers are those of where the connection is now, and is given
//! what the guest had sent and nobody had taken. Then it moves to the network's own stack.
//!
//! ```text
//!   guest's side, made up here                          socket
//!     SYN  seq = next that is expected - 1   ─────────►  listen
//!                                            ◄─────────  SYN-ACK seq = oldest unacknowledged - 1
//!     ACK, data not taken yet, FIN if it came ────────►  established
//!                                                        data that the guest has not acknowledged: sent again
//! ```
//!
//! The socket's first number is the second that the stack's random number generator gives, so the
//! generator is seeded to give the wanted one ([`seed_for`]); a socket with another number is not
//! used.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{Socket, tcp};
use smoltcp::time::Instant;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, HardwareAddress, IpAddress, IpCidr, IpProtocol, Ipv4Cidr, Ipv4Packet, Ipv4Repr,
    TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
};

use super::handshakes::{Handshake, Tuple};
use super::port::{Outbox, Port};

/// Bytes of a segment that the guest's side is made to say.
const SEGMENT_BYTES: usize = 1024;
/// What a guest is taken to have room for, until it says so itself.
const WINDOW_BYTES: u32 = 1024;

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Phase {
    /// The guest has not acknowledged our SYN.
    Opening,
    /// Both sides may send.
    Open,
    /// The guest has sent everything.
    GuestClosed,
    /// So have we.
    Closing,
}

/// What is kept of a connection besides what its service knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ConnectionState {
    pub(super) tuple: Tuple,
    pub(super) handshake: Handshake,
    pub(super) phase: Phase,
    /// Bytes of the guest that the service has taken, and bytes that it has sent to it.
    pub(super) taken_bytes: u64,
    pub(super) written_bytes: u64,
    /// Bytes of the guest that the service has not taken.
    pub(super) received: Vec<u8>,
    /// Bytes to the guest that it has not acknowledged.
    pub(super) under_way: Vec<u8>,
}

impl ConnectionState {
    /// Sequence number of the first byte of `received`.
    fn guest_next(&self) -> u32 {
        let start = self.handshake.guest_sequence.wrapping_add(1);
        start.wrapping_add(self.taken_bytes as u32)
    }

    fn guest_has_closed(&self) -> bool {
        matches!(self.phase, Phase::GuestClosed | Phase::Closing)
    }

    /// Sequence number of the first byte of `under_way`.
    fn own_next(&self) -> u32 {
        let start = self.handshake.own_sequence.wrapping_add(1);
        let acknowledged = self.written_bytes.wrapping_sub(self.under_way.len() as u64);
        start.wrapping_add(acknowledged as u32)
    }
}

/// Our end of a network.
#[derive(Debug, Clone, Copy)]
pub(super) struct OwnEnd {
    pub(super) mac: [u8; 6],
    pub(super) address: Ipv4Addr,
    pub(super) prefix_len: u8,
    pub(super) mtu_bytes: usize,
}

/// `socket`, which is as new, going on from `state`; `None` if it cannot.
pub(super) fn revive(
    own: OwnEnd,
    state: &ConnectionState,
    socket: tcp::Socket<'static>,
    now: Instant,
) -> Option<tcp::Socket<'static>> {
    let mut rehearsal = Rehearsal::new(own, state, socket, now)?;
    let guest = GuestEnd { own, state };
    let guest_next = state.guest_next();
    rehearsal.hear(&guest.arp(), now);
    let synchronize = TcpRepr {
        control: TcpControl::Syn,
        seq_number: number(guest_next.wrapping_sub(1)),
        ack_number: None,
        window_scale: state.handshake.window_scale,
        max_seg_size: state.handshake.max_segment_bytes,
        sack_permitted: state.handshake.selective,
        ..guest.segment()
    };
    let answers = rehearsal.hear(&guest.frame(&synchronize), now);
    if !answers.iter().any(|frame| answers_with(frame, state)) {
        return None;
    }
    if state.phase == Phase::Opening {
        return rehearsal.end();
    }
    let acknowledge = TcpRepr {
        seq_number: number(guest_next),
        ..guest.segment()
    };
    rehearsal.hear(&guest.frame(&acknowledge), now);
    let mut sequence = guest_next;
    for payload in state.received.chunks(SEGMENT_BYTES) {
        let data = TcpRepr {
            seq_number: number(sequence),
            payload,
            ..guest.segment()
        };
        rehearsal.hear(&guest.frame(&data), now);
        sequence = sequence.wrapping_add(payload.len() as u32);
    }
    if state.guest_has_closed() {
        let finish = TcpRepr {
            control: TcpControl::Fin,
            seq_number: number(sequence),
            ..guest.segment()
        };
        rehearsal.hear(&guest.frame(&finish), now);
    }
    let socket = rehearsal.socket();
    if socket.recv_queue() != state.received.len() || !socket.may_send() {
        return None;
    }
    // Not before: nothing of it may be sent here, or the guest would get it only when it is sent
    // again.
    if !state.under_way.is_empty()
        && socket.send_slice(&state.under_way) != Ok(state.under_way.len())
    {
        return None;
    }
    if state.phase == Phase::Closing {
        socket.close();
    }
    rehearsal.end()
}

/// A stack with one socket that hears only what it is to hear.
struct Rehearsal {
    own: OwnEnd,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    outbox: Outbox,
}

impl Rehearsal {
    fn new(
        own: OwnEnd,
        state: &ConnectionState,
        mut socket: tcp::Socket<'static>,
        now: Instant,
    ) -> Option<Self> {
        let mut outbox = Outbox::new(SEGMENT_BYTES);
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(own.mac)));
        config.random_seed = seed_for(state.own_next().wrapping_sub(1));
        let mut port = Port::new(None, &mut outbox, None, own.mtu_bytes);
        let mut interface = Interface::new(config, &mut port, now);
        interface.update_ip_addrs(|addresses| {
            // An interface of `smoltcp` has room for at least one address.
            let _ = addresses.push(IpCidr::Ipv4(Ipv4Cidr::new(own.address, own.prefix_len)));
        });
        socket.listen(state.tuple.port).ok()?;
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(socket);
        Some(Self {
            own,
            interface,
            sockets,
            handle,
            outbox,
        })
    }

    /// The stack hears `frame`; what it says.
    fn hear(&mut self, frame: &[u8], now: Instant) -> Vec<Vec<u8>> {
        let mut port = Port::new(Some(frame), &mut self.outbox, None, self.own.mtu_bytes);
        self.interface.poll(now, &mut port, &mut self.sockets);
        std::iter::from_fn(|| self.outbox.pop())
            .map(|outgoing| outgoing.frame)
            .collect()
    }

    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// The socket as it is now.
    fn end(mut self) -> Option<tcp::Socket<'static>> {
        match self.sockets.remove(self.handle) {
            Socket::Tcp(socket) => Some(socket),
            Socket::Udp(_) => None,
        }
    }
}

/// The guest's end of a connection, as far as it can be known from ours.
pub(super) struct GuestEnd<'a> {
    pub(super) own: OwnEnd,
    pub(super) state: &'a ConnectionState,
}

impl GuestEnd<'_> {
    /// A frame that has a connection that goes on say how far it is: the guest may have been
    /// promised an acknowledgement that was not on its way yet. As a question whether the other end
    /// is still there.
    pub(super) fn question(&self) -> Vec<u8> {
        let heard = self.state.received.len() as u32 + u32::from(self.state.guest_has_closed());
        let next = self.state.guest_next().wrapping_add(heard);
        self.frame(&TcpRepr {
            seq_number: number(next.wrapping_sub(1)),
            ..self.segment()
        })
    }

    /// A segment of the guest that acknowledges everything before what is under way.
    fn segment(&self) -> TcpRepr<'static> {
        let scale = self.state.handshake.window_scale.unwrap_or(0).min(14);
        TcpRepr {
            src_port: self.state.tuple.guest_port,
            dst_port: self.state.tuple.port,
            control: TcpControl::None,
            seq_number: number(0),
            ack_number: Some(number(self.state.own_next())),
            window_len: (WINDOW_BYTES >> scale).max(1) as u16,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        }
    }

    /// The frame that the guest would send a segment in.
    fn frame(&self, segment: &TcpRepr<'_>) -> Vec<u8> {
        let checksums = ChecksumCapabilities::default();
        let ip = Ipv4Repr {
            src_addr: self.state.tuple.guest,
            dst_addr: self.own.address,
            next_header: IpProtocol::Tcp,
            payload_len: segment.buffer_len(),
            hop_limit: 64,
        };
        let length = ip.buffer_len() + segment.buffer_len();
        let to = EthernetAddress(self.own.mac);
        self.ethernet(to, EthernetProtocol::Ipv4, length, |payload| {
            let mut packet = Ipv4Packet::new_unchecked(payload);
            ip.emit(&mut packet, &checksums);
            segment.emit(
                &mut TcpPacket::new_unchecked(packet.payload_mut()),
                &IpAddress::Ipv4(ip.src_addr),
                &IpAddress::Ipv4(ip.dst_addr),
                &checksums,
            );
        })
    }

    /// The guest's question for our address, by which a stack learns of the guest's.
    fn arp(&self) -> Vec<u8> {
        arp_request(
            self.own,
            self.state.handshake.guest_mac,
            self.state.tuple.guest,
        )
    }

    fn ethernet(
        &self,
        dst_addr: EthernetAddress,
        ethertype: EthernetProtocol,
        payload_len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Vec<u8> {
        ethernet(
            EthernetRepr {
                src_addr: EthernetAddress(self.state.handshake.guest_mac),
                dst_addr,
                ethertype,
            },
            payload_len,
            fill,
        )
    }
}

/// The question of the host at `address` for ours.
pub(super) fn arp_request(own: OwnEnd, mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let arp = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: EthernetAddress(mac),
        source_protocol_addr: address,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: own.address,
    };
    let header = EthernetRepr {
        src_addr: EthernetAddress(mac),
        dst_addr: EthernetAddress::BROADCAST,
        ethertype: EthernetProtocol::Arp,
    };
    ethernet(header, arp.buffer_len(), |payload| {
        arp.emit(&mut ArpPacket::new_unchecked(payload));
    })
}

fn ethernet(header: EthernetRepr, payload_len: usize, fill: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut frame = vec![0; header.buffer_len() + payload_len];
    let mut view = EthernetFrame::new_unchecked(&mut frame[..]);
    header.emit(&mut view);
    fill(view.payload_mut());
    frame
}

fn number(value: u32) -> TcpSeqNumber {
    TcpSeqNumber(value as i32)
}

/// Whether `frame` is the SYN-ACK of a connection that goes on from `state`.
fn answers_with(frame: &[u8], state: &ConnectionState) -> bool {
    let Ok(frame) = EthernetFrame::new_checked(frame) else {
        return false;
    };
    let Ok(packet) = Ipv4Packet::new_checked(frame.payload()) else {
        return false;
    };
    TcpPacket::new_checked(packet.payload()).is_ok_and(|segment| {
        segment.syn()
            && segment.ack()
            && segment.seq_number().0 as u32 == state.own_next().wrapping_sub(1)
    })
}

/// Multiplier and increment of the generator in `smoltcp::rand` (sPCG32), whose output is 32 bits
/// of its state.
const MULTIPLIER: u64 = 0xbb2e_fcec_3c39_611d;
const INCREMENT: u64 = 0x7590_ef39;

/// The seed of a stack whose first connection gets the sequence number `wanted`: a new stack takes
/// one number for itself, which must not be zero in 16 bits, and the second is the connection's.
fn seed_for(wanted: u32) -> u64 {
    let inverse = inverse(MULTIPLIER);
    let before = |state: u64| state.wrapping_sub(INCREMENT).wrapping_mul(inverse);
    // With the upper three bits zero the output is what lies above the lower 29.
    let states = (0..1 << 29).map(|low: u64| u64::from(wanted) << 29 | low);
    let first = states.map(before).find(|first| {
        let output = (first >> (29 - (first >> 61))) as u32;
        (output ^ output >> 16) as u16 != 0
    });
    before(first.unwrap_or_default())
}

/// What `odd` is to be multiplied with to give one, by Newton's iteration.
fn inverse(odd: u64) -> u64 {
    let mut result = odd;
    for _ in 0..6 {
        result = result.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(result)));
    }
    result
}
