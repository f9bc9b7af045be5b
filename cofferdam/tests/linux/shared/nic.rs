//! The stock `e1000` driver on our 82540EM: all that it uses of the card, and the gateway at the
//! other end of the wire.

use std::time::Duration;

use agent_protocol::traffic::{TrafficKind, TrafficResult};
use cofferdam::bench::guest::Guest;
use cofferdam::bench::network::{self, ADDRESS, GATEWAY, INTERFACE, LINK_TIME, Probe};
use cofferdam::bench::traffic;

use super::shared;
use crate::full;
use crate::{ping, shell};

/// How long traffic is sent.
const TRAFFIC_TIME: Duration = Duration::from_secs(3);

/// Sends traffic; all of it must arrive once, in order and unchanged.
#[track_caller]
pub fn traffic(guest: &mut Guest, kind: TrafficKind) -> TrafficResult {
    let result = traffic::send(guest, kind, TRAFFIC_TIME).unwrap();
    assert_eq!(result.error, None, "{result:?}");
    assert_eq!(result.answered, result.sent, "lost: {result:?}");
    let TrafficResult {
        reordered,
        duplicated,
        corrupted,
        ..
    } = result;
    assert_eq!((reordered, duplicated, corrupted), (0, 0, 0), "{result:?}");
    result
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn the_stock_driver_finds_the_nic_and_its_link_comes_up() {
    let mut guest = shared();
    let mac = guest.control().unwrap().status().unwrap().config.net;
    let mac = mac.unwrap().mac;
    let address = shell(&mut guest, "cat /sys/class/net/eth0/address");
    assert_eq!(Some(address.trim()), mac.as_deref());
    let driver = shell(&mut guest, "ethtool -i eth0");
    assert!(driver.contains("driver: e1000"), "{driver}");
    let link = shell(&mut guest, "ethtool eth0");
    for fact in ["Speed: 1000Mb/s", "Duplex: Full", "Link detected: yes"] {
        assert!(link.contains(fact), "{link}");
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn pings_are_answered_in_both_directions() {
    let mut guest = shared();
    let pings = traffic(&mut guest, TrafficKind::PingFlood);
    assert!(pings.sent >= 100, "{pings:?}");
    let mut probe = Probe::start(&guest, Duration::from_millis(20)).unwrap();
    let now = devices::clock::monotonic_ns();
    probe.wait_for_reply(now, LINK_TIME).unwrap();
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn datagrams_of_all_sizes_come_back_unchanged() {
    let result = traffic(&mut shared(), TrafficKind::UdpEcho);
    assert!(result.sent >= 100, "{result:?}");
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn tcp_streams_arrive_unchanged_with_checksum_and_segmentation_offload() {
    let mut guest = shared();
    let features = shell(&mut guest, "ethtool -k eth0");
    for feature in ["tx-checksumming: on", "tcp-segmentation-offload: on"] {
        assert!(features.contains(feature), "{features}");
    }
    for kind in [
        TrafficKind::TcpEcho,
        TrafficKind::TcpSink,
        TrafficKind::TcpSource,
    ] {
        let result = traffic(&mut guest, kind);
        let bytes = result.bytes_to_peer + result.bytes_from_peer;
        assert!(bytes > 100_000, "{kind:?}: {result:?}");
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn tagged_frames_reach_their_vlan() {
    let mut guest = shared();
    guest.agent().load_module("8021q", "").unwrap();
    let script = "ip link add link eth0 name eth0.5 type vlan id 5 &&
        ip addr add 10.64.5.15/24 dev eth0.5 && ip link set eth0.5 up";
    shell(&mut guest, script);
    let tagged = guest.shell("ping -c 3 -i 0.1 -W 5 10.64.5.2");
    let untagged = guest.shell("ping -c 3 -i 0.1 -W 5 10.0.2.2");
    shell(&mut guest, "ip link del eth0.5");
    for answer in [tagged, untagged] {
        let answer = answer.unwrap();
        assert!(answer.contains(" 0% packet loss"), "{answer}");
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn multicast_is_received_once_joined() {
    let mut guest = shared();
    let result = traffic(&mut guest, TrafficKind::Multicast);
    assert!(result.sent >= 20, "{result:?}");
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn the_drivers_self_test_passes() {
    let mut guest = shared();
    let result = guest.shell("ethtool -t eth0 offline; echo status $?");
    // It resets the controller, which takes the address's route along.
    network::configure(&mut guest).unwrap();
    network::wait_for_link(&mut guest, LINK_TIME).unwrap();
    let result = result.unwrap();
    assert!(result.contains("The test result is PASS"), "{result}");
    for test in ["Register", "Eeprom", "Interrupt", "Loopback", "Link"] {
        let line = result.lines().find(|line| line.starts_with(test));
        let line = line.unwrap_or_else(|| panic!("no {test} in {result}"));
        assert!(line.trim_end().ends_with('0'), "{line}");
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn registers_and_eeprom_can_be_dumped() {
    let mut guest = shared();
    let registers = shell(&mut guest, "ethtool -d eth0");
    for name in [
        "CTRL (Device control register)",
        "STATUS (Device status register)",
        "RCTL (Receive control register)",
        "TCTL (Transmit ctrl register)",
    ] {
        assert!(registers.contains(name), "no {name}: {registers}");
    }
    let dump = shell(&mut guest, "ethtool -e eth0 offset 0 length 6");
    let mac = shell(&mut guest, "cat /sys/class/net/eth0/address");
    let bytes = mac.trim().replace(':', " ");
    assert!(dump.contains(&bytes), "{dump} has no {bytes}");
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn the_driver_is_removed_and_inserted_again_and_again() {
    let mut guest = shared();
    // The emulated processor's quirks make the kernel warn while it boots.
    let (_, boot_end) = guest.agent().kmsg(0).unwrap();
    let rounds = if full() { 20 } else { 4 };
    for round in 1..=rounds {
        guest.agent().remove_module("e1000").unwrap();
        let interfaces = guest.agent().interfaces().unwrap();
        assert!(
            interfaces.iter().all(|i| i.name != INTERFACE),
            "round {round}"
        );
        network::bring_up(&mut guest, "e1000").unwrap();
    }
    network::wait_for_link(&mut guest, LINK_TIME).unwrap();
    ping(&mut guest, "10.0.2.2", 56);
    let log = guest.agent().kmsg(boot_end).unwrap().0;
    let bad: Vec<_> = log
        .iter()
        .filter(|record| {
            ["BUG", "WARNING", "Oops"]
                .iter()
                .any(|w| record.text.contains(w))
        })
        .collect();
    assert!(bad.is_empty(), "{bad:?}");
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn the_gateway_gives_an_address_by_dhcp() {
    let mut guest = shared();
    shell(&mut guest, "ip addr flush dev eth0");
    let lease = guest.shell("udhcpc -i eth0 -n -q -s /etc/udhcpc.script");
    let address = guest.shell("ip -4 addr show dev eth0");
    network::configure(&mut guest).unwrap();
    lease.unwrap();
    let address = address.unwrap();
    assert!(address.contains(&ADDRESS.to_string()), "{address}");
    ping(&mut guest, &GATEWAY.to_string(), 56);
}
