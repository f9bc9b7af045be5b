//! Isolation of stock drivers of a stock Debian guest.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

mod jumbo;
mod machine;
mod processors;
mod shared;
mod wire;

use isolation::attach::plan::Wanted;
use machine::Machine;

fn named(names: &[&str]) -> Wanted {
    Wanted::Named(names.iter().map(|name| (*name).to_owned()).collect())
}

/// A program in the guest that waits until the NIC has a link.
const LINKED: &str = "#!/bin/busybox sh
for round in $(seq 300); do
    read -r carrier < /sys/class/net/eth0/carrier
    [ \"$carrier\" = 1 ] && exit 0
    sleep 0.1
done
exit 1
";

/// A guest of its own whose NIC is up and reaches the gateway.
fn boot_with_network(vcpus: u8, append: &str) -> Machine {
    let mut machine = Machine::boot(vcpus, append);
    bring_up_network(&mut machine);
    machine
}

/// Has the NIC come up and reach the gateway, with the MTU that `COFFERDAM_GUEST_MTU` says.
fn bring_up_network(machine: &mut Machine) {
    machine.load("e1000", "");
    machine.run("ip link set lo up; ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up");
    let write = machine
        .agent
        .write_file("/bin/linked", LINKED.as_bytes(), 0o755);
    write.unwrap();
    machine.run("linked; ping -c 1 -W 5 10.0.2.2");
    if let Ok(mtu) = std::env::var("COFFERDAM_GUEST_MTU") {
        machine.run(&format!("ip link set eth0 mtu {mtu}; linked"));
    }
}
