//! Isolation of stock drivers of a stock Debian guest.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

mod machine;

use isolation::attach::plan::Wanted;
use isolation::domain::violation::ViolationKind;
use machine::Machine;

fn named(names: &[&str]) -> Wanted {
    Wanted::Named(names.iter().map(|name| (*name).to_owned()).collect())
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn dummy_transmits_in_its_domain_and_faults_are_taken_back() {
    let mut machine = Machine::boot(1, "");
    machine.load("dummy", "numdummies=1");
    // IPv6 sends of itself, at any moment.
    machine.run("echo 1 > /proc/sys/net/ipv6/conf/dummy0/disable_ipv6");
    machine.run("ip addr add 10.9.9.1/24 dev dummy0 && ip link set dummy0 up");
    let send = "for i in 1 2 3 4 5 6 7 8; do ping -c 1 -W 1 -I dummy0 10.9.9.2 >/dev/null 2>&1; done; /bin/ip neigh replace 10.9.9.2 lladdr 02:00:00:00:00:02 dev dummy0 2>/dev/null; ping -c 5 -i 0.1 -W 1 10.9.9.2 >/dev/null 2>&1; true";
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

/// Operations that between them call every entry, and make `number` the last byte of the address.
fn operations(number: usize) -> String {
    format!(
        "ethtool -S eth0 | head -3; ethtool -d eth0 | head -3; ip link set eth0 mtu 1400; ip link set eth0 mtu 1500; \
         ethtool -G eth0 rx 128; ethtool -G eth0 rx 256; ethtool -K eth0 rx off; ethtool -K eth0 rx on; \
         ip link set eth0 promisc on; ip link set eth0 promisc off; \
         ip link set eth0 down; ip link set eth0 address 52:54:00:12:34:{number:02x}; ip link set eth0 up; sleep 1; \
         ping -c 2 -W 2 10.0.2.2"
    )
}

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
    for (number, entry) in E1000_ENTRIES.iter().enumerate() {
        let isolated = machine.isolate("e1000", named(&[entry])).unwrap();
        assert_eq!(isolated.entries, [*entry]);
        machine.run("ping -c 5 -i 0.05 -W 2 10.0.2.2");
        machine.run(&operations(number));
        machine.print_status();
        let status = machine.entry("e1000", entry);
        assert!(status.calls > 0, "{entry} was not called");
        assert_eq!(status.aborts, 0, "{entry}");
        assert!(status.commits > 0, "{entry} never ran in the domain");
        machine.isolator.release("e1000").unwrap();
        machine.run("ping -c 1 -W 2 10.0.2.2");
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

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn calls_that_sleep_go_on_in_the_guest_and_come_back() {
    let mut machine = boot_with_network(1, "");
    machine.sleep_limit = std::time::Duration::ZERO;
    machine.isolate("e1000", named(E1000_ENTRIES)).unwrap();
    machine.run(&operations(0));
    // Packets and interrupts go through the domain while a reset of the adapter sleeps in the guest.
    machine.run(
        "(for i in 1 2 3; do ethtool -G eth0 rx 128; ethtool -G eth0 rx 256; ip link set eth0 mtu 1400; ip link set eth0 mtu 1500; done) & \
        ping -c 20 -i 0.05 -W 1 10.0.2.2; wait; ping -c 2 -W 2 10.0.2.2",
    );
    machine.print_status();
    for entry in [
        "e1000_set_ringparam",
        "e1000_change_mtu",
        "e1000_set_features",
        "e1000_close",
    ] {
        let status = machine.entry("e1000", entry);
        assert!(
            status.spills.values().sum::<u64>() > 0,
            "{entry}: {status:?}"
        );
        assert_eq!(status.commits, status.calls, "{entry}: {status:?}");
    }
    let status = machine.status("e1000");
    assert_eq!((status.violations, &status.broken), (0, &None));
    machine.isolator.release("e1000").unwrap();
    machine.run("ping -c 2 -W 2 10.0.2.2");
    machine.assert_healthy();
}

/// `xor eax, eax; mov rax, [rax]`: a NULL dereference.
const NULL_DEREFERENCE: &[u8] = &[0x31, 0xc0, 0x48, 0x8b, 0x00];

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn injected_faults_are_taken_back_and_the_next_calls_work() {
    let mut machine = Machine::boot(1, "");
    machine.load("dummy", "numdummies=1");
    machine.run("ip addr add 10.9.9.1/24 dev dummy0; ip link set dummy0 up; /bin/ip neigh add 10.9.9.2 lladdr 02:00:00:00:00:02 dev dummy0");
    let send = "ping -c 4 -i 0.1 -W 1 10.9.9.2 >/dev/null 2>&1; true";
    let sent = "cat /sys/class/net/dummy0/statistics/tx_packets";
    machine.isolate("dummy", named(&["dummy_xmit"])).unwrap();
    machine.run(send);
    let before: u64 = machine.run(sent).trim().parse().unwrap();
    // Behind the gate, and right after the call that frees the packet.
    let calls = machine.calls_in("dummy", "dummy_xmit", "consume_skb");
    let after_free = calls.first().expect("dummy_xmit frees its packet") + 5;
    let mut aborts = 0;
    for offset in [5, after_free] {
        let original = machine
            .isolator
            .inject("dummy", "dummy_xmit", offset, NULL_DEREFERENCE)
            .unwrap();
        machine.run(send);
        let entry = machine.entry("dummy", "dummy_xmit");
        assert!(
            entry.aborts > aborts,
            "no call ran into the fault at {offset:#x}"
        );
        aborts = entry.aborts;
        let reports = machine.isolator.reports("dummy").unwrap();
        let report = reports.last().unwrap().to_string();
        eprintln!("{report}");
        let place = format!("dummy_xmit+{:#x} [dummy]", offset + 2);
        assert!(
            report.contains("page fault") && report.contains(&place),
            "{report}"
        );
        machine
            .isolator
            .inject("dummy", "dummy_xmit", offset, &original)
            .unwrap();
    }
    let while_faulty: u64 = machine.run(sent).trim().parse().unwrap();
    machine.run(send);
    let after: u64 = machine.run(sent).trim().parse().unwrap();
    assert!(
        while_faulty - before <= 8 && after > while_faulty,
        "{before} {while_faulty} {after}"
    );
    stray_store_to_the_running_thread_is_stopped(&mut machine);
    machine.run(send);
    let at_end: u64 = machine.run(sent).trim().parse().unwrap();
    assert!(at_end > after, "{after} {at_end}");
    machine.print_status();
    machine.assert_healthy();
}

/// A store to an object of the heap that is none of the call's: the thread it runs on.
fn stray_store_to_the_running_thread_is_stopped(machine: &mut Machine) {
    let mut code = vec![0x65, 0x48, 0x8b, 0x04, 0x25]; // mov %gs:current_task, %rax
    code.extend((machine.symbol("current_task") as u32).to_le_bytes());
    code.extend([0xc6, 0x40, 0x08, 0x41]); // movb $0x41, 8(%rax)
    let inject = |machine: &Machine, code: &[u8]| {
        machine
            .isolator
            .inject("dummy", "dummy_xmit", 5, code)
            .unwrap()
    };
    let original = inject(machine, &code);
    machine.run("ping -c 1 -W 1 10.9.9.2 >/dev/null 2>&1; true");
    inject(machine, &original);
    let reports = machine.isolator.reports("dummy").unwrap();
    let report = reports.last().expect("the store is reported");
    eprintln!("{report}");
    assert!(
        matches!(report.violation.kind, ViolationKind::StrayWrite { .. }),
        "{report}"
    );
    assert_eq!(report.at, "dummy_xmit+0xe [dummy]");
    assert_eq!(report.touched.as_deref(), Some("task_struct object + 0x8"));
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_released_module_has_every_byte_of_its_text_back() {
    let mut machine = boot_with_network(1, "");
    let before = machine.module_text("e1000");
    let ping = "ping -c 3 -i 0.1 -W 2 10.0.2.2 >/dev/null";
    machine.isolate("e1000", Wanted::All).unwrap();
    assert_ne!(machine.module_text("e1000"), before, "gates are in place");
    machine.run(ping);
    let final_status = machine.isolator.release("e1000").unwrap();
    assert!(final_status.entries.iter().any(|entry| entry.calls > 0));
    assert!(
        machine.module_text("e1000") == before,
        "text differs after release"
    );
    let traps = |machine: &Machine| -> u64 {
        machine
            .handle
            .status()
            .exits
            .iter()
            .map(|exits| exits.trap)
            .sum()
    };
    let traps_before = traps(&machine);
    machine.run(ping);
    assert_eq!(
        traps(&machine),
        traps_before,
        "a released module still exits at gates"
    );
    machine.assert_healthy();
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn what_cannot_be_isolated_is_refused_with_the_reason() {
    let mut machine = Machine::boot(1, "");
    machine.load("dummy", "numdummies=1");
    let refusal = |machine: &mut Machine, wanted| {
        machine
            .isolate("dummy", wanted)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    let misspelt = refusal(&mut machine, named(&["dummy_xmitt"]));
    assert!(misspelt.contains("no such function"), "{misspelt}");
    let nothing = refusal(&mut machine, Wanted::Matching("e1000_*".into()));
    assert!(nothing.contains("matches e1000_*"), "{nothing}");
    machine.isolate("dummy", named(&["dummy_xmit"])).unwrap();
    let twice = refusal(&mut machine, named(&["dummy_xmit"]));
    assert!(twice.contains("isolated already"), "{twice}");
    machine.isolator.release("dummy").unwrap();
    let gone = machine.isolator.release("dummy").unwrap_err().to_string();
    assert!(gone.contains("is not isolated"), "{gone}");
    machine.assert_healthy();
}
