//! `/init traffic KIND ADDRESS SECONDS [PATIENCE]`: traffic whose every byte is checked, and a line
//! of JSON about it ([`agent_protocol::traffic`]).
//!
//! `SIGINT` and `SIGTERM` end it as if the time was up: what is under way is waited for, and the line
//! printed.
//!
//! Contents are made from the sequence number or the offset, so that a loss, a reordering or a
//! wrong byte shows without anything being remembered.

mod contents;
mod datagrams;
mod streams;

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use agent_protocol::traffic::{TrafficKind, TrafficResult};
use guest_agent::{hear_of_signals, is_asked_to_end};

/// Longest time that is taken, in seconds.
const MAX_SECONDS: f64 = 3600.0;

/// Shortest.
const MIN_SECONDS: f64 = 0.01;

/// How long an answer may take before it counts as lost or the peer as gone, unless said otherwise.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long nothing may come through a stream, unless said otherwise. A NIC that is reset loses
/// what is under way, and either end then waits before it sends again, each time for twice as long,
/// up to two minutes with Linux.
const STREAM_PATIENCE: Duration = Duration::from_secs(130);

/// How long to send, and to wait for what does not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Time {
    run: Duration,
    patience: Duration,
    stream_patience: Duration,
}

/// Runs what `arguments` say and prints the result. Returns the exit status: 0 when all that was
/// sent came back as it should.
pub fn main(arguments: &[String]) -> u8 {
    let Some((kind, peer, time)) = parse(arguments) else {
        let kinds: Vec<&str> = TrafficKind::ALL.iter().map(|kind| kind.name()).collect();
        eprintln!(
            "usage: traffic {} ADDRESS SECONDS [PATIENCE] ({MIN_SECONDS} to {MAX_SECONDS} seconds)",
            kinds.join("|")
        );
        return 2;
    };
    if let Err(error) = hear_of_signals() {
        eprintln!("traffic: a signal will end it without a result: {error}");
    }
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

impl Time {
    /// Whether more is to be sent by who has since `start`.
    fn goes_on(&self, start: Instant) -> bool {
        start.elapsed() < self.run && !is_asked_to_end()
    }

    /// With the usual patience.
    #[cfg(test)]
    fn of(run: Duration) -> Self {
        Self {
            run,
            patience: PATIENCE,
            stream_patience: STREAM_PATIENCE,
        }
    }
}

fn parse(arguments: &[String]) -> Option<(TrafficKind, Ipv4Addr, Time)> {
    let (kind, address, seconds, patience) = match arguments {
        [kind, address, seconds] => (kind, address, seconds, None),
        [kind, address, seconds, patience] => (kind, address, seconds, Some(patience)),
        _ => return None,
    };
    let time = |seconds: &String| -> Option<Duration> {
        let seconds: f64 = seconds.parse().ok()?;
        let is_sane = (MIN_SECONDS..=MAX_SECONDS).contains(&seconds);
        is_sane.then(|| Duration::try_from_secs_f64(seconds).ok())?
    };
    let patience = match patience {
        Some(patience) => Some(time(patience)?),
        None => None,
    };
    let time = Time {
        run: time(seconds)?,
        patience: patience.unwrap_or(PATIENCE),
        stream_patience: patience.unwrap_or(STREAM_PATIENCE),
    };
    Some((TrafficKind::from_name(kind)?, address.parse().ok()?, time))
}

/// Nanoseconds of a duration.
fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn arguments_are_checked() {
        let (_, _, time) = parse(&words("tcp_echo 10.0.2.2 60")).unwrap();
        assert_eq!(time.run, Duration::from_secs(60));
        assert_eq!(
            (time.patience, time.stream_patience),
            (PATIENCE, STREAM_PATIENCE)
        );
        let (_, _, time) = parse(&words("tcp_echo 10.0.2.2 0.3 2")).unwrap();
        assert_eq!(time.run, Duration::from_millis(300));
        assert_eq!(time.stream_patience, Duration::from_secs(2));
        for wrong in [
            "tcp_echo 10.0.2.2",
            "tcp 10.0.2.2 60",
            "tcp_echo gateway 60",
            "tcp_echo 10.0.2.2 0",
            "tcp_echo 10.0.2.2 3601",
            "tcp_echo 10.0.2.2 60 x",
            "tcp_echo 10.0.2.2 NaN",
            "tcp_echo 10.0.2.2 -1",
            "tcp_echo 10.0.2.2 60 1 1",
        ] {
            assert!(parse(&words(wrong)).is_none(), "{wrong}");
        }
    }
}
