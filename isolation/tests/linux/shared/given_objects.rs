//! What a driver was given with a call that fails is not forgotten: a block I/O ends with an error,
//! a packet for a device without a queue is dropped.

use isolation::dispatch::fault::{FaultOrder, UsedUpBy, WhichCalls};

use super::booted;
use crate::machine::Machine;
use crate::named;

/// `xor eax, eax; mov rax, [rax]`: a NULL dereference.
const NULL_DEREFERENCE: &[u8] = &[0x31, 0xc0, 0x48, 0x8b, 0x00];

/// Has the next `times` calls of `entry` fail.
fn fail(machine: &Machine, module: &str, entry: &str, times: u64) {
    let order = FaultOrder {
        function: entry.into(),
        offset: 5,
        code: NULL_DEREFERENCE.to_vec(),
        which: WhichCalls::ALL,
        times,
        used_up_by: UsedUpBy::Failing,
    };
    machine.isolator.order_fault(module, order).unwrap();
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_block_io_whose_submission_fails_ends_with_an_error() {
    let mut machine = booted();
    machine.load("brd", "rd_nr=1 rd_size=4096");
    machine.run("dd if=/dev/urandom of=/tmp/data bs=4k count=8 2>/dev/null; dd if=/tmp/data of=/dev/ram0 bs=4k oflag=direct 2>/dev/null");
    machine.isolate("brd", named(&["brd_submit_bio"])).unwrap();
    let read = "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/ram0 of=/tmp/back bs=4k count=8 iflag=direct 2>&1; echo $?";
    fail(&machine, "brd", "brd_submit_bio", u64::MAX);
    let out = machine.run(read);
    assert!(out.contains("Input/output error"), "{out}");
    assert!(machine.entry("brd", "brd_submit_bio").aborts > 0);
    // The next ones are read.
    fail(&machine, "brd", "brd_submit_bio", 0);
    let out = machine.run(&format!("{read}; cmp /tmp/data /tmp/back"));
    machine.print_status();
    assert!(out.contains('0') && !out.contains("error"), "{out}");
    // Nobody holds on to it.
    machine.isolator.release("brd").unwrap();
    machine.run("rmmod brd");
    machine.assert_healthy();
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_packet_for_a_device_without_a_queue_is_dropped_when_its_call_fails() {
    let mut machine = booted();
    machine.load("veth", "");
    machine.run(
        "/bin/ip link add v0 type veth peer name v1; for d in v0 v1; do echo 1 > /proc/sys/net/ipv6/conf/$d/disable_ipv6; done; \
        ip addr add 10.7.0.1/24 dev v0; ip link set v0 up; ip link set v1 up; \
        /bin/ip neigh add 10.7.0.2 lladdr 02:00:00:00:00:02 dev v0",
    );
    let send = "ping -c 20 -i 0.02 -W 1 10.7.0.2 >/dev/null 2>&1; true";
    let received = "cat /sys/class/net/v1/statistics/rx_packets";
    machine.run(send);
    machine.isolate("veth", named(&["veth_xmit"])).unwrap();
    let before: u64 = machine.run(received).trim().parse().unwrap();
    fail(&machine, "veth", "veth_xmit", 10);
    machine.run(send);
    machine.print_status();
    let entry = machine.entry("veth", "veth_xmit");
    assert_eq!((entry.calls, entry.aborts), (20, 10), "{entry:?}");
    let after: u64 = machine.run(received).trim().parse().unwrap();
    assert_eq!(after - before, 10);
    let log = machine.run("dmesg");
    assert!(!log.contains("asks to queue packet"), "{log}");
    machine.isolator.release("veth").unwrap();
    machine.run("/bin/ip link del v0; rmmod veth");
    machine.assert_healthy();
}
