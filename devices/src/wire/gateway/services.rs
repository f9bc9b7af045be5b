//! What answers at the gateway's address: the old small services, made so that a test can check
//! contents and not only that something came back.
//!
//! | port | | |
//! | --- | --- | --- |
//! | 7 | TCP, UDP | echo (RFC 862) |
//! | 9 | TCP | discard (RFC 863); at the end of the stream it answers one line: the checksum and length of what came, as `cksum` prints them |
//! | 19 | TCP | source (RFC 864) of [`source_line`]s, numbered so that loss and reordering show |
//! | 67 | UDP | DHCP |
//! | 7777 | UDP | sends each datagram on to 239.1.1.1, port 7777, for a guest that wants to hear multicast |

mod saved;

use std::collections::VecDeque;
use std::net::Ipv4Addr;

use crc::{CRC_32_CKSUM, Crc, Digest};
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Duration;
use smoltcp::wire::{IpEndpoint, IpListenEndpoint};

use super::dhcp::{self, DhcpServer};

pub(super) use self::saved::ServiceState;

/// Group and port that datagrams for port 7777 are sent on to.
pub const MULTICAST_GROUP: (Ipv4Addr, u16) = (Ipv4Addr::new(239, 1, 1, 1), 7777);
/// Length of a [`source_line`].
pub const SOURCE_LINE_BYTES: usize = 16;

const ECHO_PORT: u16 = 7;
const DISCARD_PORT: u16 = 9;
const SOURCE_PORT: u16 = 19;

/// Connections of one service at one time; a further one is refused by RST.
const CONNECTIONS: usize = 16;
/// As much as a window can tell exactly. A larger one is told in units of more than a byte: what it
/// loses in rounding looks to the stack as if the guest had sent beyond it, and a guest whose own
/// window was closed is not heard any more.
const STREAM_BUFFER_BYTES: usize = 0xffff;
/// For a direction that carries next to nothing.
const SMALL_BUFFER_BYTES: usize = 256;
const DATAGRAMS: usize = 64;
const DATAGRAM_BUFFER_BYTES: usize = 64 * 1024;
/// A guest that was reset leaves connections behind: they are asked for life and given up.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const GIVE_UP: Duration = Duration::from_secs(60);

/// The checksum that POSIX's `cksum` prints.
static CKSUM: Crc<u32> = Crc::<u32>::new(&CRC_32_CKSUM);

/// Line `number` of what port 19 sends: 15 hexadecimal digits and a newline.
pub fn source_line(number: u64) -> [u8; SOURCE_LINE_BYTES] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    std::array::from_fn(|place| match place {
        15 => b'\n',
        _ => DIGITS[(number >> (4 * (14 - place)) & 0xf) as usize],
    })
}

/// What a connection to one of the stream services is in the middle of.
enum Stream {
    Echo {
        /// The last that was sent: all that the guest has not acknowledged, and maybe more.
        sent: VecDeque<u8>,
    },
    Discard {
        digest: Digest<'static, u32>,
        /// What was answered at the end of the stream.
        answer: Option<String>,
    },
    Source,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Service {
    Echo,
    Discard,
    Source,
}

impl Service {
    const ALL: [Self; 3] = [Self::Echo, Self::Discard, Self::Source];

    fn port(self) -> u16 {
        match self {
            Self::Echo => ECHO_PORT,
            Self::Discard => DISCARD_PORT,
            Self::Source => SOURCE_PORT,
        }
    }

    fn stream(self) -> Stream {
        match self {
            Self::Echo => Stream::Echo {
                sent: VecDeque::new(),
            },
            Self::Discard => Stream::Discard {
                digest: CKSUM.digest(),
                answer: None,
            },
            Self::Source => Stream::Source,
        }
    }

    fn socket(self) -> tcp::Socket<'static> {
        let (receive, send) = match self {
            Self::Echo => (STREAM_BUFFER_BYTES, STREAM_BUFFER_BYTES),
            Self::Discard => (STREAM_BUFFER_BYTES, SMALL_BUFFER_BYTES),
            Self::Source => (SMALL_BUFFER_BYTES, STREAM_BUFFER_BYTES),
        };
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; receive]),
            tcp::SocketBuffer::new(vec![0; send]),
        );
        socket.set_nagle_enabled(false);
        socket.set_keep_alive(Some(KEEP_ALIVE));
        socket.set_timeout(Some(GIVE_UP));
        socket
    }
}

