//! Datagrams that come back: ICMP echo and UDP echo, some of them under way at any time.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

use agent_protocol::traffic::TrafficResult;
use rustix::fd::OwnedFd;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketType, ipproto};

use super::contents::{datagram, sequence};
use super::{Time, ns};

/// Datagrams under way at one time.
const WINDOW: usize = 16;

/// Port of UDP's echo service.
const ECHO_PORT: u16 = 7;

/// Port of the service that sends datagrams on to [`GROUP`], same port.
const MULTICAST_PORT: u16 = 7777;

/// The group.
const GROUP: Ipv4Addr = Ipv4Addr::new(239, 1, 1, 1);

/// Room for a packet with its headers, in bytes.
const BUFFER_BYTES: usize = 2048;

/// Something that carries datagrams to the peer and back.
trait Carrier {
    /// Sends one.
    fn send(&mut self, payload: &[u8]) -> io::Result<()>;

    /// Receives one into `payload`; `false` when none came in a while.
    fn receive(&mut self, payload: &mut Vec<u8>) -> io::Result<bool>;
}

/// ICMP echo.
pub fn ping_flood(peer: Ipv4Addr, time: Time) -> TrafficResult {
    finish(Icmp::new(peer).and_then(|mut icmp| exchange(&mut icmp, time)))
}

/// UDP echo.
pub fn udp_echo(peer: Ipv4Addr, time: Time) -> TrafficResult {
    finish(Udp::new(peer).and_then(|mut udp| exchange(&mut udp, time)))
}

/// UDP that comes back by multicast.
pub fn multicast(peer: Ipv4Addr, time: Time) -> TrafficResult {
    finish(Udp::join(peer).and_then(|mut udp| exchange(&mut udp, time)))
}

fn finish(result: io::Result<TrafficResult>) -> TrafficResult {
    result.unwrap_or_else(|error| TrafficResult {
        error: Some(error.to_string()),
        ..TrafficResult::default()
    })
}

/// Keeps [`WINDOW`] datagrams under way for `time`, then waits for the last ones.
fn exchange(carrier: &mut dyn Carrier, time: Time) -> io::Result<TrafficResult> {
    let mut result = TrafficResult::default();
    let mut under_way: BTreeMap<u64, Instant> = BTreeMap::new();
    let mut round_trips = Vec::new();
    let mut newest = None;
    let (mut payload, mut expected) = (Vec::new(), Vec::new());
    let start = Instant::now();
    let mut last_news = start;
    loop {
        while time.goes_on(start) && under_way.len() < WINDOW {
            datagram(result.sent, &mut payload);
            under_way.insert(result.sent, Instant::now());
            carrier.send(&payload)?;
            result.sent += 1;
            result.bytes_to_peer += payload.len() as u64;
        }
        if under_way.is_empty() {
            break;
        }
        if !carrier.receive(&mut payload)? {
            if last_news.elapsed() >= time.patience {
                // Those still under way are lost: `answered` stays behind `sent`.
                under_way.clear();
                last_news = Instant::now();
            }
            continue;
        }
        last_news = Instant::now();
        let Some(number) = sequence(&payload).filter(|number| *number < result.sent) else {
            result.corrupted += 1;
            continue;
        };
        datagram(number, &mut expected);
        if payload != expected {
            result.corrupted += 1;
        }
        let Some(sent_at) = under_way.remove(&number) else {
            result.duplicated += 1;
            continue;
        };
        round_trips.push(ns(sent_at.elapsed()));
        result.answered += 1;
        result.bytes_from_peer += payload.len() as u64;
        if newest.is_some_and(|newest| number < newest) {
            result.reordered += 1;
        }
        newest = newest.max(Some(number));
    }
    result.elapsed_ns = ns(start.elapsed());
    result.round_trip_ns = summary(round_trips);
    Ok(result)
}

/// Smallest, median, 99th percentile (nearest rank) and largest.
fn summary(mut samples: Vec<u64>) -> Option<[u64; 4]> {
    samples.sort_unstable();
    let rank = |percent: usize| samples[(samples.len() * percent).div_ceil(100).max(1) - 1];
    Some([*samples.first()?, rank(50), rank(99), *samples.last()?])
}

/// ICMP echo on a raw socket (RFC 792).
struct Icmp {
    socket: OwnedFd,
    peer: SocketAddrV4,
    identifier: [u8; 2],
    /// Low half of the payload's number; the payload holds all of it.
    sequence: u16,
    buffer: Vec<u8>,
}

const ICMP_ECHO_REPLY: u8 = 0;
const ICMP_ECHO: u8 = 8;
const ICMP_HEADER_BYTES: usize = 8;

impl Icmp {
    fn new(peer: Ipv4Addr) -> io::Result<Self> {
        let socket = net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP))?;
        net::sockopt::set_socket_timeout(
            &socket,
            net::sockopt::Timeout::Recv,
            Some(Duration::from_secs(1)),
        )?;
        Ok(Self {
            socket,
            peer: SocketAddrV4::new(peer, 0),
            identifier: (std::process::id() as u16).to_be_bytes(),
            sequence: 0,
            buffer: Vec::new(),
        })
    }
}

