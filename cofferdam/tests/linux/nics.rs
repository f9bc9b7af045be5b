//! Guests with several NICs.

use cofferdam::bench::network::LINK_TIME;
use serde_json::Value;

use super::isolation::{ask, ask_json};
use super::{boot, options, ping, shell};

/// Brings up the interface with this address, on gateway number `number`.
fn bring_up(guest: &mut cofferdam::bench::guest::Guest, mac: &str, number: u32) {
    let seconds = LINK_TIME.as_secs();
    let script = format!(
        "for i in /sys/class/net/*; do \
           if [ \"$(cat $i/address)\" = {mac} ]; then \
             n=${{i##*/}}; ip link set $n up && ip addr add 10.0.{}.15/24 dev $n; \
             for t in $(seq 1 {seconds}); do \
               [ \"$(cat $i/carrier)\" = 1 ] && exit 0; sleep 1; \
             done; exit 1; \
           fi; \
         done; exit 1",
        2 + number
    );
    shell(guest, &script);
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn three_cards_of_two_models_work_and_both_of_one_module_are_isolated_and_rolled_back() {
    const MACS: [&str; 3] = [
        "02:cf:00:00:00:01",
        "02:cf:00:00:00:02",
        "02:cf:00:00:00:03",
    ];
    let nets = format!(
        "--net user,mac={} --net user,nic=virtio,mac={} --net user,nic=e1000,mac={}",
        MACS[0], MACS[1], MACS[2]
    );
    let mut guest = boot(&options().with(&nets));
    shell(&mut guest, "modprobe e1000 && modprobe virtio_net");
    for (number, mac) in (0u32..).zip(MACS) {
        bring_up(&mut guest, mac, number);
    }
    let ping_all = |guest: &mut cofferdam::bench::guest::Guest| {
        for number in 0..3 {
            ping(guest, &format!("10.0.{}.2", 2 + number), 1400);
        }
    };
    ping_all(&mut guest);
    let status = ask_json(&mut guest, "status guest");
    let nics = status["nics"].as_array().unwrap();
    let told: Vec<_> = nics
        .iter()
        .map(|nic| [&nic["nic"], &nic["mac"]].map(|value| value.as_str().unwrap()))
        .collect();
    assert_eq!(
        told,
        [["e1000", MACS[0]], ["virtio", MACS[1]], ["e1000", MACS[2]]]
    );
    for nic in nics {
        assert!(nic["counters"]["tx_frames"].as_u64() > Some(2), "{nic}");
    }
    assert_eq!(status["nic"], nics[0]["counters"], "the first one's");
    ask(
        &mut guest,
        "isolate guest e1000 --entry e1000_xmit_frame --entry e1000_clean --entry e1000_intr --entry e1000_get_regs --budget-us 10000000",
    );
    ping_all(&mut guest);
    // Each card's registers are read by its own driver's function, and put back when that fails in
    // its middle.
    for fault in [false, true] {
        if fault {
            ask(
                &mut guest,
                "inject guest e1000 e1000_get_regs --at last --times 2",
            );
        }
        for mac in [MACS[0], MACS[2]] {
            let name = format!("$(basename $(dirname $(grep -l {mac} /sys/class/net/*/address)))");
            // What it says of a call that failed is the driver's affair.
            shell(&mut guest, &format!("ethtool -d {name} > /dev/null; true"));
        }
        ping_all(&mut guest);
    }
    ask(
        &mut guest,
        "inject guest e1000 e1000_xmit_frame --every 2 --times 4",
    );
    ping_all(&mut guest);
    let status = ask_json(&mut guest, "status guest");
    let entries = status["isolation"][0]["entries"].as_array().unwrap();
    let of = |name: &str, field: &str| {
        let entry = entries.iter().find(|entry| entry["name"] == name).unwrap();
        entry[field].as_u64()
    };
    assert!(of("e1000_xmit_frame", "commits") > Some(6), "{entries:?}");
    assert_eq!(
        of("e1000_get_regs", "aborts"),
        Some(2),
        "both cards' functions failed once: {entries:?}"
    );
    let recovery: &Value = &status["recovery"]["e1000"];
    assert!(recovery.is_object(), "{status}");
    ask(&mut guest, "release guest e1000");
    ping_all(&mut guest);
}
