//! The gateway as a guest sees it: frames made by hand here, a second stack in `stack`.

mod stack;

use std::sync::{Arc, Mutex};

use etherparse::{IcmpEchoHeader, Icmpv4Type, PacketBuilder, SlicedPacket, TransportSlice};
use event_manager::{EventManager, SubscriberOps};
use proptest::prelude::*;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress,
};

use std::net::Ipv4Addr;

use super::*;

const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0a, 0x00, 0x02, 0x02];
const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];
const GATEWAY: [u8; 4] = [10, 0, 2, 2];
const GUEST: [u8; 4] = [10, 0, 2, 15];

fn gateway() -> Gateway {
    Gateway::new(&GatewayConfig::default()).unwrap()
}

fn received(gateway: &mut Gateway) -> Option<Vec<u8>> {
    let mut buffer = vec![0; MAX_FRAME_BYTES];
    gateway
        .receive(&mut buffer)
        .map(|length| buffer[..length].to_vec())
}

fn is_readable(fd: RawFd) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&mut poll, 1, 0) == 1 }
}

fn arp_request(target: [u8; 4]) -> Vec<u8> {
    arp_request_from(GUEST, target)
}

fn arp_request_from(guest: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let arp = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: EthernetAddress(GUEST_MAC),
        source_protocol_addr: guest.into(),
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: target.into(),
    };
    let mut frame = [&[0xff; 6][..], &GUEST_MAC, &[0x08, 0x06]].concat();
    let mut payload = vec![0; arp.buffer_len()];
    arp.emit(&mut ArpPacket::new_unchecked(&mut payload[..]));
    frame.extend(payload);
    frame
}

fn guest_packet() -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    PacketBuilder::ethernet2(GUEST_MAC, GATEWAY_MAC).ipv4(GUEST, GATEWAY, 64)
}

fn ping(data: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    guest_packet()
        .icmpv4(Icmpv4Type::EchoRequest(IcmpEchoHeader { id: 7, seq: 3 }))
        .write(&mut frame, data)
        .unwrap();
    frame
}

fn datagram(port: u16, data: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    guest_packet()
        .udp(40000, port)
        .write(&mut frame, data)
        .unwrap();
    frame
}

/// Inserts an 802.1Q tag.
fn tagged(frame: &[u8], id: u16) -> Vec<u8> {
    let tag = id.to_be_bytes();
    [&frame[..12], &[0x81, 0x00, tag[0], tag[1]], &frame[12..]].concat()
}

#[test]
fn arp_for_the_gateway_is_answered_before_send_returns() {
    let mut gateway = gateway();
    assert!(!is_readable(gateway.readable_fd()));
    assert_eq!(gateway.send(&arp_request(GATEWAY)), SendOutcome::Sent);
    assert!(is_readable(gateway.readable_fd()));
    let reply = received(&mut gateway).unwrap();
    assert_eq!(reply.len(), 60, "a short frame is padded");
    assert_eq!(reply[..6], GUEST_MAC);
    let ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr,
        source_protocol_addr,
        ..
    } = ArpRepr::parse(&ArpPacket::new_checked(&reply[14..]).unwrap()).unwrap()
    else {
        panic!("not an ARP reply for IPv4")
    };
    assert_eq!(operation, ArpOperation::Reply);
    assert_eq!(source_hardware_addr.0, GATEWAY_MAC);
    assert_eq!(source_protocol_addr.octets(), GATEWAY);
    assert_eq!(received(&mut gateway), None);
    assert!(!is_readable(gateway.readable_fd()));
}

#[test]
fn arp_for_anyone_else_is_not_answered() {
    let mut gateway = gateway();
    gateway.send(&arp_request([10, 0, 2, 77]));
    assert_eq!(received(&mut gateway), None);
}

#[test]
fn ping_is_answered_with_its_own_data() {
    let mut gateway = gateway();
    gateway.send(&arp_request(GATEWAY));
    received(&mut gateway).unwrap();
    let data: Vec<u8> = (0..1400).map(|n| (n % 251) as u8).collect();
    gateway.send(&ping(&data));
    let reply = received(&mut gateway).unwrap();
    let packet = SlicedPacket::from_ethernet(&reply).unwrap();
    let Some(TransportSlice::Icmpv4(icmp)) = packet.transport else {
        panic!("not ICMP")
    };
    assert_eq!(
        icmp.icmp_type(),
        Icmpv4Type::EchoReply(IcmpEchoHeader { id: 7, seq: 3 })
    );
    assert_eq!(icmp.payload(), data);
}

