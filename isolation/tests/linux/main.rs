//! Isolation of stock drivers of a stock Debian guest.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

mod attaching;
mod compensating;
mod dummy;
mod e1000;
mod machine;
mod null_blk;
mod processors;
mod soak;

use isolation::attach::plan::Wanted;
use machine::Machine;

fn named(names: &[&str]) -> Wanted {
    Wanted::Named(names.iter().map(|name| (*name).to_owned()).collect())
}

/// A guest whose NIC is up and reaches the gateway.
fn boot_with_network(vcpus: u8, append: &str) -> Machine {
    let mut machine = Machine::boot(vcpus, append);
    machine.load("e1000", "");
    machine.run("ip link set lo up; ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up");
    machine
        .run("for i in 1 2 3 4 5 6 7 8 9 10; do ping -c 1 -W 1 10.0.2.2 && exit 0; done; exit 1");
    machine
}
