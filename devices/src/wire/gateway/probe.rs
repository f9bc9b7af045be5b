//! Pings the guest at a steady rate as long as it keeps up, to see when it is gone and when it is
//! back.
//!
//! The frames are made here and not by `smoltcp`, whose neighbour cache asks only once a second for
//! an address: that would be the resolution of every measurement.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet, Ipv4Repr,
};

use super::log::{GatewayEventKind, GatewayLog};

/// Identifier field of our echo requests.
const IDENT: u16 = 0xcfd0;
/// Requests whose replies are still welcome.
const OUTSTANDING: usize = 1024;
/// After so many requests in a row without a reply the guest is asked for its address again too.
const SILENCE: u32 = 16;
/// Requests that may be on their way at a time. A guest that answers more slowly than it is asked
/// would be measured by the queue in front of it.
const IN_FLIGHT: usize = 2;
/// How long a guest may take to answer before it is asked at the steady rate, whatever is missing.
const PATIENCE_NS: u64 = 20_000_000;
/// Shortest time between two probes.
const MIN_INTERVAL: Duration = Duration::from_millis(1);

/// A probe as a value. Requests that were not answered are not in it: their replies come too late.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ProbeState {
    guest_mac: Option<[u8; 6]>,
    /// Interval in nanoseconds and next sequence number, while it runs.
    running: Option<(u64, u64)>,
}

struct Running {
    interval_ns: u64,
    next_ns: u64,
    sequence: u64,
    /// Number and time of requests that were not answered yet, oldest first.
    outstanding: VecDeque<(u64, u64)>,
    unanswered: u32,
    /// The guest let a request go unanswered for too long, and has answered none since.
    silent: bool,
    /// A request that was due waits for a reply to one before.
    waiting: bool,
    ask_address: bool,
}

impl Running {
    /// Until when replies are waited for, if too many are missing.
    fn patient_until(&self) -> Option<u64> {
        let (_, sent_ns) = self.outstanding.iter().rev().nth(IN_FLIGHT - 1)?;
        Some(sent_ns.saturating_add(PATIENCE_NS))
    }
}

/// The prober of one gateway: for the untagged network's guest.
pub(super) struct Probe {
    mac: EthernetAddress,
    address: Ipv4Addr,
    guest_address: Ipv4Addr,
    guest_mac: Option<EthernetAddress>,
    running: Option<Running>,
}

impl Probe {
    pub(super) fn new(mac: [u8; 6], address: Ipv4Addr, guest_address: Ipv4Addr) -> Self {
        Self {
            mac: EthernetAddress(mac),
            address,
            guest_address,
            guest_mac: None,
            running: None,
        }
    }

    pub(super) fn start(&mut self, interval: Duration, now_ns: u64) {
        let sequence = self.running.as_ref().map_or(0, |running| running.sequence);
        self.running = Some(Running {
            interval_ns: interval.max(MIN_INTERVAL).as_nanos().min(u64::MAX.into()) as u64,
            next_ns: now_ns,
            sequence,
            outstanding: VecDeque::new(),
            unanswered: 0,
            silent: false,
            waiting: false,
            ask_address: false,
        });
    }

    pub(super) fn save(&self) -> ProbeState {
        let running = self.running.as_ref();
        ProbeState {
            guest_mac: self.guest_mac.map(|mac| mac.0),
            running: running.map(|running| (running.interval_ns, running.sequence)),
        }
    }

    /// Goes on from `state`. One that runs here keeps its rate, and no number comes twice.
    pub(super) fn restore(&mut self, state: ProbeState, now_ns: u64) {
        let mac = state.guest_mac.map(EthernetAddress);
        self.guest_mac = mac.filter(EthernetAddress::is_unicast);
        let Some((interval_ns, sequence)) = state.running else {
            return;
        };
        if self.running.is_none() {
            self.start(Duration::from_nanos(interval_ns), now_ns);
        }
        if let Some(running) = &mut self.running {
            running.sequence = running.sequence.max(sequence);
        }
    }

    pub(super) fn stop(&mut self) {
        self.running = None;
    }

    /// When the next probe is due.
    pub(super) fn next_ns(&self) -> Option<u64> {
        self.running.as_ref().map(|running| running.next_ns)
    }

