//! Stock Linux guests and their own drivers on our machine and devices.
//!
//! Each test needs a KVM that boots Linux in seconds and the guest images, so all are ignored
//! unless asked for. Those that leave the guest as they found it share one, in [`shared`], those
//! that make its driver fail another, in [`shared_victim`]; the others boot their own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where something unexpected happens"
)]

mod as_written;
mod builds;
mod campaign;
mod disturbed;
mod driven;
mod group;
mod isolation;
mod kernels;
mod last_resort;
mod machine;
mod mouse;
mod nics;
mod own_suspend;
mod parked;
mod passed;
mod passed_kills;
mod passthrough;
mod passthrough_isolated;
mod saved_elsewhere;
mod served;
mod shared;
mod shared_victim;
mod snapshot_isolated;
mod streaming;
mod suspend;
mod sweep;
mod switch;
mod taken_back;
mod trying;
mod victim;
mod virtio;
mod wires;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent_protocol::message::Ipv4;
use cofferdam::bench::guest::{Guest, GuestOptions};
use cofferdam::bench::network;

/// What answers pings on the networks of the tests.
const GATEWAY: &str = "10.0.2.2";
/// How long a guest may take to boot or to end.
const BOOT_TIME: Duration = Duration::from_secs(120);

/// Whether tests that have a full form run in it.
fn full() -> bool {
    std::env::var_os("COFFERDAM_FULL").is_some()
}

/// A guest without a network; each test adds what it needs.
fn options() -> GuestOptions {
    let images = std::env::var_os("COFFERDAM_IMAGES").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/images"),
        PathBuf::from,
    );
    GuestOptions {
        program: env!("CARGO_BIN_EXE_cofferdam").into(),
        images,
        initrd: "initrd.cpio",
        snapshot: None,
        arguments: Vec::new(),
        name: cofferdam::bench::guest::NAME,
        root: None,
    }
}

#[track_caller]
fn boot(options: &GuestOptions) -> Guest {
    Guest::boot(options, BOOT_TIME).unwrap_or_else(|error| panic!("{error:#}"))
}

/// Runs a shell command in the guest; it must succeed.
#[track_caller]
fn shell(guest: &mut Guest, script: &str) -> String {
    guest
        .shell(script)
        .unwrap_or_else(|error| panic!("{error:#}"))
}

/// Inserts the driver of a NIC that lives elsewhere, and gives its interface the address
/// 10.0.2.`last`.
#[track_caller]
fn insert_nic(guest: &mut Guest, driver: &str, last: u8) {
    network::insert_slowly(guest, driver).unwrap();
    let agent = guest.agent();
    agent.set_link("eth0", true).unwrap();
    let address = Ipv4 {
        address: [10, 0, 2, last].into(),
        prefix: 24,
    };
    agent.set_address("eth0", address, None).unwrap();
}

/// How long something that happens by itself may be in coming.
const SOON: Duration = Duration::from_secs(300);

/// Waits for something that happens by itself. The longer it takes the less often it is looked for,
/// since a lab has one processor, and what is waited for needs it.
#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        let waited = begun.elapsed();
        assert!(waited < SOON, "waited too long for {what}");
        std::thread::sleep((waited / 10).clamp(Duration::from_millis(20), Duration::from_secs(1)));
    }
}

/// The guest's NIC works, when its driver has seen its link.
#[track_caller]
fn nic_works(guest: &mut Guest) {
    let script = format!(
        "for t in $(seq 1 100); do ping -c 1 -W 1 {GATEWAY} && exit 0; done; dmesg; exit 1"
    );
    shell(guest, &script);
    ping(guest, GATEWAY, 1400);
}

/// Waits until the guest has so many TCP connections to the echo service of its gateway. A stream
/// that is about to begin has none yet, and fails at once where the link goes just then.
#[track_caller]
fn wait_until_connected(guest: &mut Guest, connections: usize) {
    // 10.0.2.2:7 in any state but SYN_SENT.
    let script = format!(
        "for t in $(seq 1 1000); do \
         [ $(grep -c ' 0202000A:0007 0[^2] ' /proc/net/tcp) -ge {connections} ] && exit 0; sleep 0.05; done; \
         cat /proc/net/tcp; exit 1"
    );
    shell(guest, &script);
}

/// Nothing in the kernel's log says that processors were kept from their work, or worse, nor any of
/// `others`.
#[track_caller]
fn assert_log_is_healthy(guest: &mut Guest, others: &[&str]) {
    let log = shell(guest, "dmesg");
    let always = [
        "lockup",
        "rcu: INFO",
        "BUG:",
        "Oops",
        "WARNING: CPU",
        "timed out",
    ];
    for word in always.iter().chain(others) {
        assert!(!log.contains(word), "{word}:\n{log}");
    }
}

/// Pings from the guest to the gateway that go on by themselves, five a second.
struct Pings;

impl Pings {
    fn start(guest: &mut Guest) -> Self {
        let script = format!(
            "ping -i 0.2 {GATEWAY} > /tmp/pings 2>&1 < /dev/null & echo $! > /tmp/pings.pid"
        );
        shell(guest, &script);
        Self
    }

    /// How many were answered so far.
    fn answered(&self, guest: &mut Guest) -> u64 {
        let count = shell(guest, "grep -c 'bytes from' /tmp/pings || true");
        count.trim().parse().unwrap()
    }

    /// Waits for one more answer than so many.
    #[track_caller]
    fn go_on(&self, guest: &mut Guest, before: u64) {
        let deadline = std::time::Instant::now() + BOOT_TIME;
        while self.answered(guest) <= before {
            assert!(
                std::time::Instant::now() < deadline,
                "no ping is answered: {}",
                shell(guest, "tail -n 5 /tmp/pings; dmesg | tail -n 20")
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends them; none was answered twice. Lost ones are said.
    #[track_caller]
    fn end(self, guest: &mut Guest, of: &str) {
        let end = "kill -INT $(cat /tmp/pings.pid); sleep 0.5; cat /tmp/pings";
        let said = shell(guest, end);
        let total = said.lines().find(|line| line.contains("transmitted"));
        let total = total.unwrap_or_else(|| panic!("they have ended before: {said}"));
        println!("pings of {of}: {total}");
        assert!(!said.to_lowercase().contains("dup"), "{said}");
    }
}

/// The guest's kernel has probed its one NIC once; a driver that loses its link with a frame still
/// to be reaped resets its card, as when a cable is pulled, and that is all that it is reset for.
#[track_caller]
fn assert_probed_once_and_reset_for_lost_links(guest: &mut Guest) {
    let log = shell(guest, "dmesg");
    assert_eq!(log.matches("Network Connection").count(), 1, "{log}");
    let mut last = "";
    for line in log.lines().filter(|line| line.contains("e1000")) {
        assert!(
            !line.contains("Reset adapter") || last.contains("Link is Down"),
            "{log}"
        );
        last = line;
    }
}

/// Pings from the guest with payloads of `bytes`; every one must be answered.
#[track_caller]
fn ping(guest: &mut Guest, to: &str, bytes: u32) {
    let output = shell(guest, &format!("ping -c 3 -i 0.1 -W 5 -s {bytes} {to}"));
    assert!(output.contains(" 0% packet loss"), "{output}");
}
