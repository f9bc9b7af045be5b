//! A guest with a TCP/IP stack of its own.

use std::collections::VecDeque;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::socket::{tcp, udp};
use smoltcp::wire::{HardwareAddress, IpCidr, Ipv4Cidr};

use super::*;

mod moving;

/// A guest: its own stack on the other end of the gateway, and the event loop of its VMM.
struct Guest {
    port: GuestPort,
    interface: Interface,
    sockets: SocketSet<'static>,
    events: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>>,
}

struct GuestPort {
    gateway: Gateway,
    received: VecDeque<Vec<u8>>,
    /// A frame that the gateway had no room for, as a NIC keeps it in its ring.
    kept: Option<Vec<u8>>,
    times_full: usize,
}

impl Guest {
    fn new(config: &GatewayConfig) -> Self {
        let gateway = Gateway::new(config).unwrap();
        let mut events = EventManager::<Arc<Mutex<dyn MutEventSubscriber + Send>>>::new().unwrap();
        events.add_subscriber(Arc::new(Mutex::new(gateway.timer())));
        let mut port = GuestPort {
            gateway,
            received: VecDeque::new(),
            kept: None,
            times_full: 0,
        };
        let mac = HardwareAddress::Ethernet(EthernetAddress(GUEST_MAC));
        let mut interface =
            Interface::new(Config::new(mac), &mut port, smoltcp_now(monotonic_ns()));
        interface.update_ip_addrs(|addresses| {
            addresses
                .push(IpCidr::Ipv4(Ipv4Cidr::new(GUEST.into(), 24)))
                .unwrap();
        });
        Self {
            port,
            interface,
            sockets: SocketSet::new(Vec::new()),
            events,
        }
    }

    fn connect(&mut self, port: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 32 * 1024]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        let remote = (Ipv4Addr::from(GATEWAY), port);
        socket
            .connect(self.interface.context(), remote, 50000 + port)
            .unwrap();
        self.sockets.add(socket)
    }

    fn step(&mut self) {
        if let Some(frame) = self.port.kept.take()
            && self.port.gateway.send(&frame) == SendOutcome::Full
        {
            self.port.kept = Some(frame);
        }
        while self.port.received.len() < 64
            && let Some(frame) = received(&mut self.port.gateway)
        {
            self.port.received.push_back(frame);
        }
        let now = smoltcp_now(monotonic_ns());
        self.interface.poll(now, &mut self.port, &mut self.sockets);
        self.events.run_with_timeout(0).unwrap();
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }
}

