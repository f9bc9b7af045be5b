//! NICs that come and go.

use super::super::isolation::{ask, ask_json};
use super::super::{ping, shell};
use super::shared;

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn cards_come_and_go_while_the_guest_runs() {
    let mut guest = shared();
    let mac = "02:cf:00:00:07:07";
    let interface = format!(
        "n=$(basename $(dirname $(grep -l {mac} /sys/class/net/*/address 2> /dev/null)) 2> /dev/null)"
    );
    for (round, model) in ["e1000", "virtio", "e1000"].into_iter().enumerate() {
        shell(&mut guest, "modprobe virtio_net");
        let plugged = ask_json(
            &mut guest,
            &format!("plug guest --net user,nic={model},mac={mac}"),
        );
        assert_eq!(plugged["nic"], model);
        shell(
            &mut guest,
            &format!(
                "for t in $(seq 1 200); do {interface}; [ -n \"$n\" ] && break; sleep 0.1; done; \
                 ip link set $n up && ip addr add 10.0.3.15/24 dev $n; \
                 for t in $(seq 1 200); do [ \"$(cat /sys/class/net/$n/carrier)\" = 1 ] && exit 0; \
                 sleep 0.1; done; exit 1"
            ),
        );
        ping(&mut guest, "10.0.3.2", 1400);
        let status = ask_json(&mut guest, "status guest");
        assert_eq!(status["nics"].as_array().unwrap().len(), 2, "round {round}");
        let address = plugged["address"].as_str().unwrap();
        ask(&mut guest, &format!("unplug guest {address}"));
        shell(&mut guest, &format!("{interface}; [ -z \"$n\" ]"));
        let status = ask_json(&mut guest, "status guest");
        assert_eq!(status["nics"].as_array().unwrap().len(), 1, "round {round}");
    }
    ping(&mut guest, "10.0.2.2", 1400);
}