struct Connection {
    service: Service,
    handle: SocketHandle,
    stream: Stream,
    /// Bytes that came from the guest, and bytes that were sent to it. They begin anew at 2^64, as
    /// sequence numbers do before: those of a stored state may be anything.
    taken_bytes: u64,
    written_bytes: u64,
}

impl Connection {
    fn new(service: Service, handle: SocketHandle) -> Self {
        Self {
            service,
            handle,
            stream: service.stream(),
            taken_bytes: 0,
            written_bytes: 0,
        }
    }
}

/// The services of one network.
pub(super) struct Services {
    connections: Vec<Connection>,
    echo: SocketHandle,
    multicast: SocketHandle,
    dhcp: SocketHandle,
    leases: DhcpServer,
    scratch: Box<[u8]>,
}

impl Services {
    pub(super) fn leases(&self) -> &DhcpServer {
        &self.leases
    }

    pub(super) fn leases_mut(&mut self) -> &mut DhcpServer {
        &mut self.leases
    }

    /// Opens the services' sockets in `sockets`.
    pub(super) fn new(leases: DhcpServer, sockets: &mut SocketSet<'static>) -> Self {
        let echo = datagram_socket(sockets, ECHO_PORT);
        let multicast = datagram_socket(sockets, MULTICAST_GROUP.1);
        let dhcp = datagram_socket(sockets, dhcp::SERVER_PORT);
        let mut services = Self {
            connections: Vec::new(),
            echo,
            multicast,
            dhcp,
            leases,
            scratch: vec![0; DATAGRAM_BUFFER_BYTES].into_boxed_slice(),
        };
        services.listen(sockets);
        services
    }

    /// Moves what the sockets hold on, a bounded amount. Returns whether there may be something to
    /// send.
    pub(super) fn run(&mut self, sockets: &mut SocketSet<'static>) -> bool {
        let mut moved = false;
        for connection in &mut self.connections {
            let socket = sockets.get_mut::<tcp::Socket>(connection.handle);
            moved |= serve_stream(connection, socket, &mut self.scratch);
        }
        self.connections.retain(|connection| {
            let closed =
                sockets.get::<tcp::Socket>(connection.handle).state() == tcp::State::Closed;
            if closed {
                sockets.remove(connection.handle);
            }
            !closed
        });
        self.listen(sockets);

        let echo = sockets.get_mut::<udp::Socket>(self.echo);
        while let Ok((length, from)) = echo.recv_slice(&mut self.scratch) {
            moved |= send_datagram(echo, &self.scratch[..length], from.endpoint);
        }
        let multicast = sockets.get_mut::<udp::Socket>(self.multicast);
        while let Ok((length, _)) = multicast.recv_slice(&mut self.scratch) {
            moved |= send_datagram(multicast, &self.scratch[..length], MULTICAST_GROUP.into());
        }
        let dhcp = sockets.get_mut::<udp::Socket>(self.dhcp);
        while let Ok((length, _)) = dhcp.recv_slice(&mut self.scratch) {
            if let Some(answer) = self.leases.answer(&self.scratch[..length]) {
                let to = (answer.to, dhcp::CLIENT_PORT).into();
                moved |= send_datagram(dhcp, &answer.message, to);
            }
        }
        moved
    }

    /// Keeps one socket of each service listening while it may have another connection.
    fn listen(&mut self, sockets: &mut SocketSet<'static>) {
        for service in Service::ALL {
            let mut count = 0;
            let mut listening = false;
            for connection in self.connections.iter().filter(|c| c.service == service) {
                count += 1;
                listening |= sockets.get::<tcp::Socket>(connection.handle).is_listening();
            }
            if listening || count >= CONNECTIONS {
                continue;
            }
            let mut socket = service.socket();
            if let Err(error) = socket.listen(service.port()) {
                tracing::error!(%error, port = service.port(), "gateway cannot listen");
                continue;
            }
            let handle = sockets.add(socket);
            self.connections.push(Connection::new(service, handle));
        }
    }
}

fn datagram_socket(sockets: &mut SocketSet<'static>, port: u16) -> SocketHandle {
    let buffer = || {
        udp::PacketBuffer::new(
            vec![udp::PacketMetadata::EMPTY; DATAGRAMS],
            vec![0; DATAGRAM_BUFFER_BYTES],
        )
    };
    let mut socket = udp::Socket::new(buffer(), buffer());
    if let Err(error) = socket.bind(IpListenEndpoint::from(port)) {
        tracing::error!(%error, port, "gateway cannot bind");
    }
    sockets.add(socket)
}

