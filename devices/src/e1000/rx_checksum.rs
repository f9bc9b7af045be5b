//! Receive checksum offload (3.2.9): what the controller says of a frame's checksums.

use super::checksum::{fold, ones_complement_sum};
use super::regs::{RXCSUM, RegisterFile, rxcsum};

/// Status bits (3.2.3.1).
const IXSM: u8 = 1 << 2;
const TCPCS: u8 = 1 << 5;
const IPCS: u8 = 1 << 6;
/// Error bits (3.2.3.2).
const TCPE: u8 = 1 << 5;
const IPE: u8 = 1 << 6;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// Errors byte of a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Errors(pub u8);

/// What goes into the descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// Status bits.
    pub status: u8,
    /// Error bits.
    pub errors: Errors,
    /// One's complement of the sum from RXCSUM.PCSS to the end of the frame, without FCS.
    pub packet_checksum: u16,
}

/// The parts of an IP packet that the checksums need.
struct Packet<'a> {
    /// IPv4 header with options; empty for IPv6.
    header: &'a [u8],
    addresses: &'a [u8],
    protocol: u8,
    payload: &'a [u8],
    fragment: bool,
}

/// Finds the IP packet in an Ethernet II frame with or without an 802.1Q tag.
fn parse(frame: &[u8]) -> Option<Packet<'_>> {
    let ethertype = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let (kind, start) = match ethertype(12)? {
        0x8100 => (ethertype(16)?, 18),
        kind => (kind, 14),
    };
    let packet = frame.get(start..)?;
    match kind {
        0x0800 if packet.first()? >> 4 == 4 => {
            let header_bytes = usize::from(packet.first()? & 0xf) * 4;
            let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
            if header_bytes < 20 {
                return None;
            }
            Some(Packet {
                header: packet.get(..header_bytes)?,
                addresses: packet.get(12..20)?,
                protocol: *packet.get(9)?,
                payload: packet.get(header_bytes..total)?,
                fragment: u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0,
            })
        }
        0x86dd if packet.first()? >> 4 == 6 => {
            let length = usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
            Some(Packet {
                header: &[],
                addresses: packet.get(8..40)?,
                protocol: *packet.get(6)?,
                payload: packet.get(40..40 + length)?,
                fragment: false,
            })
        }
        _ => None,
    }
}

/// Whether the TCP or UDP checksum is right; `None` where there is none to check.
fn transport_is_right(packet: &Packet) -> Option<bool> {
    let (shortest, field) = match packet.protocol {
        TCP => (20, 16),
        UDP => (8, 6),
        _ => return None,
    };
    if packet.fragment || packet.payload.len() < shortest {
        return None;
    }
    if packet.protocol == UDP && packet.payload[field..field + 2] == [0, 0] {
        return None;
    }
    let sum = fold(
        u64::from(ones_complement_sum(packet.addresses))
            + u64::from(packet.protocol)
            + packet.payload.len() as u64
            + u64::from(ones_complement_sum(packet.payload)),
    );
    Some(sum == 0xffff)
}

/// Checks `frame`, which has no FCS and, if stripped, no VLAN tag.
pub fn check(regs: &RegisterFile, frame: &[u8]) -> Report {
    let control = regs.get(RXCSUM);
    let start = (control & rxcsum::PCSS_MASK) as usize;
    let mut report = Report {
        packet_checksum: !ones_complement_sum(frame.get(start..).unwrap_or(&[])),
        ..Default::default()
    };
    if control & (rxcsum::IPOFLD | rxcsum::TUOFLD) == 0 {
        report.status |= IXSM;
        return report;
    }
    let Some(packet) = parse(frame) else {
        return report;
    };
    if control & rxcsum::IPOFLD != 0 && !packet.header.is_empty() {
        report.status |= IPCS;
        if ones_complement_sum(packet.header) != 0xffff {
            report.errors.0 |= IPE;
        }
    }
    if control & rxcsum::TUOFLD != 0
        && let Some(right) = transport_is_right(&packet)
    {
        report.status |= TCPCS;
        if !right {
            report.errors.0 |= TCPE;
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    fn regs() -> RegisterFile {
        let mut regs = RegisterFile::power_on();
        regs.set(RXCSUM, rxcsum::IPOFLD | rxcsum::TUOFLD);
        regs
    }

    fn packet(v6: bool, udp: bool, vlan: bool, payload: &[u8]) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let mut out = Vec::new();
        macro_rules! finish {
            ($ip:expr) => {
                if udp {
                    $ip.udp(1000, 2000).write(&mut out, payload).unwrap()
                } else {
                    $ip.tcp(1000, 2000, 77, 500)
                        .write(&mut out, payload)
                        .unwrap()
                }
            };
        }
        match (v6, vlan) {
            (false, false) => finish!(builder.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)),
            (false, true) => finish!(builder.single_vlan(5.try_into().unwrap()).ipv4(
                [10, 0, 0, 1],
                [10, 0, 0, 2],
                64
            )),
            (true, false) => finish!(builder.ipv6([1; 16], [2; 16], 64)),
            (true, true) => finish!(
                builder
                    .single_vlan(5.try_into().unwrap())
                    .ipv6([1; 16], [2; 16], 64)
            ),
        }
        out
    }

    proptest! {
        #[test]
        fn right_packets_are_right_and_a_flipped_bit_is_found(
            v6 in any::<bool>(), udp in any::<bool>(), vlan in any::<bool>(),
            payload in prop::collection::vec(any::<u8>(), 1..600), bit in any::<usize>(),
        ) {
            let mut frame = packet(v6, udp, vlan, &payload);
            let both = if v6 { TCPCS } else { TCPCS | IPCS };
            let report = check(&regs(), &frame);
            prop_assert_eq!((report.status, report.errors.0), (both, 0));
            // Padding does not count.
            frame.extend_from_slice(&[7; 20]);
            prop_assert_eq!(check(&regs(), &frame).errors.0, 0);
            let payload_start = frame.len() - 20 - payload.len();
            let bit = bit % (payload.len() * 8);
            frame[payload_start + bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(check(&regs(), &frame).errors.0, TCPE);
        }

        #[test]
        fn any_bytes_are_survived(frame in prop::collection::vec(any::<u8>(), 0..100)) {
            check(&regs(), &frame);
        }
    }

    #[test]
    fn a_bad_ip_header_is_found() {
        let mut frame = packet(false, true, false, b"x");
        frame[14 + 8] ^= 1;
        let report = check(&regs(), &frame);
        assert_eq!(report.errors.0 & IPE, IPE);
    }

    #[test]
    fn nothing_is_said_when_nothing_was_asked() {
        let frame = packet(false, true, false, b"x");
        let report = check(&RegisterFile::power_on(), &frame);
        assert_eq!((report.status, report.errors.0), (IXSM, 0));
    }
}
