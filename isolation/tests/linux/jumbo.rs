//! Frames larger than a page through the isolated poll of the stock driver of the 82540EM: it puts
//! the pages of such a frame into a packet that NAPI keeps from poll to poll, whose head is a piece
//! of a page handed out long before.

use isolation::dispatch::fault::{FaultOrder, UsedUpBy, WhichCalls};

use crate::boot_with_network;
use crate::machine::Machine;
use crate::named;

/// What the kernel's allocators check of themselves: red zones, poison, who had an object; pages
/// filled when given back.
const CHECKED_MEMORY: &str = "slub_debug=FZPU page_poison=1";

/// `xor eax, eax; mov rax, [rax]`: a NULL dereference.
const NULL_DEREFERENCE: &[u8] = &[0x31, 0xc0, 0x48, 0x8b, 0x00];

/// Sends `count` pings of `bytes` bytes that all have to be answered.
fn ping(machine: &mut Machine, count: u32, bytes: u32) {
    let out = machine.run(&format!(
        "ping -c {count} -i 0.1 -W 10 -s {bytes} 10.0.2.2 | tail -n 2"
    ));
    let all = format!("{count} packets transmitted, {count} packets received");
    if !out.contains(&all) {
        machine.print_status();
        panic!("{bytes} bytes: {out}");
    }
}

fn set_mtu(machine: &mut Machine, bytes: u32) {
    machine.run(&format!("ip link set eth0 mtu {bytes}; linked"));
}

fn jumbo_frames_come_through(append: &str) {
    let mut machine = boot_with_network(1, append);
    machine.settings.retry = true;
    machine.isolate("e1000", named(&["e1000_clean"])).unwrap();
    set_mtu(&mut machine, 9000);
    ping(&mut machine, 4, 8000);
    machine.run("ip link set eth0 down; ip link set eth0 up; linked");
    ping(&mut machine, 4, 8000);
    set_mtu(&mut machine, 1500);
    ping(&mut machine, 4, 1000);
    set_mtu(&mut machine, 9000);
    ping(&mut machine, 20, 8000);
    let entry = machine.entry("e1000", "e1000_clean");
    assert!(entry.calls > 30, "{entry:?}");
    assert_eq!(machine.status("e1000").violations, 0);
    // Every fifth poll fails behind the gate, then where it has put its packets together.
    let last = machine.calls_in("e1000", "e1000_clean", "napi_complete_done");
    for offset in [5, *last.first().expect("the poll ends")] {
        let before = machine.status("e1000").violations;
        let order = FaultOrder {
            function: "e1000_clean".into(),
            offset,
            code: NULL_DEREFERENCE.to_vec(),
            which: WhichCalls::Every(5),
            times: 8,
            used_up_by: UsedUpBy::Failing,
        };
        machine.isolator.order_fault("e1000", order).unwrap();
        ping(&mut machine, 40, 8000);
        let count = machine.isolator.fault_count("e1000").unwrap();
        assert!(count.failed >= 4, "{count:?}");
        assert_eq!(machine.status("e1000").violations - before, count.failed);
    }
    machine.print_status();
    machine.isolator.release("e1000").unwrap();
    ping(&mut machine, 4, 8000);
    machine.assert_healthy();
    let log = machine.run("dmesg");
    for bad in [
        "Redzone",
        "Poison overwritten",
        "Object already free",
        "NETDEV WATCHDOG",
        "timed out",
    ] {
        assert!(!log.contains(bad), "dmesg: {log}");
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn jumbo_frames_come_through_where_the_kernel_checks_its_memory() {
    jumbo_frames_come_through(CHECKED_MEMORY);
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn jumbo_frames_come_through_an_isolated_poll() {
        jumbo_frames_come_through("");
    }
}
