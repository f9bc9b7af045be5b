//! Guests on wires other than the gateway: joined by a cable, and on a TAP of the host.

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Instant;

use agent_protocol::message::Ipv4;
use cofferdam::bench::guest::Guest;
use cofferdam::bench::network::{self, INTERFACE, LINK_TIME};

use super::{boot, options, ping, shell};

/// Inserts the driver and gives its interface `10.9.0.NUMBER/24`.
fn bring_up(guest: &mut Guest, driver: &str, number: u8) {
    guest.agent().load_module(driver, "").unwrap();
    guest.agent().set_link(INTERFACE, true).unwrap();
    let address = Ipv4 {
        address: Ipv4Addr::new(10, 9, 0, number),
        prefix: 24,
    };
    guest.agent().set_address(INTERFACE, address, None).unwrap();
}

fn assert_reaches(guest: &mut Guest, number: u8) {
    ping(guest, &format!("10.9.0.{number}"), 1400);
}

/// Waits until the guest sees the carrier gone.
fn wait_for_no_link(guest: &mut Guest) {
    let deadline = Instant::now() + LINK_TIME;
    let carrier = format!("cat /sys/class/net/{INTERFACE}/carrier");
    while shell(guest, &carrier).trim() != "0" {
        assert!(Instant::now() < deadline, "the link stays");
    }
}

/// A TAP of the host's with the address `10.9.0.100/24`, as long as it lives.
struct HostTap(&'static str);

impl HostTap {
    fn new(name: &'static str) -> Self {
        ip(&["tuntap", "add", "dev", name, "mode", "tap"]);
        let tap = Self(name);
        ip(&["addr", "add", "10.9.0.100/24", "dev", name]);
        ip(&["link", "set", name, "up"]);
        tap
    }
}

impl Drop for HostTap {
    fn drop(&mut self) {
        ip(&["link", "delete", self.0]);
    }
}

#[track_caller]
fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {}", arguments.join(" "));
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_guest_on_a_tap_reaches_the_host() {
    let _tap = HostTap::new("cofferdam-tap0");
    let mut guest = boot(&options().with("--net tap=cofferdam-tap0"));
    bring_up(&mut guest, "e1000", 1);
    network::wait_for_link(&mut guest, LINK_TIME).unwrap();
    assert_reaches(&mut guest, 100);
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn two_guests_are_joined_by_a_cable_that_one_can_leave() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        let link = link.display();
        let mut first = boot(&options().with(&format!("--net unix={link},listen")));
        bring_up(&mut first, "e1000", 1);
        {
            let mut second = boot(&options().with(&format!("--net unix={link} --nic virtio")));
            bring_up(&mut second, "virtio_net", 2);
            network::wait_for_link(&mut first, LINK_TIME).unwrap();
            assert_reaches(&mut first, 2);
            assert_reaches(&mut second, 1);
        }
        wait_for_no_link(&mut first);
        let mut third = boot(&options().with(&format!("--net unix={link}")));
        bring_up(&mut third, "e1000", 3);
        network::wait_for_link(&mut third, LINK_TIME).unwrap();
        network::wait_for_link(&mut first, LINK_TIME).unwrap();
        assert_reaches(&mut third, 1);
    }
}