#[test]
fn vlan_frames_are_answered_in_their_vlan_and_unknown_ones_not_at_all() {
    let mut config = GatewayConfig::default();
    let vlan = NetworkConfig::for_vlan(5);
    assert_eq!(vlan.address.octets(), [10, 64, 5, 2]);
    config.networks.push(vlan);
    let mut gateway = Gateway::new(&config).unwrap();
    let request = arp_request_from([10, 64, 5, 15], [10, 64, 5, 2]);
    gateway.send(&tagged(&request, 5));
    let reply = received(&mut gateway).unwrap();
    assert_eq!(reply[12..18], [0x81, 0x00, 0x00, 0x05, 0x08, 0x06]);
    assert_eq!(reply[..6], GUEST_MAC);
    gateway.send(&tagged(&request, 6));
    gateway.send(&request);
    assert_eq!(received(&mut gateway), None);
    assert_eq!(gateway.control().log().counters().frames_refused, 1);
    // Priority-tagged is untagged (IEEE 802.1Q, clause 9.6).
    gateway.send(&tagged(&arp_request(GATEWAY), 0));
    assert_eq!(received(&mut gateway).unwrap()[12..14], [0x08, 0x06]);
}

#[test]
fn udp_echo_and_multicast_come_back_with_their_contents() {
    let mut gateway = gateway();
    gateway.send(&arp_request(GATEWAY));
    received(&mut gateway).unwrap();
    gateway.send(&datagram(7, b"some words"));
    let reply = received(&mut gateway).unwrap();
    let packet = SlicedPacket::from_ethernet(&reply).unwrap();
    let Some(TransportSlice::Udp(udp)) = packet.transport else {
        panic!("not UDP")
    };
    assert_eq!((udp.source_port(), udp.destination_port()), (7, 40000));
    assert_eq!(udp.payload(), b"some words");

    gateway.send(&datagram(7777, b"to everyone"));
    let reply = received(&mut gateway).unwrap();
    assert_eq!(reply[..6], [0x01, 0x00, 0x5e, 0x01, 0x01, 0x01]);
    let packet = SlicedPacket::from_ethernet(&reply).unwrap();
    let Some(TransportSlice::Udp(udp)) = packet.transport else {
        panic!("not UDP")
    };
    assert_eq!(udp.destination_port(), 7777);
    assert_eq!(udp.payload(), b"to everyone");
}

