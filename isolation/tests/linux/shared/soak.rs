//! Entries of the stock e1000 isolated and released at random, in any order with the calls that
//! meet them.
//!
//! ```text
//!  for COFFERDAM_SOAK_SECONDS (5):
//!    a TCP stream, contents checked  ║ isolate some entries, use the driver, wait, release; again and again
//!    no stream                       ║ the same, with operations that stop and start the NIC
//! ```
//!
//! The two are apart because of the driver: under transmit traffic `ethtool -G` can leave the NIC
//! without its link (docs/limits.md).

use std::time::{Duration, Instant};

use isolation::compensation::effects::KernelModel;

use super::e1000::E1000_ENTRIES;
use super::{Lent, with_network};
use crate::named;

/// Longest time of one stream, and of the rounds beside it.
const STREAM: Duration = Duration::from_secs(60);

/// Rounds without a stream that follow one.
const RESTARTS: u32 = 3;

/// Longest wait between isolating and releasing.
const MAX_WAIT_MS: u64 = 2000;

/// Uses entries that leave the NIC running.
const USE: &str = "ethtool -S eth0; ethtool -d eth0; ip link set eth0 promisc on; ip link set eth0 promisc off; \
    ethtool -K eth0 rxvlan off; ethtool -K eth0 rxvlan on";

/// Uses entries that stop and start the NIC.
const RESTART: &str = "ethtool -G eth0 rx 128; ethtool -G eth0 rx 256; ip link set eth0 mtu 1400; ip link set eth0 mtu 1500; \
    ethtool -K eth0 rx off; ethtool -K eth0 rx on; ip link set eth0 down; ip link set eth0 up";

/// Whether the gateway answers, some seconds after a restart of the NIC at the latest.
const ANSWERED: &str = "for i in 1 2 3 4 5 6 7 8; do ping -c 1 -W 1 10.0.2.2 > /dev/null && exit; done; \
    echo no; ip -s addr; ethtool -d eth0; ethtool -S eth0; dmesg | tail -n 20";

/// Runs `command` beside others; its end is noted.
fn in_background(command: &str, name: &str) -> String {
    format!(
        "rm -f /tmp/{name}.end; ({command}; touch /tmp/{name}.end) < /dev/null > /tmp/{name} 2>&1 &"
    )
}

/// A sequence of pseudo-random numbers (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

struct Soak {
    machine: Lent,
    random: Random,
    model: KernelModel,
    rounds: u32,
    calls: u64,
}

impl Soak {
    /// Isolates some entries while `commands` run in the guest, and releases them, perhaps before
    /// those end.
    fn round(&mut self, commands: &str) {
        let random = &mut self.random;
        let entries: Vec<&str> = E1000_ENTRIES
            .iter()
            .filter(|_| random.next() & 1 == 0)
            .copied()
            .collect();
        if entries.is_empty() {
            return;
        }
        let machine = &mut self.machine;
        // Every other time calls that sleep go on in the guest, and some are open at the release.
        machine.settings.sleep_limit = Duration::from_millis(100 * u64::from(self.rounds & 1));
        machine.settings.model = (self.rounds & 2 != 0).then(|| self.model.clone());
        machine.isolate("e1000", named(&entries)).unwrap();
        machine.run(&in_background(commands, "commands"));
        std::thread::sleep(Duration::from_millis(random.next() % MAX_WAIT_MS));
        let reports = machine.isolator.reports("e1000").unwrap();
        assert_eq!(reports.len(), 0, "{entries:?}: {}", reports[0]);
        let status = machine.isolator.release("e1000").unwrap();
        assert_eq!(
            (status.violations, &status.broken),
            (0, &None),
            "{entries:?}"
        );
        self.calls += status.entries.iter().map(|entry| entry.calls).sum::<u64>();
        self.rounds += 1;
        machine.run("while ! [ -e /tmp/commands.end ]; do sleep 0.1; done");
    }

    /// Rounds beside a stream that takes `time`. Returns what it says of itself.
    fn stream(&mut self, time: Duration) -> String {
        let seconds = time.as_secs().max(1);
        let stream = format!("/init traffic tcp_echo 10.0.2.2 {seconds}");
        self.machine.run(&in_background(&stream, "stream"));
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.round(USE);
        }
        self.machine
            .run("while ! [ -e /tmp/stream.end ]; do sleep 0.1; done; cat /tmp/stream")
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn entries_are_isolated_and_released_at_random_under_traffic() {
    let number = |name, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let mut machine = with_network();
    let mut soak = Soak {
        model: machine.kernel_model(),
        machine,
        random: Random(number("COFFERDAM_SOAK_SEED", 0x5eed)),
        rounds: 0,
        calls: 0,
    };
    let end = Instant::now() + Duration::from_secs(number("COFFERDAM_SOAK_SECONDS", 5));
    while Instant::now() < end {
        let left = end.saturating_duration_since(Instant::now());
        let stream = soak.stream(STREAM.min(left));
        eprintln!("{} rounds, {} calls: {stream}", soak.rounds, soak.calls);
        assert!(
            stream.contains("\"corrupted\":0") && !stream.contains("\"error\""),
            "{stream}"
        );
        for _ in 0..RESTARTS {
            soak.round(RESTART);
            assert_eq!(soak.machine.run(ANSWERED), "");
        }
    }
    assert!(soak.calls > 0);
    soak.machine.assert_healthy();
}
