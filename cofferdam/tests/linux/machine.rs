//! The machine: boot, reboot, power-off, several processors.

use std::time::Duration;

use agent_protocol::traffic::TrafficKind;
use cofferdam::bench::network::{self, LINK_TIME};
use cofferdam::bench::traffic;

use super::{BOOT_TIME, boot, options, shell};

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_guest_boots_reboots_and_powers_off() {
    let mut guest = boot(&options());
    let first = guest.agent().agent().unwrap().boot_id.clone();
    guest.agent().reboot().unwrap();
    guest.wait_for_agent(BOOT_TIME).unwrap();
    let second = guest.agent().agent().unwrap().boot_id.clone();
    assert_ne!(first, second);
    assert_eq!(guest.control().unwrap().status().unwrap().resets, 1);
    guest.agent().power_off().unwrap();
    assert!(guest.wait_for_end(BOOT_TIME).unwrap().success());
    assert!(!guest.paths().dir.exists());
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_guest_that_reboots_ends_with_no_reboot() {
        let mut guest = boot(&options().with("--no-reboot"));
        guest.agent().reboot().unwrap();
        assert!(guest.wait_for_end(BOOT_TIME).unwrap().success());
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn eight_processors_come_up() {
        let mut guest = boot(&options().with("--vcpus 8"));
        let count = shell(&mut guest, "grep -c ^processor /proc/cpuinfo");
        assert_eq!(count.trim(), "8");
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn four_processors_come_up_and_work() {
        let mut guest = boot(&options().with("--vcpus 4 --net user"));
        let count = shell(&mut guest, "grep -c ^processor /proc/cpuinfo");
        assert_eq!(count.trim(), "4");
        // All at once, and a shell that waits for them: each round takes interrupts between processors.
        let script = "for round in $(seq 25); do
            for cpu in 0 1 2 3; do taskset -c $cpu sh -c 'echo cpu $0 works' $cpu & done; wait; done";
        let works = shell(&mut guest, script);
        for cpu in 0..4 {
            let line = format!("cpu {cpu} works");
            assert_eq!(works.matches(&line).count(), 25, "{works}");
        }
        network::bring_up(&mut guest, "e1000").unwrap();
        network::wait_for_link(&mut guest, LINK_TIME).unwrap();
        let stream =
            traffic::send(&mut guest, TrafficKind::TcpEcho, Duration::from_secs(3)).unwrap();
        assert_eq!((stream.corrupted, &stream.error), (0, &None), "{stream:?}");
        assert!(stream.bytes_from_peer > 0, "{stream:?}");
    }
}
