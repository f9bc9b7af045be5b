//! The stock driver of the 82540EM, under traffic.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use isolation::status::EntryStatus;
use vmm::QuiesceError;

use super::{with_network, with_silent_network};
use crate::machine::Machine;
use crate::named;

/// The functions that are isolated, alone and together.
pub const E1000_ENTRIES: &[&str] = &[
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
pub fn operations(number: usize) -> String {
    format!(
        "ethtool -S eth0 | head -3; ethtool -d eth0 | head -3; ip link set eth0 mtu 1400; ip link set eth0 mtu 1500; \
         ethtool -G eth0 rx 128; ethtool -G eth0 rx 256; ethtool -K eth0 rx off; ethtool -K eth0 rx on; \
         ip link set eth0 promisc on; ip link set eth0 promisc off; \
         ip link set eth0 down; ip link set eth0 address 52:54:00:12:34:{number:02x}; ip link set eth0 up; linked; \
         ping -c 2 -i 0.1 -W 2 10.0.2.2"
    )
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_checked_tcp_stream_passes_through_the_isolated_e1000() {
    let mut machine = with_network();
    // With the kernel's functions known, what polls hand over waits for their end, too.
    for model in [None, Some(machine.kernel_model())] {
        let waits = model.is_some();
        machine.settings.model = model;
        machine.isolate("e1000", named(E1000_ENTRIES)).unwrap();
        stream_and_flood(&mut machine);
        machine.print_status();
        let status = machine.status("e1000");
        assert_eq!((status.violations, &status.broken), (0, &None));
        assert_eq!(machine.entry("e1000", "e1000_clean").handed_over > 0, waits);
        machine.isolator.release("e1000").unwrap();
    }
    machine.assert_healthy();
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn calls_that_sleep_go_on_in_the_guest_and_come_back() {
    let mut machine = with_network();
    machine.settings.sleep_limit = Duration::ZERO;
    machine.settings.model = Some(machine.kernel_model());
    machine.isolate("e1000", named(E1000_ENTRIES)).unwrap();
    machine.run(&operations(0));
    // Packets and interrupts go through the domain while a reset of the adapter sleeps in the
    // guest, and the machine comes to rest only between such calls.
    let looking = Arc::new(AtomicBool::new(true));
    let looks = {
        let (handle, looking) = (machine.handle.clone(), looking.clone());
        std::thread::spawn(move || {
            let (mut refused, mut rested) = (0, 0);
            while looking.load(Ordering::Relaxed) {
                match handle.quiesce(Duration::ZERO, |quiesced| quiesced.save().map(drop)) {
                    Ok(saved) => {
                        saved.unwrap();
                        rested += 1;
                    }
                    Err(QuiesceError::Unsettled { who, reason }) => {
                        assert_eq!(who, "isolation", "{reason}");
                        refused += u32::from(reason.contains("`e1000` are open in the guest"));
                    }
                    Err(error) => panic!("{error}"),
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            (refused, rested)
        })
    };
    machine.run(
        "(for i in 1 2; do ethtool -G eth0 rx 128; ethtool -G eth0 rx 256; ip link set eth0 mtu 1400; ip link set eth0 mtu 1500; done) & \
        ping -c 20 -i 0.05 -W 1 10.0.2.2; wait; linked; ping -c 2 -i 0.1 -W 2 10.0.2.2",
    );
    looking.store(false, Ordering::Relaxed);
    let (refused, rested) = looks.join().unwrap();
    eprintln!("at rest {rested} times, {refused} times a call was open");
    assert!(refused > 0 && rested > 0);
    machine
        .handle
        .quiesce(Duration::from_secs(30), |_| ())
        .unwrap();
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
    machine.run("ping -c 2 -i 0.1 -W 2 10.0.2.2");
    machine.assert_healthy();
}

/// A TCP stream with checked contents and a flood of pings, each for `COFFERDAM_TRAFFIC_SECONDS`.
pub fn stream_and_flood(machine: &mut Machine) {
    let seconds =
        std::env::var("COFFERDAM_TRAFFIC_SECONDS").map_or(3, |text| text.parse().unwrap());
    for kind in ["tcp_echo", "ping_flood"] {
        let line = machine.run_within(
            Duration::from_secs(seconds + 60),
            &format!("/init traffic {kind} 10.0.2.2 {seconds}"),
        );
        eprintln!("{kind}: {line}");
        assert!(
            line.contains("\"corrupted\":0") && !line.contains("\"error\""),
            "{line}"
        );
    }
}

/// What tools of the user show of the NIC; traffic stands still.
const TOOLS: &str = "ethtool eth0; ethtool -i eth0; ethtool -a eth0; ethtool -c eth0; ethtool -g eth0; ethtool -k eth0; \
    ethtool -e eth0 length 64; ethtool -d eth0; ethtool -S eth0; ethtool -P eth0; /bin/ip -d -s link show eth0; \
    ethtool -G eth0 rx 512; ethtool -g eth0; ethtool -K eth0 rx off; ethtool -k eth0; ethtool -K eth0 rx on; \
    ethtool -G eth0 rx 256; ip link set eth0 mtu 1400; /bin/ip link show eth0; ip link set eth0 mtu 1500; \
    ip link set eth0 promisc on; ethtool -d eth0; ip link set eth0 promisc off; \
    ethtool -G eth0 rx 7 2>&1; ethtool -s eth0 speed 10 duplex half autoneg off 2>&1; ethtool eth0; \
    ethtool -s eth0 autoneg on; linked; ethtool eth0; true";

/// Run in the full form of the suite, or by name.
#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn ethtool_and_ip_show_the_same_from_the_domain() {
    let mut machine = with_silent_network();
    machine.run(TOOLS);
    let native = machine.run(TOOLS);
    let again = machine.run(TOOLS);
    assert_eq!(native, again, "the tools' output changes by itself");
    machine
        .isolate("e1000", isolation::attach::plan::Wanted::All)
        .unwrap();
    let isolated = machine.run(TOOLS);
    machine.print_status();
    assert_eq!(native, isolated);
    let status = machine.status("e1000");
    assert_eq!((status.violations, &status.broken), (0, &None));
    machine.assert_healthy();
}

mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn e1000_works_with_each_of_its_entries_in_the_domain() {
        let mut machine = with_network();
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
}

/// What isolation takes of a transmit once it is warm: packets both ways, with no function isolated
/// but that.
#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_warm_transmit_has_few_exits_and_pages() {
    let mut machine = with_network();
    machine
        .isolate("e1000", named(&["e1000_xmit_frame"]))
        .unwrap();
    stream_and_flood(&mut machine);
    let before = machine.entry("e1000", "e1000_xmit_frame");
    stream_and_flood(&mut machine);
    machine.print_status();
    let after = machine.entry("e1000", "e1000_xmit_frame");
    let calls = (after.calls - before.calls) as f64;
    let each = |count: fn(&EntryStatus) -> u64| (count(&after) - count(&before)) as f64 / calls;
    eprintln!(
        "{calls} warm calls: exits {:.3}, crossings {:.3}, system calls {:.3}, pages {:.2}, {:.0} us in the private VM, {:.0} us besides",
        each(|entry| entry.private_exits),
        each(|entry| entry.crossings),
        each(|entry| entry.other_syscalls),
        each(|entry| entry.dirty_pages),
        each(|entry| entry.private_ns) / 1e3,
        each(|entry| entry.total_ns - entry.private_ns) / 1e3,
    );
    assert_eq!(after.commits, after.calls, "{after:?}");
    assert!(each(|entry| entry.private_exits) <= 2.25, "{after:?}");
    assert!(each(|entry| entry.dirty_pages) <= 8.0, "{after:?}");
    machine.assert_healthy();
}
