//! A checked TCP stream in a guest that goes on beside whatever else is done, until it is ended.

use agent_protocol::traffic::TrafficResult;
use cofferdam::bench::guest::Guest;

use super::{GATEWAY, shell, wait_until, wait_until_connected};

/// Longer than any test, in seconds.
const LONG: u64 = 3000;
/// What is to come through before a stream is said to go on, in bytes.
const SOME_BYTES: u64 = 64 << 10;

/// Begins one, in a session of its own: the agent ends programs whose client goes, and sessions
/// share the processor by their weights (`CONFIG_SCHED_AUTOGROUP`), of which this one has the least.
#[track_caller]
pub fn begin(guest: &mut Guest) {
    let script = format!(
        "setsid /init traffic tcp_echo {GATEWAY} {LONG} > /tmp/stream 2> /tmp/stream.log < /dev/null & \
         echo $! > /tmp/stream.pid; sleep 0.1; echo 19 > /proc/$!/autogroup"
    );
    shell(guest, &script);
    wait_until_connected(guest, 1);
}

/// It has neither ended nor broken off.
#[track_caller]
pub fn is_under_way(guest: &mut Guest) {
    shell(
        guest,
        "kill -0 $(cat /tmp/stream.pid) || { cat /tmp/stream /tmp/stream.log; exit 1; }",
    );
    wait_until_connected(guest, 1);
}

/// More comes back through `eth0`.
#[track_caller]
pub fn moves_on(guest: &mut Guest) {
    let received = |guest: &mut Guest| -> u64 {
        let text = shell(guest, "cat /sys/class/net/eth0/statistics/rx_bytes");
        text.trim().parse().unwrap()
    };
    let before = received(guest);
    wait_until("more of a stream", || {
        // A driver that was inserted anew counts from zero.
        received(guest).abs_diff(before) > SOME_BYTES
    });
}

/// Ends it. All that was sent came back, and is the same.
#[track_caller]
pub fn end(guest: &mut Guest) -> TrafficResult {
    shell(guest, "kill -TERM $(cat /tmp/stream.pid)");
    wait_until("the end of a stream", || {
        shell(guest, "cat /tmp/stream").ends_with('\n')
    });
    let result: TrafficResult = serde_json::from_str(&shell(guest, "cat /tmp/stream")).unwrap();
    eprintln!("{result:?}");
    assert_eq!((&result.error, result.corrupted), (&None, 0), "{result:?}");
    assert_eq!(result.bytes_from_peer, result.bytes_to_peer, "{result:?}");
    assert!(result.bytes_to_peer > SOME_BYTES, "{result:?}");
    result
}
