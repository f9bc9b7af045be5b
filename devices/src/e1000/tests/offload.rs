//! Checksum insertion, VLAN insertion and segmentation, judged by `etherparse`.

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::driver::*;
use crate::e1000::regs::*;
use crate::e1000::stats::{TSCTC, TSCTFC};

const IP_START: usize = 14;
const CONTEXT_TCP: u32 = 1 << 24;
const CONTEXT_IPV4: u32 = 1 << 25;

/// A packet as the Linux driver hands it over: checksums as `etherparse` makes them, to compare.
fn packet(v6: bool, tcp: bool, payload: &[u8]) -> Vec<u8> {
    let link = PacketBuilder::ethernet2([2; 6], [4; 6]);
    let mut out = Vec::new();
    macro_rules! transport {
        ($ip:expr) => {
            if tcp {
                $ip.tcp(1000, 2000, 0xffff_ff00, 500)
                    .psh()
                    .fin()
                    .ack(9)
                    .write(&mut out, payload)
            } else {
                $ip.udp(1000, 2000).write(&mut out, payload)
            }
        };
    }
    if v6 {
        transport!(link.ipv6([0x11; 16], [0x22; 16], 64)).unwrap();
    } else {
        transport!(link.ipv4([10, 1, 2, 3], [10, 3, 2, 1], 64)).unwrap();
    }
    out
}

struct Layout {
    transport: usize,
    checksum: usize,
    header: usize,
}

fn layout(v6: bool, tcp: bool) -> Layout {
    let transport = IP_START + if v6 { 40 } else { 20 };
    Layout {
        transport,
        checksum: transport + if tcp { 16 } else { 6 },
        header: transport + if tcp { 20 } else { 8 },
    }
}

/// Sum of the pseudo header, with the length in it or not, as the driver leaves it in the field.
fn seed(frame: &mut [u8], v6: bool, tcp: bool, with_length: bool) {
    let layout = layout(v6, tcp);
    let addresses = if v6 {
        IP_START + 8..IP_START + 40
    } else {
        IP_START + 12..IP_START + 20
    };
    let mut sum = if tcp { 6 } else { 17u32 };
    for pair in frame[addresses].chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair[1]);
    }
    if with_length {
        sum += (frame.len() - layout.transport) as u32;
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    frame[layout.checksum..layout.checksum + 2].copy_from_slice(&(sum as u16).to_be_bytes());
}

fn context(v6: bool, tcp: bool, extra: u32, payload: usize, mss: u16) -> [u8; 16] {
    let layout = layout(v6, tcp);
    let mut descriptor = [0; 16];
    descriptor[0] = IP_START as u8;
    descriptor[1] = IP_START as u8 + 10;
    descriptor[2..4].copy_from_slice(&(layout.transport as u16 - 1).to_le_bytes());
    descriptor[4] = layout.transport as u8;
    descriptor[5] = layout.checksum as u8;
    let flags = if tcp { CONTEXT_TCP } else { 0 } | if v6 { 0 } else { CONTEXT_IPV4 };
    let lower = DEXT | flags | extra | payload as u32;
    descriptor[8..12].copy_from_slice(&lower.to_le_bytes());
    descriptor[13] = layout.header as u8;
    descriptor[14..].copy_from_slice(&mss.to_le_bytes());
    descriptor
}

/// Puts `frame` in several buffers of at most the given sizes.
fn queue_in_pieces(driver: &mut Driver, frame: &[u8], sizes: &[usize], lower: u32, upper: u32) {
    let mut rest = frame;
    let mut at = TX_BUFFERS;
    for i in 0.. {
        let size = sizes
            .get(i)
            .map_or(rest.len(), |&size| size.min(rest.len()));
        let (piece, after) = rest.split_at(size);
        let end = if after.is_empty() { EOP | RS } else { 0 };
        driver.queue_data(at, piece, lower | end, upper);
        at += 0x4_0000 / 16;
        rest = after;
        if rest.is_empty() {
            return;
        }
    }
}