    /// The frame to send now, if one is due.
    pub(super) fn poll(&mut self, now_ns: u64, log: &GatewayLog) -> Option<Vec<u8>> {
        let running = self
            .running
            .as_mut()
            .filter(|running| running.next_ns <= now_ns)?;
        running.silent |= std::mem::take(&mut running.waiting);
        let patient_until = running.patient_until().filter(|_| !running.silent);
        if let Some(until_ns) = patient_until.filter(|until_ns| now_ns < *until_ns) {
            running.waiting = true;
            running.next_ns = until_ns;
            return None;
        }
        // Probes that could not be sent in time are left out, not made up for.
        running.next_ns = running
            .next_ns
            .saturating_add(running.interval_ns)
            .max(now_ns.saturating_add(running.interval_ns / 2));
        // A silent guest may have got another NIC: every other probe asks for its address.
        running.ask_address = running.unanswered >= SILENCE && !running.ask_address;
        let guest_mac = match self.guest_mac {
            Some(mac) if !running.ask_address => mac,
            _ => {
                log.record(now_ns, GatewayEventKind::ArpSent);
                return Some(self.arp_request());
            }
        };
        let sequence = running.sequence;
        // It may be that of a stored state.
        running.sequence = sequence.wrapping_add(1);
        running.unanswered = running.unanswered.saturating_add(1);
        if running.outstanding.len() == OUTSTANDING {
            running.outstanding.pop_front();
        }
        running.outstanding.push_back((sequence, now_ns));
        log.record(now_ns, GatewayEventKind::ProbeSent { sequence });
        Some(self.echo_request(guest_mac, sequence as u16))
    }

    /// Looks at a frame from the guest. Returns whether it was for the prober alone.
    pub(super) fn observe(&mut self, frame: &[u8], now_ns: u64, log: &GatewayLog) -> bool {
        if self.running.is_none() {
            return false;
        }
        let Ok(frame) = EthernetFrame::new_checked(frame) else {
            return false;
        };
        match frame.ethertype() {
            EthernetProtocol::Arp => {
                self.learn(frame.payload());
                false
            }
            EthernetProtocol::Ipv4 if frame.dst_addr() == self.mac => {
                match echo_reply(frame.payload(), self.guest_address) {
                    Some(sequence) => {
                        self.replied(sequence, now_ns, log);
                        true
                    }
                    None => false,
                }
            }
            _ => false,
        }
    }

    fn learn(&mut self, arp: &[u8]) {
        let Ok(packet) = ArpPacket::new_checked(arp) else {
            return;
        };
        if let Ok(ArpRepr::EthernetIpv4 {
            source_hardware_addr,
            source_protocol_addr,
            ..
        }) = ArpRepr::parse(&packet)
            && source_protocol_addr == self.guest_address
            && source_hardware_addr.is_unicast()
            && self.guest_mac != Some(source_hardware_addr)
        {
            self.guest_mac = Some(source_hardware_addr);
            // Not after the rest of an interval, but at once.
            if let Some(running) = &mut self.running {
                running.next_ns = 0;
            }
        }
    }

    fn replied(&mut self, low: u16, now_ns: u64, log: &GatewayLog) {
        let Some(running) = &mut self.running else {
            return;
        };
        let Some(place) = running
            .outstanding
            .iter()
            .rposition(|(n, _)| *n as u16 == low)
        else {
            return;
        };
        if let Some((sequence, sent_ns)) = running.outstanding.remove(place) {
            running.unanswered = 0;
            running.silent = false;
            if std::mem::take(&mut running.waiting) {
                running.next_ns = now_ns;
            }
            let round_trip_ns = now_ns.saturating_sub(sent_ns);
            log.record(
                now_ns,
                GatewayEventKind::ProbeReplied {
                    sequence,
                    round_trip_ns,
                },
            );
        }
    }

    fn arp_request(&self) -> Vec<u8> {
        let arp = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: self.mac,
            source_protocol_addr: self.address,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: self.guest_address,
        };
        self.frame(
            EthernetAddress::BROADCAST,
            EthernetProtocol::Arp,
            arp.buffer_len(),
            |payload| {
                arp.emit(&mut ArpPacket::new_unchecked(payload));
            },
        )
    }

    fn echo_request(&self, to: EthernetAddress, seq_no: u16) -> Vec<u8> {
        let checksums = ChecksumCapabilities::default();
        let icmp = Icmpv4Repr::EchoRequest {
            ident: IDENT,
            seq_no,
            data: b"cofferdam probe",
        };
        let ip = Ipv4Repr {
            src_addr: self.address,
            dst_addr: self.guest_address,
            next_header: IpProtocol::Icmp,
            payload_len: icmp.buffer_len(),
            hop_limit: 64,
        };
        let length = ip.buffer_len() + icmp.buffer_len();
        self.frame(to, EthernetProtocol::Ipv4, length, |payload| {
            let mut packet = Ipv4Packet::new_unchecked(payload);
            ip.emit(&mut packet, &checksums);
            icmp.emit(
                &mut Icmpv4Packet::new_unchecked(packet.payload_mut()),
                &checksums,
            );
        })
    }

    fn frame(
        &self,
        dst_addr: EthernetAddress,
        ethertype: EthernetProtocol,
        payload_len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Vec<u8> {
        let header = EthernetRepr {
            src_addr: self.mac,
            dst_addr,
            ethertype,
        };
        let mut frame = vec![0; header.buffer_len() + payload_len];
        let mut view = EthernetFrame::new_unchecked(&mut frame[..]);
        header.emit(&mut view);
        fill(view.payload_mut());
        frame
    }
}