fn dhcp(
    message_type: DhcpMessageType,
    requested_ip: Option<[u8; 4]>,
    server: Option<[u8; 4]>,
) -> Vec<u8> {
    let zero = Ipv4Addr::UNSPECIFIED;
    let repr = DhcpRepr {
        message_type,
        transaction_id: 0x1234,
        secs: 0,
        client_hardware_address: EthernetAddress(GUEST_MAC),
        client_ip: zero,
        your_ip: zero,
        server_ip: zero,
        router: None,
        subnet_mask: None,
        relay_agent_ip: zero,
        broadcast: false,
        requested_ip: requested_ip.map(Ipv4Addr::from),
        client_identifier: None,
        server_identifier: server.map(Ipv4Addr::from),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    let mut message = vec![0; repr.buffer_len()];
    repr.emit(&mut DhcpPacket::new_unchecked(&mut message[..]))
        .unwrap();
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(GUEST_MAC, [0xff; 6])
        .ipv4([0; 4], [255; 4], 64)
        .udp(68, 67)
        .write(&mut frame, &message)
        .unwrap();
    frame
}

/// What the server answered: kind, address given, router.
fn dhcp_reply(gateway: &mut Gateway) -> Option<(DhcpMessageType, [u8; 4], Option<[u8; 4]>)> {
    let frame = received(gateway)?;
    let packet = SlicedPacket::from_ethernet(&frame).unwrap();
    let Some(TransportSlice::Udp(udp)) = packet.transport else {
        panic!("not UDP")
    };
    assert_eq!((udp.source_port(), udp.destination_port()), (67, 68));
    let packet = DhcpPacket::new_checked(udp.payload()).unwrap();
    let repr = DhcpRepr::parse(&packet).unwrap();
    assert_eq!(repr.transaction_id, 0x1234);
    assert_eq!(repr.server_identifier.map(|ip| ip.octets()), Some(GATEWAY));
    Some((
        repr.message_type,
        repr.your_ip.octets(),
        repr.router.map(|ip| ip.octets()),
    ))
}

#[test]
fn dhcp_gives_the_guest_its_address() {
    let mut gateway = gateway();
    gateway.send(&dhcp(DhcpMessageType::Discover, None, None));
    assert_eq!(
        dhcp_reply(&mut gateway),
        Some((DhcpMessageType::Offer, GUEST, Some(GATEWAY)))
    );
    gateway.send(&dhcp(DhcpMessageType::Request, Some(GUEST), Some(GATEWAY)));
    assert_eq!(
        dhcp_reply(&mut gateway),
        Some((DhcpMessageType::Ack, GUEST, Some(GATEWAY)))
    );
}

#[test]
fn dhcp_refuses_a_foreign_address_and_leaves_other_servers_clients_alone() {
    let mut gateway = gateway();
    gateway.send(&dhcp(DhcpMessageType::Request, Some([10, 0, 2, 99]), None));
    assert_eq!(
        dhcp_reply(&mut gateway),
        Some((DhcpMessageType::Nak, [0; 4], None))
    );
    gateway.send(&dhcp(
        DhcpMessageType::Request,
        Some([10, 0, 2, 99]),
        Some([10, 0, 2, 3]),
    ));
    assert_eq!(dhcp_reply(&mut gateway), None);
}

#[test]
fn frames_that_make_no_sense_are_swallowed() {
    let mut gateway = gateway();
    for length in 0..60 {
        assert_eq!(gateway.send(&vec![0x81; length]), SendOutcome::Sent);
    }
    let whole = dhcp(DhcpMessageType::Discover, None, None);
    for length in 0..whole.len() {
        gateway.send(&whole[..length]);
    }
    assert_eq!(received(&mut gateway), None);
    assert_eq!(
        gateway.send(&vec![0; MAX_FRAME_BYTES + 1]),
        SendOutcome::Dropped
    );
}

#[test]
fn a_full_gateway_takes_nothing_and_tells_when_it_has_room() {
    let config = GatewayConfig {
        queue_frames: 4,
        ..GatewayConfig::default()
    };
    let mut gateway = Gateway::new(&config).unwrap();
    for _ in 0..4 {
        assert_eq!(gateway.send(&arp_request(GATEWAY)), SendOutcome::Sent);
    }
    let writable = gateway.writable_fd().unwrap();
    assert_eq!(writable.signal, WritableSignal::In);
    assert_eq!(gateway.send(&arp_request(GATEWAY)), SendOutcome::Full);
    assert!(!is_readable(writable.fd));
    received(&mut gateway).unwrap();
    received(&mut gateway).unwrap();
    assert!(is_readable(writable.fd));
    assert_eq!(gateway.send(&arp_request(GATEWAY)), SendOutcome::Sent);
    assert!(!is_readable(writable.fd));
    // Each request that was taken is answered, the refused one is not.
    let mut answers = 2;
    while received(&mut gateway).is_some() {
        answers += 1;
    }
    assert_eq!(answers, 5);
}

#[test]
fn a_pulled_cable_loses_frames_and_is_recorded() {
    let mut gateway = gateway();
    let control = gateway.control();
    gateway.send(&arp_request(GATEWAY));
    received(&mut gateway).unwrap();
    assert_eq!(received(&mut gateway), None);
    control.set_carrier(false);
    assert!(
        is_readable(gateway.readable_fd()),
        "a change of the carrier is signalled"
    );
    assert!(!gateway.carrier());
    assert_eq!(gateway.send(&arp_request(GATEWAY)), SendOutcome::Dropped);
    assert_eq!(received(&mut gateway), None);
    control.set_carrier(true);
    assert_eq!(gateway.send(&arp_request(GATEWAY)), SendOutcome::Sent);
    let changes: Vec<_> = control
        .log()
        .events_since(0)
        .iter()
        .map(|event| event.kind)
        .filter(|kind| matches!(kind, GatewayEventKind::Carrier { .. }))
        .collect();
    assert_eq!(
        changes,
        [
            GatewayEventKind::Carrier { present: false },
            GatewayEventKind::Carrier { present: true }
        ]
    );
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    let network = || NetworkConfig::for_vlan(5);
    let with = |networks| GatewayConfig {
        networks,
        ..GatewayConfig::default()
    };
    let refused = [
        with(vec![]),
        with(vec![network(), network()]),
        with(vec![NetworkConfig {
            vlan: Some(4095),
            ..network()
        }]),
        with(vec![NetworkConfig {
            prefix_len: 32,
            ..network()
        }]),
        with(vec![NetworkConfig {
            address: Ipv4Addr::new(10, 64, 5, 255),
            ..network()
        }]),
        with(vec![NetworkConfig {
            guest_address: Ipv4Addr::new(10, 64, 6, 15),
            ..network()
        }]),
        GatewayConfig {
            mac: [1, 0, 0, 0, 0, 0],
            ..GatewayConfig::default()
        },
        GatewayConfig {
            mtu_bytes: 100,
            ..GatewayConfig::default()
        },
    ];
    for config in refused {
        assert!(Gateway::new(&config).is_err(), "{config:?}");
    }
}

#[test]
fn a_guest_that_comes_back_finds_one_fresh_probe() {
    let mut gateway = gateway();
    let control = gateway.control();
    gateway.send(&arp_request(GATEWAY));
    received(&mut gateway).unwrap();
    let mut events = EventManager::<Arc<Mutex<dyn MutEventSubscriber + Send>>>::new().unwrap();
    events.add_subscriber(Arc::new(Mutex::new(gateway.timer())));
    control.start_probe(Duration::from_millis(1));
    while control.log().events_since(0).len() < 20 {
        events.run_with_timeout(10).unwrap();
    }
    control.stop_probe();
    assert!(received(&mut gateway).is_some());
    assert_eq!(received(&mut gateway), None);
}

/// Frames that are nearly right: a good one with a few bytes changed, and cut short.
fn nearly_right() -> impl Strategy<Value = Vec<u8>> {
    let mut syn = Vec::new();
    guest_packet()
        .tcp(40000, 7, 1, 1000)
        .syn()
        .write(&mut syn, &[])
        .unwrap();
    let mut fragment = ping(&[1; 100]);
    fragment[20] = 0x20;
    let good = vec![
        arp_request(GATEWAY),
        ping(&[1; 40]),
        datagram(7, b"text"),
        datagram(7777, b"text"),
        dhcp(DhcpMessageType::Discover, None, None),
        dhcp(DhcpMessageType::Request, Some(GUEST), None),
        syn,
        fragment,
    ];
    let changes = prop::collection::vec((0usize..64, any::<u8>()), 0..4);
    (prop::sample::select(good), changes, 20usize..400).prop_map(|(mut frame, changes, length)| {
        for (at, byte) in changes {
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        repair_header_checksum(&mut frame);
        frame.truncate(length);
        frame
    })
}

/// So that a change is not stopped by the checksum of the IP header already.
fn repair_header_checksum(frame: &mut [u8]) {
    if frame[12..14] != [8, 0] || frame[14] != 0x45 {
        return;
    }
    frame[24..26].fill(0);
    let words = frame[14..34].chunks_exact(2);
    let mut sum: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    frame[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn hostile_frames_do_no_harm(frames in prop::collection::vec(nearly_right(), 1..40)) {
        let mut gateway = gateway();
        gateway.control().start_probe(Duration::from_secs(1));
        for frame in &frames {
            gateway.send(frame);
            while received(&mut gateway).is_some() {}
        }
        gateway.send(&arp_request(GATEWAY));
        let answers = std::iter::from_fn(|| received(&mut gateway));
        prop_assert!(answers.into_iter().any(|frame| frame[12..14] == [8, 6]));
    }
}