fn check_checksums(frame: &[u8]) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = &packet.transport else {
        panic!("no TCP")
    };
    match &packet.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header().to_header();
            assert_eq!(header.calc_header_checksum(), header.header_checksum);
            let sum = tcp
                .calc_checksum_ipv4(header.source, header.destination)
                .unwrap();
            assert_eq!(sum, tcp.checksum());
        }
        Some(NetSlice::Ipv6(ip)) => {
            let header = ip.header().to_header();
            let sum = tcp
                .calc_checksum_ipv6(header.source, header.destination)
                .unwrap();
            assert_eq!(sum, tcp.checksum());
        }
        _ => panic!("no IP"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn inserted_checksums_are_those_of_the_packet(
        v6 in any::<bool>(), tcp in any::<bool>(),
        payload in prop::collection::vec(any::<u8>(), 10..1400),
        sizes in prop::collection::vec(1usize..400, 0..4),
    ) {
        let expected = packet(v6, tcp, &payload);
        let mut frame = expected.clone();
        seed(&mut frame, v6, tcp, true);
        if !v6 {
            frame[IP_START + 10..IP_START + 12].fill(0);
        }
        let mut driver = Driver::new();
        driver.queue(context(v6, tcp, 0, 0, 0));
        let options = if v6 { 2 << 8 } else { IXSM_TXSM };
        queue_in_pieces(&mut driver, &frame, &sizes, DATA, options);
        driver.ring();
        prop_assert_eq!(&driver.sent()[0][..expected.len()], &expected[..]);
    }

    #[test]
    fn segments_are_a_right_tcp_stream(
        v6 in any::<bool>(), vlan in any::<bool>(), length in 1usize..65_000,
        mss in 200u16..1460, sizes in prop::collection::vec(60usize..16_000, 3),
    ) {
        let payload: Vec<u8> = (0..length).map(|i| (i * 7) as u8 ^ (i >> 8) as u8).collect();
        let layout = layout(v6, true);
        // etherparse refuses packets above 64 KiB, so the header is that of a short one.
        let mut frame = packet(v6, true, &[]);
        let first_id = u16::from_be_bytes([frame[IP_START + 4], frame[IP_START + 5]]);
        seed(&mut frame, v6, true, false);
        if !v6 {
            frame[IP_START + 2..IP_START + 4].fill(0);
            frame[IP_START + 10..IP_START + 12].fill(0);
        }
        frame.extend_from_slice(&payload);
        let mut driver = Driver::new();
        driver.bench.set_bits(CTRL, ctrl::VME);
        driver.queue(context(v6, true, TSE, length, mss));
        let (tag, insert) = if vlan { (0x6abc_0000, VLE) } else { (0, 0) };
        let options = tag | if v6 { 2 << 8 } else { IXSM_TXSM };
        // At most four pieces; each has its own 16 KiB of memory but the last.
        queue_in_pieces(&mut driver, &frame, &sizes, DATA | TSE | insert, options);
        driver.ring();

        let sent = driver.sent();
        prop_assert_eq!(sent.len(), length.div_ceil(usize::from(mss)));
        let mut received = Vec::new();
        for (i, frame) in sent.iter().enumerate() {
            let mut frame = frame.clone();
            if vlan {
                prop_assert_eq!(&frame[12..16], &[0x81, 0x00, 0x6a, 0xbc][..]);
                frame.drain(12..16);
            }
            let last = i + 1 == sent.len();
            let bytes = if last { length - i * usize::from(mss) } else { usize::from(mss) };
            frame.truncate(layout.header + bytes);
            check_checksums(&frame);
            let packet = SlicedPacket::from_ethernet(&frame).unwrap();
            let Some(TransportSlice::Tcp(tcp)) = &packet.transport else { panic!("no TCP") };
            let offset = (i * usize::from(mss)) as u32;
            prop_assert_eq!(tcp.sequence_number(), 0xffff_ff00u32.wrapping_add(offset));
            prop_assert_eq!((tcp.fin(), tcp.psh(), tcp.ack()), (last, last, true));
            if let Some(NetSlice::Ipv4(ip)) = &packet.net {
                let id = ip.header().identification();
                prop_assert_eq!(id, first_id.wrapping_add(i as u16));
            }
            received.extend_from_slice(tcp.payload());
        }
        prop_assert_eq!(received, payload);
        prop_assert_eq!(driver.bench.read(TSCTC), 1);
    }
}

