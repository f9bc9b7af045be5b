//! The driver `dummy`, which has no device.

use isolation::attach::plan::Wanted;
use isolation::domain::violation::ViolationKind;

use super::booted;
use crate::machine::Machine;
use crate::named;

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn dummy_transmits_in_its_domain_and_faults_are_taken_back() {
    let mut machine = booted();
    machine.load("dummy", "numdummies=1");
    // IPv6 sends of itself, at any moment.
    machine.run("echo 1 > /proc/sys/net/ipv6/conf/dummy0/disable_ipv6");
    machine.run("ip addr add 10.9.9.1/24 dev dummy0 && ip link set dummy0 up");
    let send = "for i in 1 2; do ping -c 1 -W 1 -I dummy0 10.9.9.2 >/dev/null 2>&1; done; /bin/ip neigh replace 10.9.9.2 lladdr 02:00:00:00:00:02 dev dummy0 2>/dev/null; ping -c 5 -i 0.1 -W 1 10.9.9.2 >/dev/null 2>&1; true";
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

/// `xor eax, eax; mov rax, [rax]`: a NULL dereference.
const NULL_DEREFERENCE: &[u8] = &[0x31, 0xc0, 0x48, 0x8b, 0x00];

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn injected_faults_are_taken_back_and_the_next_calls_work() {
    let mut machine = booted();
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
fn everything_that_dummy_does_can_be_done_in_the_domain() {
    let mut machine = booted();
    machine.load("dummy", "numdummies=1");
    machine.isolate("dummy", Wanted::All).unwrap();
    let statistics = machine.run(
        "ip link set dummy0 up; ip link set dummy0 address 02:11:22:33:44:55; ip addr add 10.9.9.1/24 dev dummy0; \
        /bin/ip neigh add 10.9.9.2 lladdr 02:00:00:00:00:02 dev dummy0; ping -c 3 -i 0.1 -W 1 10.9.9.2 >/dev/null; \
        ip link set dummy0 multicast off; ip link set dummy0 multicast on; ethtool -i dummy0 | grep driver; \
        /bin/ip link set dummy0 carrier off; /bin/ip link set dummy0 carrier on; \
        /bin/ip link add dummy7 type dummy; ip link set dummy7 up; ip link set dummy7 down; /bin/ip link del dummy7; \
        /bin/ip -s link show dummy0",
    );
    machine.print_status();
    assert!(statistics.contains("driver: dummy"), "{statistics}");
    assert!(statistics.contains("02:11:22:33:44:55"), "{statistics}");
    let status = machine.status("dummy");
    assert_eq!((status.violations, &status.broken), (0, &None));
    for entry in [
        "dummy_xmit",
        "dummy_get_stats64",
        "dummy_get_drvinfo",
        "dummy_change_carrier",
        "dummy_dev_init",
        "dummy_dev_uninit",
        "dummy_setup",
    ] {
        let status = machine.entry("dummy", entry);
        assert!(
            status.calls > 0 && status.commits == status.calls,
            "{entry}: {status:?}"
        );
    }
    machine.isolator.release("dummy").unwrap();
    machine.assert_healthy();
}

/// `dummy_setup` returns nothing, and `alloc_netdev_mqs` goes on with what it has made: an interface
/// without operations, which are followed when it is registered.
#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn an_interface_whose_setup_always_fails_drops_its_packets() {
    let mut machine = booted();
    machine.load("dummy", "numdummies=0");
    machine.isolate("dummy", Wanted::All).unwrap();
    let inject = |machine: &Machine, code: &[u8]| {
        let isolator = &machine.isolator;
        isolator.inject("dummy", "dummy_setup", 5, code).unwrap()
    };
    let original = inject(&machine, NULL_DEREFERENCE);
    let used = |machine: &mut Machine, name: &str| {
        machine.run(&format!(
            "/bin/ip link add {name} type dummy && ip link set {name} up && ip addr add 10.9.8.1/24 dev {name} && \
            (ping -c 2 -i 0.1 -W 1 -I {name} 10.9.8.2 >/dev/null 2>&1; ip link set {name} down; \
            cat /sys/class/net/{name}/flags; /bin/ip link del {name})"
        ))
    };
    let flags = used(&mut machine, "dummy5");
    assert!(flags.contains("0x"), "{flags}");
    let entry = machine.entry("dummy", "dummy_setup");
    assert!(entry.aborts >= 1 && entry.commits == 0, "{entry:?}");
    inject(&machine, &original);
    used(&mut machine, "dummy6");
    let entry = machine.entry("dummy", "dummy_setup");
    assert_eq!(entry.commits, 1, "{entry:?}");
    machine.print_status();
    machine.assert_healthy();
}
