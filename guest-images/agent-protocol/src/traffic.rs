//! What the agent's traffic tool (`/init traffic KIND ADDRESS SECONDS`) tells: one line of JSON.

use serde::{Deserialize, Serialize};

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrafficKind {
    /// ICMP echo, as fast as answers come, of all sizes up to the MTU.
    PingFlood,
    /// UDP to port 7, as fast as answers come, of all sizes up to the MTU.
    UdpEcho,
    /// UDP to port 7777, which sends it on to a multicast group that was joined.
    Multicast,
    /// A TCP stream to port 7 and back.
    TcpEcho,
    /// A TCP stream to port 9, which answers with its checksum.
    TcpSink,
    /// A TCP stream from port 19.
    TcpSource,
}

impl TrafficKind {
    /// All kinds.
    pub const ALL: [Self; 6] = [
        Self::PingFlood,
        Self::UdpEcho,
        Self::Multicast,
        Self::TcpEcho,
        Self::TcpSink,
        Self::TcpSource,
    ];

    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::PingFlood => "ping_flood",
            Self::UdpEcho => "udp_echo",
            Self::Multicast => "multicast",
            Self::TcpEcho => "tcp_echo",
            Self::TcpSink => "tcp_sink",
            Self::TcpSource => "tcp_source",
        }
    }

    /// The kind of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// What became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficResult {
    /// How long it took, in nanoseconds.
    pub elapsed_ns: u64,
    /// Packets sent; 0 for a stream.
    pub sent: u64,
    /// Different packets that came back; 0 for a stream.
    pub answered: u64,
    /// Packets that came back after a later one.
    pub reordered: u64,
    /// Packets that came back more than once.
    pub duplicated: u64,
    /// Packets (or bytes of a stream) with other contents than they were sent with.
    pub corrupted: u64,
    /// Payload bytes that arrived at the peer: all that were sent, once the end was answered.
    pub bytes_to_peer: u64,
    /// Payload bytes that came from the peer.
    pub bytes_from_peer: u64,
    /// Round trips in nanoseconds: smallest, median, 99th percentile, largest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_trip_ns: Option<[u64; 4]>,
    /// Longest time that nothing of a stream came from the peer, in nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub longest_silence_ns: Option<u64>,
    /// What went wrong so that it ended early.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_found_by_the_name_it_has_in_json() {
        for kind in TrafficKind::ALL {
            assert_eq!(TrafficKind::from_name(kind.name()), Some(kind));
            assert_eq!(
                serde_json::to_string(&kind).unwrap(),
                format!("\"{}\"", kind.name())
            );
        }
    }
}
