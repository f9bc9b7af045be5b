//! One IP network of the gateway: a `smoltcp` stack that is handed one frame at a time.
//!
//! ```text
//!   frame from the guest ──► Network::run ──► smoltcp ──► services
//!                                                │
//!   Outbox (bounded, shared by all networks) ◄───┘ tagged for the network's VLAN
//! ```
//!
//! Nothing is queued on the way in: a frame is taken only while the outbox has room for an answer to
//! it, and is done with when `run` returns.

use std::collections::VecDeque;

use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Cidr};

use super::dhcp::DhcpServer;
use super::services::Services;
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
    mtu_bytes: usize,
    interface: Interface,
    sockets: SocketSet<'static>,
    services: Services,
}

impl Network {
    pub(super) fn new(config: &GatewayConfig, network: &NetworkConfig, now: Instant) -> Self {
        let mtu_bytes = usize::from(config.mtu_bytes);
        let mut outbox = Outbox::new(0);
        let mut port = Port {
            incoming: None,
            outbox: &mut outbox,
            vlan: None,
            mtu_bytes,
        };
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
            mtu_bytes,
            interface,
            sockets,
            services,
        }
    }

    /// Lets the stack take `frame`, if there is one, and send what it has.
    pub(super) fn run(&mut self, now: Instant, frame: Option<&[u8]>, outbox: &mut Outbox) {
        let mut port = Port {
            incoming: frame,
            outbox,
            vlan: self.vlan,
            mtu_bytes: self.mtu_bytes,
        };
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
    }

    /// Hardware addresses that have a lease, in the order in which they got it.
    pub(super) fn leases(&self) -> Vec<[u8; 6]> {
        self.services.leases().known()
    }

    /// These have a lease and no other; `false` if there are too many.
    pub(super) fn set_leases(&mut self, clients: &[[u8; 6]]) -> bool {
        self.services.leases_mut().set_known(clients)
    }

    /// When [`Network::run`] should be called next although nothing came.
    pub(super) fn next_run(&mut self, now: Instant) -> Option<Instant> {
        self.interface.poll_at(now, &self.sockets)
    }
}

/// The stack's side of the wire during one run.
struct Port<'a> {
    incoming: Option<&'a [u8]>,
    outbox: &'a mut Outbox,
    vlan: Option<u16>,
    mtu_bytes: usize,
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

struct Received<'a>(&'a [u8]);

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for one frame in the outbox.
struct Slot<'a> {
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