/// Whether the datagram will be sent. One that has no room or no address is lost, as datagrams are.
fn send_datagram(socket: &mut udp::Socket<'_>, data: &[u8], to: IpEndpoint) -> bool {
    match socket.send_slice(data, to) {
        Ok(()) => true,
        Err(error) => {
            tracing::trace!(%error, %to, "gateway lost a datagram");
            false
        }
    }
}

/// Moves a connection on by at most about one buffer. Returns whether it did anything.
fn serve_stream(
    connection: &mut Connection,
    socket: &mut tcp::Socket<'_>,
    scratch: &mut [u8],
) -> bool {
    let before = (connection.taken_bytes, connection.written_bytes);
    let (taken_bytes, written_bytes) = (&mut connection.taken_bytes, &mut connection.written_bytes);
    match &mut connection.stream {
        Stream::Echo { sent } => {
            while socket.can_recv() && socket.can_send() {
                let room = (socket.send_capacity() - socket.send_queue()).min(scratch.len());
                let Ok(taken) = socket.recv_slice(&mut scratch[..room]) else {
                    break;
                };
                // There is room for all of it: it was measured above.
                if socket.send_slice(&scratch[..taken]) != Ok(taken) {
                    socket.abort();
                }
                sent.extend(&scratch[..taken]);
                *taken_bytes = taken_bytes.wrapping_add(taken as u64);
                *written_bytes = written_bytes.wrapping_add(taken as u64);
            }
            sent.drain(..sent.len().saturating_sub(socket.send_queue()));
        }
        Stream::Discard { digest, answer } => {
            while socket.can_recv() {
                let Ok(taken) = socket.recv(|data| {
                    digest.update(data);
                    (data.len(), data.len())
                }) else {
                    break;
                };
                *taken_bytes = taken_bytes.wrapping_add(taken as u64);
            }
            if socket.state() == tcp::State::CloseWait && answer.is_none() {
                let line = format!("{} {taken_bytes}\n", cksum(digest.clone(), *taken_bytes));
                // The buffer is empty and longer than any such line.
                if socket.send_slice(line.as_bytes()) == Ok(line.len()) {
                    *written_bytes = written_bytes.wrapping_add(line.len() as u64);
                    *answer = Some(line);
                }
            }
        }
        Stream::Source => {
            while socket.can_recv() {
                // What a client says to a source does not matter.
                let Ok(taken) = socket.recv(|data| (data.len(), data.len())) else {
                    break;
                };
                *taken_bytes = taken_bytes.wrapping_add(taken as u64);
            }
            while socket.can_send() {
                let (line, start) = source_at(*written_bytes);
                let Ok(taken) = socket.send_slice(&line[start..]) else {
                    break;
                };
                *written_bytes = written_bytes.wrapping_add(taken as u64);
            }
        }
    }
    let mut moved = before != (connection.taken_bytes, connection.written_bytes);
    // The client has closed its half and everything it sent was served.
    if socket.state() == tcp::State::CloseWait && !socket.can_recv() {
        socket.close();
        moved = true;
    }
    moved
}

/// The line that byte `offset` of what a source sends is in, and where in it.
fn source_at(offset: u64) -> ([u8; SOURCE_LINE_BYTES], usize) {
    let bytes = SOURCE_LINE_BYTES as u64;
    (source_line(offset / bytes), (offset % bytes) as usize)
}

/// POSIX's `cksum` of `bytes` bytes: the length follows the data, least byte first, no leading
/// zeros.
fn cksum(mut digest: Digest<'static, u32>, bytes: u64) -> u32 {
    let mut rest = bytes;
    while rest > 0 {
        digest.update(&[rest as u8]);
        rest >>= 8;
    }
    digest.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_the_one_that_cksum_prints() {
        // printf 123456789 | cksum; cksum </dev/null
        let mut digest = CKSUM.digest();
        digest.update(b"123456789");
        assert_eq!(cksum(digest, 9), 930766865);
        assert_eq!(cksum(CKSUM.digest(), 0), 4294967295);
    }

    #[test]
    fn source_lines_count_in_hexadecimal() {
        assert_eq!(&source_line(0), b"000000000000000\n");
        assert_eq!(&source_line(0xabc1), b"00000000000abc1\n");
    }
}
