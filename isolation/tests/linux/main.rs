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
