//! `/init traffic KIND ADDRESS SECONDS`: traffic whose every byte is checked, and a line of JSON about
//! it ([`agent_protocol::traffic`]).
//!
//! Contents are made from the sequence number or the offset, so that a loss, a reordering or a wrong
//! byte shows without anything being remembered.

mod contents;
mod datagrams;
mod streams;

use std::net::Ipv4Addr;
use std::time::Duration;

use agent_protocol::traffic::{TrafficKind, TrafficResult};

/// Longest run.
const MAX_SECONDS: u64 = 3600;

/// How long an answer may take before it counts as lost or the peer as gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs what `arguments` say and prints the result. Returns the exit status: 0 when all that was sent
/// came back as it should.
pub fn main(arguments: &[String]) -> u8 {
    let Some((kind, peer, time)) = parse(arguments) else {
        let kinds: Vec<&str> = TrafficKind::ALL.iter().map(|kind| kind.name()).collect();
        eprintln!(
            "usage: traffic {} ADDRESS SECONDS (1 to {MAX_SECONDS})",
            kinds.join("|")
        );
        return 2;
    };
    let result = match kind {
        TrafficKind::PingFlood => datagrams::ping_flood(peer, time),
        TrafficKind::UdpEcho => datagrams::udp_echo(peer, time),
        TrafficKind::Multicast => datagrams::multicast(peer, time),
        TrafficKind::TcpEcho => streams::echo(peer, time),
        TrafficKind::TcpSink => streams::sink(peer, time),
        TrafficKind::TcpSource => streams::source(peer, time),
    };
    match serde_json::to_string(&result) {
        Ok(line) => println!("{line}"),
        Err(error) => eprintln!("traffic: {error}"),
    }
    u8::from(!all_well(&result))
}

/// Whether nothing was lost, reordered, doubled or changed.
fn all_well(result: &TrafficResult) -> bool {
    result.error.is_none()
        && result.sent == result.answered
        && result.reordered == 0
        && result.duplicated == 0
        && result.corrupted == 0
}

fn parse(arguments: &[String]) -> Option<(TrafficKind, Ipv4Addr, Duration)> {
    let [kind, address, seconds] = arguments else {
        return None;
    };
    let seconds = seconds
        .parse()
        .ok()
        .filter(|s| (1..=MAX_SECONDS).contains(s))?;
    Some((
        TrafficKind::from_name(kind)?,
        address.parse().ok()?,
        Duration::from_secs(seconds),
    ))
}

/// Nanoseconds of a duration.
fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn arguments_are_checked() {
        assert!(parse(&words("tcp_echo 10.0.2.2 60")).is_some());
        for wrong in [
            "tcp_echo 10.0.2.2",
            "tcp 10.0.2.2 60",
            "tcp_echo gateway 60",
            "tcp_echo 10.0.2.2 0",
            "tcp_echo 10.0.2.2 3601",
            "tcp_echo 10.0.2.2 60 x",
        ] {
            assert!(parse(&words(wrong)).is_none(), "{wrong}");
        }
    }
}