/// Sequence number of an echo reply to us in `packet`.
fn echo_reply(packet: &[u8], from: Ipv4Addr) -> Option<u16> {
    let checksums = ChecksumCapabilities::default();
    let packet = Ipv4Packet::new_checked(packet).ok()?;
    if packet.next_header() != IpProtocol::Icmp || packet.src_addr() != from {
        return None;
    }
    Ipv4Repr::parse(&packet, &checksums).ok()?;
    let icmp = Icmpv4Packet::new_checked(packet.payload()).ok()?;
    match Icmpv4Repr::parse(&icmp, &checksums).ok()? {
        Icmpv4Repr::EchoReply {
            ident: IDENT,
            seq_no,
            ..
        } => Some(seq_no),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const HOST: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 2];

    /// A prober that knows the guest and asks every 5 ms.
    fn probe(log: &GatewayLog) -> Probe {
        let (here, there) = (Ipv4Addr::new(10, 0, 2, 2), Ipv4Addr::new(10, 0, 2, 15));
        let mut probe = Probe::new(HOST, here, there);
        probe.start(Duration::from_millis(5), 0);
        // The guest as seen from its own side asks for us.
        let guest = Probe::new(GUEST, there, here);
        assert!(!probe.observe(&guest.arp_request(), 0, log));
        probe
    }

    /// The guest's answer to `request`.
    fn answer(probe: &mut Probe, request: &[u8], now_ns: u64, log: &GatewayLog) {
        let mut reply = request.to_vec();
        reply[..6].copy_from_slice(&HOST);
        reply[6..12].copy_from_slice(&GUEST);
        // Addresses the other way round, and an echo reply with its checksum.
        let (from, to) = (reply[30..34].to_vec(), reply[26..30].to_vec());
        reply[26..30].copy_from_slice(&from);
        reply[30..34].copy_from_slice(&to);
        let mut icmp = Icmpv4Packet::new_unchecked(&mut reply[34..]);
        icmp.set_msg_type(smoltcp::wire::Icmpv4Message::EchoReply);
        icmp.fill_checksum();
        assert!(probe.observe(&reply, now_ns, log));
    }

    #[test]
    fn a_guest_that_is_slower_than_the_rate_is_asked_again_when_it_has_answered() {
        let log = GatewayLog::default();
        let mut probe = probe(&log);
        let first = probe.poll(0, &log).unwrap();
        let second = probe.poll(5 * MS, &log).unwrap();
        assert_eq!(probe.poll(10 * MS, &log), None);
        answer(&mut probe, &first, 13 * MS, &log);
        let third = probe.poll(13 * MS, &log).unwrap();
        assert_eq!(log.first_round_trip_since(2 * MS), None);
        answer(&mut probe, &second, 14 * MS, &log);
        answer(&mut probe, &third, 15 * MS, &log);
        // One that keeps up is asked at the rate.
        assert_eq!(probe.next_ns(), Some(18 * MS));
        assert_eq!(log.first_round_trip_since(2 * MS), Some(14 * MS));
    }

    #[test]
    fn a_guest_that_does_not_answer_is_asked_at_the_rate_after_a_while() {
        let log = GatewayLog::default();
        let mut probe = probe(&log);
        let mut sent = Vec::new();
        for now_ns in (0..50).map(|ms| ms * MS) {
            if probe.poll(now_ns, &log).is_some() {
                sent.push(now_ns / MS);
            }
        }
        assert_eq!(sent, [0, 5, 20, 25, 30, 35, 40, 45]);
    }

    #[test]
    fn what_piled_up_while_a_guest_was_gone_is_worked_off_first() {
        let log = GatewayLog::default();
        let mut probe = probe(&log);
        let sent: Vec<_> = (0..=30)
            .filter_map(|ms| probe.poll(ms * MS, &log))
            .collect();
        assert_eq!(sent.len(), 5);
        for (ms, request) in (31..).zip(&sent[..3]) {
            answer(&mut probe, request, ms * MS, &log);
            assert_eq!(probe.poll((ms + 4) * MS, &log), None);
        }
        answer(&mut probe, &sent[3], 38 * MS, &log);
        assert!(probe.poll(38 * MS, &log).is_some());
    }

    #[test]
    fn behind_the_last_number_the_first_comes() {
        let log = GatewayLog::default();
        let mut probe = probe(&log);
        probe.restore(
            ProbeState {
                guest_mac: Some(GUEST),
                running: Some((5 * MS, u64::MAX)),
            },
            0,
        );
        for now_ns in [0, 5 * MS] {
            let request = probe.poll(now_ns, &log).unwrap();
            answer(&mut probe, &request, now_ns, &log);
        }
        let events = log.events_since(0).into_iter();
        let replied: Vec<_> = events
            .filter_map(|event| match event.kind {
                GatewayEventKind::ProbeReplied { sequence, .. } => Some(sequence),
                _ => None,
            })
            .collect();
        assert_eq!(replied, [u64::MAX, 0]);
    }
}