#[test]
fn a_legacy_descriptor_inserts_one_checksum() {
    let expected = packet(false, true, b"legacy checksum");
    let mut frame = expected.clone();
    seed(&mut frame, false, true, true);
    let layout = layout(false, true);
    let mut driver = Driver::new();
    let lower = EOP | RS | 1 << 26 | (layout.checksum as u32) << 16;
    driver.queue_data(TX_BUFFERS, &frame, lower, (layout.transport as u32) << 8);
    driver.ring();
    assert_eq!(driver.sent(), [expected]);
}

#[test]
fn a_vlan_tag_goes_behind_the_addresses_only_in_vlan_mode() {
    let mut driver = Driver::new();
    for mode in [false, true] {
        if mode {
            driver.bench.set_bits(CTRL, ctrl::VME);
        }
        driver.queue_data(TX_BUFFERS, &broadcast(100), EOP | VLE, 0x0123_0000);
        driver.ring();
        let mut expected = broadcast(100);
        if mode {
            expected.splice(12..12, [0x81, 0x00, 0x01, 0x23]);
        }
        assert_eq!(driver.sent(), [expected]);
    }
}

#[test]
fn a_wire_that_fills_up_in_a_segmented_packet_gets_each_segment_once() {
    let payload: Vec<u8> = (0..9000u32).map(|i| (i / 3) as u8).collect();
    let mut frame = packet(false, true, &[]);
    seed(&mut frame, false, true, false);
    frame.extend_from_slice(&payload);
    let mut driver = Driver::new();
    driver.bench.far_end().room = Some(1);
    driver.queue(context(false, true, TSE, payload.len(), 1000));
    queue_in_pieces(&mut driver, &frame, &[5000], DATA | TSE, IXSM_TXSM);
    driver.ring();
    assert_eq!(driver.tx_status(2), 0, "not done yet");
    let mut received = Vec::new();
    for _ in 0..9 {
        let sent = driver.sent();
        assert_eq!(sent.len(), 1);
        received.extend_from_slice(&sent[0][54..]);
        driver.bench.far_end().room = Some(1);
        driver.bench.serve();
    }
    assert_eq!(received, payload);
    assert_eq!((driver.tx_status(2), driver.bench.read(TDH)), (1, 3));
}

#[test]
fn impossible_segmentation_is_counted_and_does_not_stop_the_ring() {
    let mut driver = Driver::new();
    let frame = packet(false, true, &[1; 500]);
    for mss in [0, 20_000] {
        driver.queue(context(false, true, TSE, 500, mss));
        queue_in_pieces(&mut driver, &frame, &[], DATA | TSE, IXSM_TXSM);
    }
    driver.send(&broadcast(60));
    assert_eq!(driver.sent(), [broadcast(60)]);
    assert_eq!(driver.bench.read(TSCTFC), 2);
}

#[test]
fn delayed_and_immediate_transmit_interrupts() {
    let mut driver = Driver::new();
    driver.bench.write(IMC, u32::MAX);
    driver.bench.write(IMS, icr::TXDW);
    driver.bench.write(TIDV, 100);
    driver.bench.write(TADV, 150);
    for _ in 0..2 {
        driver.queue_data(TX_BUFFERS, &broadcast(60), EOP | RS | IDE, 0);
        driver.ring();
        assert!(!driver.bench.interrupt());
        driver.bench.advance_ns(90 * 1024);
    }
    assert!(
        driver.bench.interrupt(),
        "180 units after the first the absolute delay is over"
    );
    driver.bench.read(ICR);
    driver.queue_data(TX_BUFFERS, &broadcast(60), EOP | RS | IDE, 0);
    driver.ring();
    driver.bench.advance_ns(100 * 1024);
    assert!(driver.bench.interrupt());
    driver.bench.read(ICR);
    driver.send(&broadcast(60));
    assert!(driver.bench.interrupt(), "without IDE at once");
    driver.bench.read(ICR);
    driver.bench.write(TIDV, 8);
    driver.queue_data(TX_BUFFERS, &broadcast(60), EOP | RS | IDE, 0);
    driver.ring();
    assert!(driver.bench.interrupt(), "8 us are too short to wait for");
}
