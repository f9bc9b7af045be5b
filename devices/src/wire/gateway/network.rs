//! One IP network of the gateway: a `smoltcp` stack that is handed one frame at a time.
//!
//! ```text
//!   frame from the guest ──► Network::run ──► smoltcp ──► services
//!                                                │
//!   Outbox (bounded, shared by all networks) ◄───┘ tagged for the network's VLAN
//! ```
//!
//! Nothing is queued on the way in: a frame is taken only while the outbox has room for an answer
//! to it, and is done with when `run` returns.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;

use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::{
    ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, HardwareAddress, IpCidr,
    Ipv4Cidr,
};

use super::connections::{ConnectionState, GuestEnd, OwnEnd, arp_request, revive};
use super::dhcp::DhcpServer;
use super::handshakes::Handshakes;
use super::services::{ServiceState, Services};
use super::{GatewayConfig, NetworkConfig};

/// Shortest Ethernet frame without FCS (IEEE 802.3, clause 3.2.7): shorter ones are padded.
const MIN_FRAME_BYTES: usize = 60;
const ETHERNET_HEADER_BYTES: usize = 14;
/// Destination and source address: a VLAN tag comes behind them.
const ADDRESSES_BYTES: usize = 12;
const VLAN_TAG_BYTES: usize = 4;
const ETHERTYPE_VLAN: [u8; 2] = [0x81, 0x00];
/// How often services and stack take turns before the event loop gets one.
const ROUNDS: usize = 8;
/// Room for the answer to a made-up question, which nobody hears.
const UNHEARD_FRAMES: usize = 8;
/// Hosts that are noted; a guest that pretends to be more has those before forgotten.
const HOSTS: usize = 64;

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

/// See the module.
pub(super) struct Network {
    pub(super) vlan: Option<u16>,
    own: OwnEnd,
    handshakes: Handshakes,
    hosts: BTreeMap<Ipv4Addr, [u8; 6]>,
    interface: Interface,
    sockets: SocketSet<'static>,
    services: Services,
}

impl Network {
    pub(super) fn new(config: &GatewayConfig, network: &NetworkConfig, now: Instant) -> Self {
        let mtu_bytes = usize::from(config.mtu_bytes);
        let mut outbox = Outbox::new(0);
        let mut port = Port::new(None, &mut outbox, None, mtu_bytes);
        let mac = HardwareAddress::Ethernet(EthernetAddress(config.mac));
        let mut interface_config = Config::new(mac);
        interface_config.random_seed = now.total_micros() as u64;
        let mut interface = Interface::new(interface_config, &mut port, now);
        let cidr = Ipv4Cidr::new(network.address, network.prefix_len);
        interface.update_ip_addrs(|addresses| {
            // An interface of `smoltcp` has room for at least one address.
            let _ = addresses.push(IpCidr::Ipv4(cidr));
        });
        let leases = DhcpServer::new(network.address, cidr.netmask(), network.guest_address);
        let mut sockets = SocketSet::new(Vec::new());
        let services = Services::new(leases, &mut sockets);
        Self {
            vlan: network.vlan,
            own: OwnEnd {
                mac: config.mac,
                address: network.address,
                prefix_len: network.prefix_len,
                mtu_bytes,
            },
            handshakes: Handshakes::default(),
            hosts: BTreeMap::new(),
            interface,
            sockets,
            services,
        }
    }

    /// This network of the gateway made with `config` as it is when it is made.
    pub(super) fn anew(&self, config: &GatewayConfig, now: Instant) -> Self {
        let own = NetworkConfig {
            vlan: self.vlan,
            address: self.own.address,
            prefix_len: self.own.prefix_len,
            guest_address: self.services.leases().first(),
        };
        Self::new(config, &own, now)
    }

    /// Lets the stack take `frame`, if there is one, and send what it has.
    pub(super) fn run(&mut self, now: Instant, frame: Option<&[u8]>, outbox: &mut Outbox) {
        if let Some(frame) = frame {
            self.handshakes.hear(frame);
            self.note_host(frame);
        }
        let before = outbox.frames.len();
        let mut port = Port::new(frame, outbox, self.vlan, self.own.mtu_bytes);
        self.interface.poll(now, &mut port, &mut self.sockets);
        for _ in 0..ROUNDS {
            if !self.services.run(&mut self.sockets) {
                break;
            }
            let mut sent = false;
            while self
                .interface
                .poll_egress(now, &mut port, &mut self.sockets)
                != PollResult::None
            {
                sent = true;
            }
            if !sent {
                break;
            }
        }
        if self.handshakes.under_way() {
            self.note_handshakes(outbox, before);
        }
    }

