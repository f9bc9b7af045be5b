//! Guests with several processors, and with other mitigations.

use isolation::attach::plan::Wanted;

use crate::shared::e1000::{E1000_ENTRIES, stream_and_flood};
use crate::{boot_with_network, named};

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn four_processors_share_an_isolated_nic() {
    let mut machine = boot_with_network(4, "");
    machine.isolate("e1000", named(E1000_ENTRIES)).unwrap();
    // Other processors have work of their own, and move the threads that use the NIC about.
    machine
        .run("for i in 1 2 3; do (timeout 20 sh -c 'while :; do :; done') >/dev/null 2>&1 & done");
    stream_and_flood(&mut machine);
    machine.run("ethtool -G eth0 rx 128; ip link set eth0 mtu 1400; ip link set eth0 mtu 1500; linked; ping -c 3 -i 0.1 -W 2 10.0.2.2");
    machine.print_status();
    let status = machine.status("e1000");
    assert_eq!((status.violations, &status.broken), (0, &None));
    machine.isolator.release("e1000").unwrap();
    machine.run("ping -c 2 -i 0.1 -W 2 10.0.2.2");
    machine.assert_healthy();
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn page_table_isolation_makes_no_difference() {
        let mut machine = boot_with_network(1, "pti=on");
        let flags = machine.run("grep -m1 ^flags /proc/cpuinfo");
        assert!(flags.split(' ').any(|flag| flag.trim() == "pti"), "{flags}");
        let before = machine.module_text("e1000");
        machine.isolate("e1000", named(E1000_ENTRIES)).unwrap();
        stream_and_flood(&mut machine);
        machine.run("ethtool -G eth0 rx 128; linked; ping -c 2 -i 0.1 -W 2 10.0.2.2");
        machine.print_status();
        let status = machine.status("e1000");
        assert_eq!((status.violations, &status.broken), (0, &None));
        machine.isolator.release("e1000").unwrap();
        assert!(machine.module_text("e1000") == before);
        machine.isolate("e1000", Wanted::All).unwrap();
        machine.run("ping -c 2 -i 0.1 -W 2 10.0.2.2");
        machine.isolator.release("e1000").unwrap();
        machine.assert_healthy();
    }
}
