//! The stock e1000e against the image of the lab's e1000e: a guest that has not got its NIC probes,
//! opens, closes, dumps, tests and removes it, and finds it working when its turn comes.

use std::time::{Duration, Instant};

use cofferdam::bench::guest::Guest;
use cofferdam::bench::network;

use super::passed::{NAMES, Pair};
use super::{assert_log_is_healthy, insert_nic, nic_works, shell};

/// Which of the two has the NIC first, and which one is parked.
const FIRST: usize = 0;
const SECOND: usize = 1;
/// How long something that happens by itself may be in coming.
const SOON: Duration = Duration::from_secs(300);
/// Of what e1000e says when something that it waited for has not come.
const COMPLAINTS: [&str; 5] = ["rror", "fail", "Hang", "Reset adapter", "PHY reset"];

/// The driver has found all that it waited for.
#[track_caller]
fn assert_no_complaints(guest: &mut Guest) {
    assert_log_is_healthy(guest, &[]);
    let log = shell(guest, "dmesg");
    for line in log.lines().filter(|line| line.contains("e1000e")) {
        let complains = COMPLAINTS.iter().any(|word| line.contains(word));
        assert!(!complains, "{line}\n{log}");
    }
}

fn carrier(guest: &mut Guest) -> String {
    shell(guest, "cat /sys/class/net/eth0/carrier")
}

/// Waits until the guest's driver sees no link.
#[track_caller]
fn wait_without_link(guest: &mut Guest) {
    let deadline = Instant::now() + SOON;
    while carrier(guest).trim() != "0" {
        assert!(Instant::now() < deadline, "the link stays");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What a user may do with a NIC that has no link. `number` is the last byte of its address.
fn use_without_the_device(guest: &mut Guest, address: &str, number: u8) {
    wait_without_link(guest);
    for _ in 0..3 {
        shell(guest, "ip link set eth0 down && ip link set eth0 up");
    }
    let registers = shell(guest, "ethtool -d eth0");
    assert!(registers.contains("0x00008: STATUS"), "{registers}");
    shell(
        guest,
        "ethtool -S eth0 && ethtool eth0 && ethtool -a eth0 && ethtool -c eth0",
    );
    let dump = shell(guest, "ethtool -e eth0 offset 0 length 6");
    assert!(dump.contains(&address.replace(':', " ")), "{dump}");
    assert_eq!(
        shell(guest, "cat /sys/class/net/eth0/address").trim(),
        address
    );
    // The watchdog comes every two seconds.
    std::thread::sleep(Duration::from_secs(5));
    assert_no_complaints(guest);
    shell(guest, "ip link set eth0 down && rmmod e1000e");
    insert_nic(guest, "e1000e", number);
    assert_eq!(
        shell(guest, "cat /sys/class/net/eth0/address").trim(),
        address
    );
    wait_without_link(guest);
    assert_no_complaints(guest);
}

/// The test has taken its address.
fn insert_again(guest: &mut Guest) {
    shell(
        guest,
        "ip link set eth0 up; ip addr replace 10.0.2.16/24 dev eth0",
    );
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn e1000e_tests_its_memory_and_its_interrupts_without_its_device() {
        let mut pair = Pair::new(&[], "");
        let parked = &mut pair.guests[SECOND];
        wait_without_link(parked);
        // It makes thousands of accesses.
        let script = "(ethtool -t eth0 offline > /tmp/test 2>&1; echo over >> /tmp/test) < /dev/null > /dev/null 2>&1 &";
        shell(parked, script);
        let deadline = Instant::now() + SOON;
        let result = loop {
            let result = shell(parked, "cat /tmp/test");
            if result.ends_with("over\n") {
                break result;
            }
            assert!(Instant::now() < deadline, "it does not end: {result}");
            std::thread::sleep(Duration::from_secs(1));
        };
        println!("{result}");
        // Registers hold more bits in the image, and nothing is sent.
        for test in ["Eeprom", "Interrupt"] {
            let line = result.lines().find(|line| line.starts_with(test));
            let line = line.unwrap_or_else(|| panic!("no {test} in {result}"));
            assert!(
                line.trim_end().ends_with('0'),
                "{line}\n{}",
                shell(parked, "dmesg | tail -20")
            );
        }
        pair.give(SECOND);
        insert_again(&mut pair.guests[SECOND]);
        nic_works(&mut pair.guests[SECOND]);
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn e1000e_is_driven_without_its_device_and_works_when_its_turn_comes() {
        // Both drivers are inserted there, and only one can have the device.
        let mut pair = Pair::new(&[], "");
        assert_eq!(
            pair.served.status().unwrap().turn.as_deref(),
            Some(NAMES[FIRST])
        );
        nic_works(&mut pair.guests[FIRST]);
        let addresses = NAMES.map(|name| pair.context(name).mac);
        use_without_the_device(&mut pair.guests[SECOND], &addresses[SECOND], 16);
        nic_works(&mut pair.guests[FIRST]);

        // It loses its link with frames under way.
        let flood = "(ping -f -s 1400 10.0.2.2 > /dev/null 2>&1) < /dev/null & sleep 1";
        shell(&mut pair.guests[FIRST], flood);
        pair.give(SECOND);
        nic_works(&mut pair.guests[SECOND]);
        wait_without_link(&mut pair.guests[FIRST]);
        shell(&mut pair.guests[FIRST], "killall ping || true");
        use_without_the_device(&mut pair.guests[FIRST], &addresses[FIRST], 15);
        nic_works(&mut pair.guests[SECOND]);

        for turn in [FIRST, SECOND, FIRST] {
            pair.give(turn);
            network::wait_for_link(&mut pair.guests[turn], SOON).unwrap();
            nic_works(&mut pair.guests[turn]);
        }
        for guest in &mut pair.guests {
            assert_no_complaints(guest);
            println!("{}", shell(guest, "dmesg | grep -i 'e1000e\\|eth0'"));
        }
        println!("{:?}", NAMES.map(|name| pair.context(name)));
        assert_eq!(pair.served.status().unwrap().failed_switches, 0);
    }
}