impl phy::Device for GuestPort {
    type RxToken<'a> = GuestRx;
    type TxToken<'a> = GuestTx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(GuestRx, GuestTx<'_>)> {
        if self.kept.is_some() {
            return None;
        }
        let frame = self.received.pop_front()?;
        Some((GuestRx(frame), GuestTx(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<GuestTx<'_>> {
        self.kept.is_none().then_some(GuestTx(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

struct GuestRx(Vec<u8>);

impl phy::RxToken for GuestRx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct GuestTx<'a>(&'a mut GuestPort);

impl phy::TxToken for GuestTx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        match self.0.gateway.send(&frame) {
            SendOutcome::Sent => {}
            SendOutcome::Full => {
                self.0.times_full += 1;
                self.0.kept = Some(frame);
            }
            SendOutcome::Dropped => panic!("a frame was lost"),
        }
        result
    }
}

/// Sends `total` patterned bytes to `port` and returns everything that came back.
fn exchange(guest: &mut Guest, port: u16, total: usize) -> Vec<u8> {
    let sent: Vec<u8> = (0..total)
        .map(|n| (n ^ (n >> 8) ^ (n >> 16)) as u8)
        .collect();
    let handle = guest.connect(port);
    let (mut offset, mut back, mut closed) = (0, Vec::new(), false);
    loop {
        guest.step();
        let socket = guest.socket(handle);
        if socket.can_send() && offset < total {
            offset += socket.send_slice(&sent[offset..]).unwrap();
        }
        if offset == total && !closed && socket.may_send() {
            socket.close();
            closed = true;
        }
        while socket.can_recv() {
            socket
                .recv(|data| (data.len(), back.extend_from_slice(data)))
                .unwrap();
        }
        if closed && !socket.may_recv() {
            return back;
        }
    }
}

#[test]
fn tcp_echo_returns_megabytes_unchanged_through_a_small_queue() {
    let config = GatewayConfig {
        queue_frames: 8,
        ..GatewayConfig::default()
    };
    let mut guest = Guest::new(&config);
    let total = 4 << 20;
    let back = exchange(&mut guest, 7, total);
    assert_eq!(back.len(), total);
    assert!(
        back.iter()
            .enumerate()
            .all(|(n, byte)| *byte == (n ^ (n >> 8) ^ (n >> 16)) as u8)
    );
    assert!(
        guest.port.times_full > 0,
        "the queue was meant to be too small"
    );
}

#[test]
fn discard_answers_with_checksum_and_length() {
    let mut guest = Guest::new(&GatewayConfig::default());
    let answer = exchange(&mut guest, 9, 9);
    // printf '\0\1\2\3\4\5\6\7\10' | cksum
    assert_eq!(String::from_utf8(answer).unwrap(), "58267076 9\n");
}

#[test]
fn source_sends_lines_in_order_until_the_client_has_enough() {
    let mut guest = Guest::new(&GatewayConfig::default());
    let handle = guest.connect(19);
    let mut back = Vec::new();
    while back.len() < 1 << 20 {
        guest.step();
        let socket = guest.socket(handle);
        while socket.can_recv() {
            socket
                .recv(|data| (data.len(), back.extend_from_slice(data)))
                .unwrap();
        }
    }
    for (number, line) in back.chunks_exact(SOURCE_LINE_BYTES).enumerate() {
        assert_eq!(line, source_line(number as u64));
    }
    guest.socket(handle).abort();
    guest.step();
}

#[test]
fn more_connections_than_a_service_has_are_refused_and_the_gateway_goes_on() {
    let mut guest = Guest::new(&GatewayConfig::default());
    let mut handles = Vec::new();
    for n in 0..24u16 {
        let buffer = || tcp::SocketBuffer::new(vec![0; 1024]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        let remote = (Ipv4Addr::from(GATEWAY), 7);
        socket
            .connect(guest.interface.context(), remote, 41000 + n)
            .unwrap();
        handles.push(guest.sockets.add(socket));
        guest.step();
        guest.step();
    }
    for _ in 0..20 {
        guest.step();
    }
    let open = handles
        .iter()
        .filter(|h| guest.sockets.get::<tcp::Socket>(**h).may_send())
        .count();
    assert_eq!(open, 16);
    for handle in handles {
        guest.socket(handle).abort();
    }
    guest.step();
    assert_eq!(exchange(&mut guest, 7, 1000).len(), 1000);
}

#[test]
fn datagrams_longer_than_a_frame_come_back_whole() {
    let mut guest = Guest::new(&GatewayConfig::default());
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 4], vec![0; 32 * 1024]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(40000).unwrap();
    let handle = guest.sockets.add(socket);
    for length in [1472, 1473, 8000, 12_000] {
        let data: Vec<u8> = (0..length).map(|n| (n % 253) as u8).collect();
        let to = (Ipv4Addr::from(GATEWAY), 7);
        guest
            .sockets
            .get_mut::<udp::Socket>(handle)
            .send_slice(&data, to)
            .unwrap();
        while !guest.sockets.get::<udp::Socket>(handle).can_recv() {
            guest.step();
        }
        let (back, _) = guest.sockets.get_mut::<udp::Socket>(handle).recv().unwrap();
        assert!(back == data, "{length} bytes");
    }
}

#[test]
fn probe_asks_for_the_address_then_pings_and_records_replies() {
    let mut guest = Guest::new(&GatewayConfig::default());
    let control = guest.port.gateway.control();
    let log = control.log();
    let start = crate::clock::monotonic_ns();
    control.start_probe(Duration::from_millis(1));
    while log.events_since(start).len() < 40 {
        guest.step();
    }
    control.stop_probe();
    let mut events = log.events_since(start);
    // The first frame of all ends a silence, and a slow machine may make more of them.
    events.retain(|event| event.kind != GatewayEventKind::FrameAfterSilence);
    assert_eq!(events[0].kind, GatewayEventKind::ArpSent);
    assert_eq!(events[1].kind, GatewayEventKind::ProbeSent { sequence: 0 });
    let GatewayEventKind::ProbeReplied {
        sequence: 0,
        round_trip_ns,
    } = events[2].kind
    else {
        panic!("{:?}", events[2])
    };
    assert!(round_trip_ns > 0);
    assert!(events.is_sorted_by_key(|event| event.at_ns));
    assert_eq!(log.first_reply_since(start), Some(events[2].at_ns));
    // The answer to the ARP request came before the first ping was sent.
    assert!(log.first_frame_since(start).unwrap() <= events[1].at_ns);
    let count = |wanted: fn(&GatewayEventKind) -> bool| {
        events.iter().filter(|event| wanted(&event.kind)).count()
    };
    assert_eq!(count(|kind| matches!(kind, GatewayEventKind::ArpSent)), 1);
}
