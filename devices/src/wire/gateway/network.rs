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

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::time::Instant;
use smoltcp::wire::{
    ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, HardwareAddress, IpCidr,
    Ipv4Cidr,
};

use super::connections::{ConnectionState, GuestEnd, OwnEnd, arp_request, revive};
use super::dhcp::DhcpServer;
use super::handshakes::Handshakes;
use super::port::{Incoming, Outbox, Port};
use super::services::{ServiceState, Services};
use super::{GatewayConfig, NetworkConfig};

/// How often services and stack take turns before the event loop gets one.
const ROUNDS: usize = 8;
/// Room for the answer to a made-up question, which nobody hears.
const UNHEARD_FRAMES: usize = 8;
/// Hosts that are noted; a guest that pretends to be more has those before forgotten.
const HOSTS: usize = 64;

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
        let before = outbox.len();
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
        for frame in outbox.after(first) {
            if let Some(untagged) = Incoming::parse(frame) {
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
