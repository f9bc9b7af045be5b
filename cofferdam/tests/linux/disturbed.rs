//! NICs that are disturbed under their stock drivers.

use super::isolation::{ask, ask_json};
use super::{boot, insert_nic, nic_works, options, shell};

/// The guest reads this as the vendor of its NIC.
#[track_caller]
fn assert_vendor(guest: &mut cofferdam::bench::guest::Guest, vendor: &str) {
    let config = "/sys/bus/pci/devices/0000:00:02.0/config";
    let seen = shell(guest, &format!("od -An -tx2 -N2 {config}"));
    assert_eq!(seen.trim(), vendor);
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_nic_is_gone_for_its_guest_and_there_again_and_its_link_flaps_under_its_driver() {
        for (nic, driver, vendor) in [("e1000", "e1000", "8086"), ("virtio", "virtio_net", "1af4")]
        {
            let mut guest = boot(&options().with(&format!("--net user,nic={nic}")));
            assert_vendor(&mut guest, vendor);
            ask(&mut guest, "disturb guest --kind removed");
            assert_vendor(&mut guest, "ffff");
            ask(&mut guest, "disturb guest --undo");
            assert_vendor(&mut guest, vendor);
            insert_nic(&mut guest, driver, 15);
            nic_works(&mut guest);
            let changes = "cat /sys/class/net/eth0/carrier_changes";
            let before: u64 = shell(&mut guest, changes).trim().parse().unwrap();
            // For more accesses than there will be: how many a driver makes until it looks at its
            // link is its own affair.
            ask(
                &mut guest,
                "disturb guest --kind link_flap --when once --span 10000",
            );
            let changed = |times: u64| {
                format!(
                    "for t in $(seq 1 100); do ping -c 1 -W 1 10.0.2.2 > /dev/null; \
                 [ $({changes}) -ge {} ] && exit 0; done; dmesg; exit 1",
                    before + times
                )
            };
            shell(&mut guest, &changed(1));
            let all = ask_json(&mut guest, "disturb guest --list");
            assert_eq!(all[0]["struck"], 1, "{all}");
            ask(&mut guest, "disturb guest --undo");
            shell(&mut guest, &changed(2));
            nic_works(&mut guest);
        }
    }
}