    /// Looks at the frames of `outbox` from `first` on.
    fn note_handshakes(&mut self, outbox: &Outbox, first: usize) {
        let (services, sockets) = (&self.services, &self.sockets);
        for outgoing in outbox.frames.iter().skip(first) {
            if let Some(untagged) = Incoming::parse(&outgoing.frame) {
                let alive = |tuple: &_| services.has(tuple, sockets);
                self.handshakes.say(&untagged.frame, alive);
            }
        }
    }

    /// The connections and what their services know of them.
    pub(super) fn connections(&mut self) -> Vec<(ServiceState, ConnectionState)> {
        let handshakes = &self.handshakes;
        self.services
            .connections(&mut self.sockets, |tuple| handshakes.of(tuple))
    }

    /// Goes on with these connections, as a network that has none yet, and has them say so in
    /// `outbox`; `false` if it cannot have as many. One that cannot be gone on with is lost: the
    /// guest finds it reset.
    pub(super) fn go_on_with(
        &mut self,
        connections: &[(ServiceState, ConnectionState)],
        outbox: &mut Outbox,
        now: Instant,
    ) -> bool {
        for (service, state) in connections {
            let Some(socket) = self.services.socket_for(service, state) else {
                return false;
            };
            let Some(socket) = revive(self.own, state, socket, now) else {
                tracing::warn!(port = state.tuple.port, "gateway lost a connection");
                continue;
            };
            self.handshakes.insert(state.tuple, state.handshake);
            self.services
                .go_on_with(service, state, socket, &mut self.sockets);
            let own = self.own;
            let guest = GuestEnd { own, state };
            let question = guest.question();
            let mut port = Port::new(Some(&question), outbox, self.vlan, own.mtu_bytes);
            self.interface.poll(now, &mut port, &mut self.sockets);
        }
        true
    }

    /// Hardware addresses that have a lease, in the order in which they got it.
    pub(super) fn leases(&self) -> Vec<[u8; 6]> {
        self.services.leases().known()
    }

    /// These have a lease and no other; `false` if there are too many.
    pub(super) fn set_leases(&mut self, clients: &[[u8; 6]]) -> bool {
        self.services.leases_mut().set_known(clients)
    }

    /// Where hosts are that have asked or told.
    pub(super) fn hosts(&self) -> Vec<(Ipv4Addr, [u8; 6])> {
        self.hosts.iter().map(|(ip, mac)| (*ip, *mac)).collect()
    }

    /// Has the stack know where these hosts are.
    pub(super) fn set_hosts(&mut self, hosts: &[(Ipv4Addr, [u8; 6])], now: Instant) {
        for (address, mac) in hosts {
            let question = arp_request(self.own, *mac, *address);
            self.note_host(&question);
            let mut unheard = Outbox::new(UNHEARD_FRAMES);
            let mut port = Port::new(Some(&question), &mut unheard, None, self.own.mtu_bytes);
            self.interface
                .poll_ingress_single(now, &mut port, &mut self.sockets);
        }
    }

    /// Notes who sent an ARP frame.
    fn note_host(&mut self, frame: &[u8]) {
        let host = EthernetFrame::new_checked(frame)
            .ok()
            .filter(|frame| frame.ethertype() == EthernetProtocol::Arp)
            .and_then(|frame| ArpRepr::parse(&ArpPacket::new_checked(frame.payload()).ok()?).ok());
        let Some(ArpRepr::EthernetIpv4 {
            source_hardware_addr: mac,
            source_protocol_addr: address,
            ..
        }) = host
        else {
            return;
        };
        if !mac.is_unicast() {
            return;
        }
        if self.hosts.len() >= HOSTS && !self.hosts.contains_key(&address) {
            self.hosts.clear();
        }
        self.hosts.insert(address, mac.0);
    }

    /// When [`Network::run`] should be called next although nothing came.
    pub(super) fn next_run(&mut self, now: Instant) -> Option<Instant> {
        self.interface.poll_at(now, &self.sockets)
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
