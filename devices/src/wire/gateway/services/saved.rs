//! Connections to the services as values.

use serde::{Deserialize, Serialize};
use smoltcp::iface::SocketSet;
use smoltcp::socket::tcp;
use smoltcp::wire::IpAddress;

use super::super::connections::{ConnectionState, Phase};
use super::super::handshakes::{Handshake, Tuple};
use super::{
    CKSUM, CONNECTIONS, Connection, SOURCE_LINE_BYTES, Service, Services, Stream, source_at,
};

/// What a service knows of a connection, as a value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in super::super) enum ServiceState {
    Echo,
    Discard {
        checksum: u32,
        answer: Option<String>,
    },
    Source,
}

impl ServiceState {
    fn service(&self) -> Service {
        match self {
            Self::Echo => Service::Echo,
            Self::Discard { .. } => Service::Discard,
            Self::Source => Service::Source,
        }
    }
}

impl Services {
    /// Whether there is this connection.
    pub(in super::super) fn has(&self, tuple: &Tuple, sockets: &SocketSet<'static>) -> bool {
        self.connections.iter().any(|connection| {
            tuple_of(sockets.get::<tcp::Socket>(connection.handle)) == Some(*tuple)
        })
    }

    /// All connections that began as `began` tells.
    pub(in super::super) fn connections(
        &self,
        sockets: &mut SocketSet<'static>,
        began: impl Fn(Tuple) -> Option<Handshake>,
    ) -> Vec<(ServiceState, ConnectionState)> {
        let mut states = Vec::new();
        for connection in &self.connections {
            let socket = sockets.get_mut::<tcp::Socket>(connection.handle);
            let Some(phase) = phase_of(socket.state()) else {
                continue;
            };
            let Some((tuple, handshake)) =
                tuple_of(socket).and_then(|tuple| Some((tuple, began(tuple)?)))
            else {
                continue;
            };
            let mut received = vec![0; socket.recv_queue()];
            // Fails for a connection that receives no more and has nothing: there is nothing to
            // look at then.
            let _ = socket.peek_slice(&mut received);
            let state = ConnectionState {
                tuple,
                handshake,
                phase,
                taken_bytes: connection.taken_bytes,
                written_bytes: connection.written_bytes,
                received,
                under_way: connection.under_way(socket.send_queue()),
            };
            states.push((connection.stream.save(), state));
        }
        states
    }

    /// A new socket for a connection that goes on, if there may be another one.
    pub(in super::super) fn socket_for(
        &self,
        service: &ServiceState,
        state: &ConnectionState,
    ) -> Option<tcp::Socket<'static>> {
        let service = service.service();
        let others = self.connections.iter().filter(|c| c.service == service);
        let possible = state.tuple.port == service.port() && others.count() < CONNECTIONS;
        possible.then(|| service.socket())
    }

    /// Goes on with a connection.
    pub(in super::super) fn go_on_with(
        &mut self,
        service: &ServiceState,
        state: &ConnectionState,
        socket: tcp::Socket<'static>,
        sockets: &mut SocketSet<'static>,
    ) {
        let mut connection = Connection::new(service.service(), sockets.add(socket));
        connection.taken_bytes = state.taken_bytes;
        connection.written_bytes = state.written_bytes;
        connection.stream = match service {
            ServiceState::Echo => Stream::Echo {
                sent: state.under_way.iter().copied().collect(),
            },
            ServiceState::Discard { checksum, answer } => Stream::Discard {
                digest: CKSUM.digest_with_initial(checksum ^ CKSUM.algorithm.xorout),
                answer: answer.clone(),
            },
            ServiceState::Source => Stream::Source,
        };
        self.connections.push(connection);
    }
}

impl Stream {
    fn save(&self) -> ServiceState {
        match self {
            Self::Echo { .. } => ServiceState::Echo,
            Self::Discard { digest, answer } => ServiceState::Discard {
                checksum: digest.clone().finalize(),
                answer: answer.clone(),
            },
            Self::Source => ServiceState::Source,
        }
    }
}

impl Connection {
    /// The last `count` bytes that were sent.
    fn under_way(&self, count: usize) -> Vec<u8> {
        match &self.stream {
            Stream::Echo { sent } => {
                let skipped = sent.len().saturating_sub(count);
                sent.iter().skip(skipped).copied().collect()
            }
            Stream::Discard { answer, .. } => {
                let line = answer.as_deref().unwrap_or_default().as_bytes();
                line[line.len().saturating_sub(count)..].to_vec()
            }
            Stream::Source => {
                let mut offset = self.written_bytes.wrapping_sub(count as u64);
                let mut bytes = Vec::with_capacity(count + SOURCE_LINE_BYTES);
                while bytes.len() < count {
                    let (line, start) = source_at(offset);
                    bytes.extend_from_slice(&line[start..]);
                    offset = offset.wrapping_add((SOURCE_LINE_BYTES - start) as u64);
                }
                bytes.truncate(count);
                bytes
            }
        }
    }
}

/// Between whom a socket's connection is.
fn tuple_of(socket: &tcp::Socket<'_>) -> Option<Tuple> {
    let (local, remote) = (socket.local_endpoint()?, socket.remote_endpoint()?);
    let IpAddress::Ipv4(guest) = remote.addr;
    Some(Tuple {
        guest,
        guest_port: remote.port,
        port: local.port,
    })
}

/// How far a socket's connection is, if it is one that goes on. Services close only when the guest
/// has.
fn phase_of(state: tcp::State) -> Option<Phase> {
    match state {
        tcp::State::SynReceived => Some(Phase::Opening),
        tcp::State::Established => Some(Phase::Open),
        tcp::State::CloseWait => Some(Phase::GuestClosed),
        tcp::State::LastAck => Some(Phase::Closing),
        _ => None,
    }
}
