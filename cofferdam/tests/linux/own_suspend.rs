//! A guest that suspends itself, by its own kernel: its devices stop and come back.

use std::time::{Duration, Instant};

use cofferdam::bench::guest::{Guest, NAME};
use cofferdam::control::protocol::Request;
use cofferdam::runtime_dir::RunningVm;

use super::{BOOT_TIME, assert_log_is_healthy, boot, options, ping, shell};

/// What the guest does by itself, and when it has.
const WOKEN: &str = "/tmp/woken";

/// Has the guest suspend all of its devices and resume them (`/sys/power/pm_test`), so that nobody
/// has to wake it, while nobody is connected to its agent. Returns when that is over.
#[track_caller]
fn suspend_itself(guest: &mut Guest) {
    let script = format!(
        "rm -f {WOKEN}; cd /sys/power && echo devices > pm_test && \
         echo 0 > /sys/module/suspend/parameters/pm_test_delay && \
         setsid sh -c 'sleep 0.3; echo freeze > state && touch {WOKEN}' \
         < /dev/null > /dev/null 2>&1 &"
    );
    shell(guest, &script);
    let deadline = Instant::now() + BOOT_TIME;
    loop {
        guest.agent().disconnect();
        std::thread::sleep(Duration::from_millis(500));
        let left = deadline.saturating_duration_since(Instant::now());
        // Its agent may be frozen, and answers when it goes on.
        guest
            .wait_for_agent(left)
            .unwrap_or_else(|error| panic!("{error:#}"));
        if guest.agent().read_file(WOKEN).is_ok() {
            return;
        }
        assert!(Instant::now() < deadline, "{}", guest.last_words());
    }
}

/// Has the guest suspend itself for good (nobody is connected to its agent then), and returns when
/// it sleeps.
#[track_caller]
fn fall_asleep(guest: &mut Guest) {
    let script = format!(
        "rm -f {WOKEN}; echo none > /sys/power/pm_test; setsid sh -c \
         'sleep 0.3; echo freeze > /sys/power/state && touch {WOKEN}' \
         < /dev/null > /dev/null 2>&1 &"
    );
    shell(guest, &script);
    guest.agent().disconnect();
    let deadline = Instant::now() + BOOT_TIME;
    while guest.agent().hello(Duration::from_secs(2)).is_ok() {
        guest.agent().disconnect();
        assert!(Instant::now() < deadline, "{}", guest.last_words());
        std::thread::sleep(Duration::from_millis(200));
    }
    guest.agent().disconnect();
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_guest_that_sleeps_is_woken_and_shut_down_and_one_that_is_awake_does_not_mind() {
    let mut guest = boot(&options());
    let mut control = guest.control().unwrap();
    // One that is awake.
    for _ in 0..20 {
        control.tell(&Request::Wake {}).unwrap();
    }
    shell(&mut guest, "true");
    for round in 0..2 {
        fall_asleep(&mut guest);
        control.tell(&Request::PowerButton {}).unwrap();
        let heard = guest.agent().hello(Duration::from_secs(2));
        assert!(heard.is_err(), "the power button wakes it");
        guest.agent().disconnect();
        control.tell(&Request::Wake {}).unwrap();
        guest
            .wait_for_agent(BOOT_TIME)
            .unwrap_or_else(|error| panic!("{error:#}"));
        let until =
            format!("for t in $(seq 1 100); do [ -e {WOKEN} ] && exit 0; sleep 0.1; done; exit 1");
        shell(&mut guest, &until);
        let log = shell(&mut guest, "dmesg");
        assert_eq!(log.matches("PM: suspend exit").count(), round + 1, "{log}");
        let clock = "a=$(cut -d' ' -f1 /proc/uptime); sleep 0.1; b=$(cut -d' ' -f1 /proc/uptime); [ $a != $b ]";
        shell(&mut guest, clock);
    }
    assert_log_is_healthy(&mut guest, &[]);
    fall_asleep(&mut guest);
    let running = RunningVm {
        name: NAME.parse().unwrap(),
        pid: Some(guest.pid()),
        paths: guest.paths().clone(),
    };
    cofferdam::control::ending::ask(&running).unwrap();
    let ended = guest.wait_for_end(BOOT_TIME);
    assert!(ended.unwrap_or_else(|error| panic!("{error:#}")).success());
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_guest_that_has_suspended_itself_is_reached_by_its_agent_and_its_network() {
    const MACS: [&str; 2] = ["02:cf:00:00:00:01", "02:cf:00:00:00:02"];
    let nets = format!(
        "--net user,mac={} --net user,nic=virtio,mac={}",
        MACS[0], MACS[1]
    );
    let mut guest = boot(&options().with(&nets));
    shell(&mut guest, "modprobe e1000 && modprobe virtio_net");
    for (number, mac) in MACS.into_iter().enumerate() {
        let net = 2 + number;
        let script = format!(
            "for i in /sys/class/net/*; do n=${{i##*/}}; [ \"$(cat $i/address)\" = {mac} ] || continue; \
             ip link set $n up && ip addr add 10.0.{net}.15/24 dev $n; \
             for t in $(seq 1 600); do [ \"$(cat $i/carrier)\" = 1 ] && exit 0; sleep 0.1; done; \
             done; exit 1"
        );
        shell(&mut guest, &script);
    }
    for round in 0..3 {
        suspend_itself(&mut guest);
        let log = shell(&mut guest, "dmesg");
        assert_eq!(log.matches("PM: suspend exit").count(), round + 1, "{log}");
        // The driver of a card that has been suspended looks for its link again.
        for net in [2, 3] {
            let until = format!(
                "for t in $(seq 1 100); do ping -c 1 -W 1 10.0.{net}.2 && exit 0; done; dmesg; exit 1"
            );
            shell(&mut guest, &until);
            ping(&mut guest, &format!("10.0.{net}.2"), 1400);
        }
        // One client after the other, as before.
        for _ in 0..3 {
            guest.agent().disconnect();
            shell(&mut guest, "true");
        }
    }
    assert_log_is_healthy(&mut guest, &[]);
}
