//! Isolation of stock drivers of a stock Debian guest.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

mod machine;

use isolation::attach::plan::Wanted;
use machine::Machine;

fn named(names: &[&str]) -> Wanted {
    Wanted::Named(names.iter().map(|name| (*name).to_owned()).collect())
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn dummy_transmits_in_its_domain_and_faults_are_taken_back() {
    let mut machine = Machine::boot(1, "");
    machine.load("dummy", "numdummies=1");
    machine.run("ip addr add 10.9.9.1/24 dev dummy0 && ip link set dummy0 up");
    let send = "for i in 1 2 3 4 5 6 7 8; do ping -c 1 -W 1 -I dummy0 10.9.9.2 >/dev/null 2>&1; done; ip neigh replace 10.9.9.2 lladdr 02:00:00:00:00:02 dev dummy0 2>/dev/null; ping -c 5 -i 0.1 -W 1 10.9.9.2 >/dev/null 2>&1; true";
    machine.run(send);
    let isolated = machine.isolate("dummy", named(&["dummy_xmit"])).unwrap();
    eprintln!("isolated: {isolated:?}");
    let packets = |machine: &mut Machine| -> u64 {
        machine
            .run("cat /sys/class/net/dummy0/statistics/tx_packets")
            .trim()
            .parse()
            .unwrap()
    };
    let before = packets(&mut machine);
    machine.run("ping -c 10 -i 0.05 -W 1 10.9.9.2 >/dev/null 2>&1; true");
    let entry = machine.entry("dummy", "dummy_xmit");
    eprintln!("{entry:#?}");
    for report in machine.isolator.reports("dummy").unwrap() {
        eprintln!("{report}");
    }
    assert_eq!(packets(&mut machine) - before, entry.calls);
    assert!(
        entry.calls >= 10 && entry.commits == entry.calls,
        "{entry:?}"
    );
    machine.assert_healthy();
}

const E1000_ENTRIES: &[&str] = &[
    "e1000_xmit_frame",
    "e1000_clean",
    "e1000_intr",
    "e1000_get_ethtool_stats",
    "e1000_get_regs",
    "e1000_set_ringparam",
    "e1000_change_mtu",
    "e1000_set_rx_mode",
    "e1000_set_features",
    "e1000_set_mac",
    "e1000_watchdog",
    "e1000_open",
    "e1000_close",
];

/// Operations that between them call every entry.
const OPERATIONS: &str = "ethtool -S eth0 | head -3; ethtool -d eth0 | head -3; ip link set eth0 mtu 1400; ip link set eth0 mtu 1500; \
    ethtool -G eth0 rx 128; ethtool -G eth0 rx 256; ethtool -K eth0 rx off; ethtool -K eth0 rx on; \
    ip link set eth0 promisc on; ip link set eth0 promisc off; \
    ip link set eth0 down; ip link set eth0 address 52:54:00:12:34:57; ip link set eth0 up; sleep 1; ping -c 2 -W 2 10.0.2.2";

fn boot_with_network(vcpus: u8, append: &str) -> Machine {
    let mut machine = Machine::boot(vcpus, append);
    machine.load("e1000", "");
    machine.run("ip link set lo up; ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up");
    machine
        .run("for i in 1 2 3 4 5 6 7 8 9 10; do ping -c 1 -W 1 10.0.2.2 && exit 0; done; exit 1");
    machine
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn e1000_works_with_each_of_its_entries_in_the_domain() {
    let mut machine = boot_with_network(1, "");
    for entry in E1000_ENTRIES {
        let isolated = machine.isolate("e1000", named(&[entry])).unwrap();
        assert_eq!(isolated.entries, [*entry]);
        machine.run("ping -c 5 -i 0.05 -W 2 10.0.2.2");
        machine.run(OPERATIONS);
        machine.print_status();
        let status = machine.entry("e1000", entry);
        assert!(status.calls > 0, "{entry} was not called");
        assert_eq!(status.aborts, 0, "{entry}");
        machine.isolator.release("e1000").unwrap();
        machine.run("ip link set eth0 down; ip link set eth0 address 52:54:00:12:34:56; ip link set eth0 up; sleep 1; ping -c 1 -W 2 10.0.2.2");
        machine.assert_healthy();
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_checked_tcp_stream_passes_through_the_isolated_e1000() {
    let mut machine = boot_with_network(1, "");
    machine.isolate("e1000", named(E1000_ENTRIES)).unwrap();
    let seconds = std::env::var("COFFERDAM_TRAFFIC_SECONDS").unwrap_or("5".into());
    for kind in ["tcp_echo", "ping_flood"] {
        let line = machine.run(&format!("/init traffic {kind} 10.0.2.2 {seconds}"));
        eprintln!("{kind}: {line}");
        assert!(
            line.contains("\"corrupted\":0") && !line.contains("\"error\""),
            "{line}"
        );
    }
    machine.print_status();
    let status = machine.status("e1000");
    assert_eq!((status.violations, &status.broken), (0, &None));
    machine.assert_healthy();
}