impl Carrier for Icmp {
    fn send(&mut self, payload: &[u8]) -> io::Result<()> {
        let packet = &mut self.buffer;
        packet.clear();
        packet.extend_from_slice(&[ICMP_ECHO, 0, 0, 0]);
        packet.extend_from_slice(&self.identifier);
        packet.extend_from_slice(&self.sequence.to_be_bytes());
        packet.extend_from_slice(payload);
        let sum = checksum(packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        self.sequence = self.sequence.wrapping_add(1);
        net::sendto(&self.socket, packet, SendFlags::empty(), &self.peer)?;
        Ok(())
    }

    fn receive(&mut self, payload: &mut Vec<u8>) -> io::Result<bool> {
        self.buffer.resize(BUFFER_BYTES, 0);
        loop {
            let length = match net::recv(&self.socket, &mut self.buffer[..], RecvFlags::empty()) {
                Ok((length, _)) => length,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            if let Some(answer) = echo_reply(&self.buffer[..length], self.identifier) {
                payload.clear();
                payload.extend_from_slice(answer);
                return Ok(true);
            }
        }
    }
}

/// The payload of an echo reply to us, out of an IPv4 packet. The kernel has checked both
/// checksums.
fn echo_reply(packet: &[u8], identifier: [u8; 2]) -> Option<&[u8]> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let icmp = packet.get(header..)?;
    let ours = *icmp.first()? == ICMP_ECHO_REPLY && icmp.get(4..6)? == identifier;
    icmp.get(ICMP_HEADER_BYTES..).filter(|_| ours)
}

/// The Internet checksum (RFC 1071).
fn checksum(data: &[u8]) -> u16 {
    let mut sum: u32 = data
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// UDP, answered from the same place or by multicast.
struct Udp {
    socket: UdpSocket,
    peer: SocketAddrV4,
}

impl Udp {
    fn new(peer: Ipv4Addr) -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        Self::with(socket, SocketAddrV4::new(peer, ECHO_PORT))
    }

    fn join(peer: Ipv4Addr) -> io::Result<Self> {
        // Bound to the group, it hears nothing that was sent to this host alone.
        let socket = UdpSocket::bind((GROUP, MULTICAST_PORT))?;
        socket.join_multicast_v4(&GROUP, &Ipv4Addr::UNSPECIFIED)?;
        Self::with(socket, SocketAddrV4::new(peer, MULTICAST_PORT))
    }

    fn with(socket: UdpSocket, peer: SocketAddrV4) -> io::Result<Self> {
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        Ok(Self { socket, peer })
    }
}

impl Carrier for Udp {
    fn send(&mut self, payload: &[u8]) -> io::Result<()> {
        self.socket.send_to(payload, self.peer).map(drop)
    }

    fn receive(&mut self, payload: &mut Vec<u8>) -> io::Result<bool> {
        payload.resize(BUFFER_BYTES, 0);
        match self.socket.recv(payload) {
            Ok(length) => {
                payload.truncate(length);
                Ok(true)
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::TimedOut
                        | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// A peer that does something wrong to the tenth datagram.
    struct Faulty {
        queue: VecDeque<Vec<u8>>,
        sent: u64,
        wrong: fn(&mut VecDeque<Vec<u8>>),
    }

    impl Carrier for Faulty {
        fn send(&mut self, payload: &[u8]) -> io::Result<()> {
            self.queue.push_back(payload.to_vec());
            self.sent += 1;
            if self.sent == 10 {
                (self.wrong)(&mut self.queue);
            }
            Ok(())
        }

        fn receive(&mut self, payload: &mut Vec<u8>) -> io::Result<bool> {
            match self.queue.pop_front() {
                Some(next) => *payload = next,
                None => return Err(io::ErrorKind::ConnectionReset.into()),
            }
            Ok(true)
        }
    }

    /// For as long as it takes until the peer has had its tenth datagram, and some behind it.
    fn run(wrong: fn(&mut VecDeque<Vec<u8>>)) -> TrafficResult {
        let mut time = Duration::from_millis(2);
        loop {
            let mut peer = Faulty {
                queue: VecDeque::new(),
                sent: 0,
                wrong,
            };
            let result = exchange(&mut peer, Time::of(time)).unwrap();
            if result.sent >= 16 {
                return result;
            }
            time *= 2;
        }
    }

    #[test]
    fn what_a_network_does_wrong_is_counted() {
        let good = run(|_| {});
        assert_eq!(
            (good.answered, good.reordered, good.corrupted),
            (good.sent, 0, 0)
        );
        assert_eq!(good.bytes_to_peer, good.bytes_from_peer);
        let swapped = run(|queue| queue.swap(8, 9));
        assert_eq!((swapped.reordered, swapped.corrupted), (1, 0));
        let flipped = run(|queue| queue[9][8] ^= 0x10);
        assert_eq!((flipped.reordered, flipped.corrupted), (0, 1));
        let doubled = run(|queue| queue.push_back(queue[9].clone()));
        assert_eq!((doubled.duplicated, doubled.corrupted), (1, 0));
    }

    #[test]
    fn icmp_checksum_of_rfc_1071() {
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(&data), !0xddf2);
        assert_eq!(checksum(&[0xff]), !0xff00);
    }

    #[test]
    fn only_answers_to_us_are_taken() {
        let mut packet = vec![0x45; 20];
        packet.extend_from_slice(&[0, 0, 0, 0, 0x12, 0x34, 0, 1, b'x']);
        assert_eq!(echo_reply(&packet, [0x12, 0x34]), Some(&b"x"[..]));
        assert_eq!(echo_reply(&packet, [0x12, 0x35]), None);
        packet[20] = ICMP_ECHO;
        assert_eq!(echo_reply(&packet, [0x12, 0x34]), None);
        assert_eq!(echo_reply(&packet[..21], [0x12, 0x34]), None);
        assert_eq!(echo_reply(&[], [0x12, 0x34]), None);
    }
}
