//! The block driver `null_blk` with memory behind it.

use isolation::attach::plan::Wanted;
use isolation::dispatch::fault::{FaultOrder, UsedUpBy, WhichCalls};
use isolation::domain::violation::ViolationKind;

use super::booted;
use crate::machine::Machine;
use crate::named;

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_file_system_on_an_isolated_null_blk_keeps_its_contents() {
    let mut machine = booted();
    machine.load(
        "null_blk",
        "nr_devices=1 gb=1 memory_backed=1 bs=4096 queue_mode=2 irqmode=0",
    );
    machine.load("crc32c_generic", "");
    machine.load("ext4", "");
    machine.isolate("null_blk", Wanted::All).unwrap();
    let sums = machine.run(
        "set -e; dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null; \
        dd if=/tmp/data of=/dev/nullb0 bs=64k oflag=direct 2>/dev/null; \
        dd if=/dev/nullb0 of=/tmp/back bs=64k count=16 iflag=direct 2>/dev/null; cmp /tmp/data /tmp/back; \
        mke2fs -F -b 4096 /dev/nullb0 65536 >/dev/null 2>&1; mkdir -p /mnt; mount -t ext4 /dev/nullb0 /mnt; \
        cp /tmp/data /mnt/a; cp -r /proc/self/net /mnt/ 2>/dev/null || true; sync; umount /mnt; \
        echo 3 > /proc/sys/vm/drop_caches; mount -t ext4 /dev/nullb0 /mnt; \
        sha256sum < /tmp/data; sha256sum < /mnt/a; umount /mnt",
    );
    machine.print_status();
    let sums: Vec<&str> = sums.lines().collect();
    assert_eq!(sums.len(), 2, "{sums:?}");
    assert_eq!(sums[0], sums[1]);
    let status = machine.status("null_blk");
    assert_eq!((status.violations, &status.broken), (0, &None));
    assert!(
        status
            .entries
            .iter()
            .map(|entry| entry.commits)
            .sum::<u64>()
            > 0,
        "nothing ran in the domain"
    );
    machine.isolator.release("null_blk").unwrap();
    machine.assert_healthy();
}

/// A call of `memcpy` with `rdx` bytes for a place of somebody else's.
#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_copy_that_is_too_long_is_stopped_where_it_leaves_what_is_the_drivers() {
    let mut machine = booted();
    machine.load("null_blk", "nr_devices=1 memory_backed=1 gb=1 bs=4096");
    let entry = "null_queue_rq";
    machine.isolate("null_blk", named(&[entry])).unwrap();
    let (others, memcpy) = (machine.symbol("init_task"), machine.symbol("memcpy"));
    let mut code = vec![0x48, 0xbf]; // mov rdi, others
    code.extend(others.to_le_bytes());
    code.extend([0x48, 0x89, 0xe6]); // mov rsi, rsp
    code.extend([0xba, 8, 0, 0, 0]); // mov edx, 8
    code.extend([0x48, 0xb8]); // mov rax, memcpy
    code.extend(memcpy.to_le_bytes());
    code.extend([0xff, 0xd0, 0xc3]); // call rax; ret
    let order = FaultOrder {
        function: entry.into(),
        offset: 5,
        code,
        which: WhichCalls::ALL,
        times: 1,
        used_up_by: UsedUpBy::Failing,
    };
    machine.isolator.order_fault("null_blk", order).unwrap();
    let write = "dd if=/dev/zero of=/dev/nullb0 bs=4k count=1 oflag=direct 2>&1 || echo failed";
    let out = machine.run(write);
    assert!(out.contains("failed"), "{out}");
    machine.print_status();
    let reports = machine.isolator.reports("null_blk").unwrap();
    let report = reports.last().expect("the store is reported");
    let address = others;
    assert_eq!(report.violation.kind, ViolationKind::StrayWrite { address });
    assert!(report.at.contains("memcpy"), "{report}");
    let from = report.call_chain.last().unwrap();
    assert!(from.starts_with("null_queue_rq+"), "{from}");
    let out = machine.run(write);
    assert!(!out.contains("failed"), "{out}");
    machine.isolator.release("null_blk").unwrap();
    machine.assert_healthy();
}

mod long {
    use super::*;

    /// What a driver had written before it was isolated is in pages that nobody has seen it get, and
    /// that it finds by number.
    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn what_was_written_before_is_written_again_by_the_isolated_driver() {
        let mut machine = booted();
        machine.load("null_blk", "nr_devices=1 memory_backed=1 gb=1 bs=4096");
        machine.load("brd", "rd_nr=1 rd_size=8192");
        let write = |machine: &mut Machine, what: &str| {
            machine.run(&format!(
                "dd if=/dev/urandom of=/tmp/{what} bs=64k count=64 2>/dev/null; \
                for to in nullb0 ram0; do dd if=/tmp/{what} of=/dev/$to bs=64k oflag=direct 2>&1 || echo failed; done"
            ))
        };
        let out = write(&mut machine, "before");
        assert!(!out.contains("failed"), "{out}");
        for (module, entries) in [
            ("null_blk", &["null_queue_rq"]),
            ("brd", &["brd_submit_bio"]),
        ] {
            machine.isolate(module, named(entries)).unwrap();
        }
        let out = write(&mut machine, "after");
        machine.print_status();
        assert!(!out.contains("failed"), "{out}");
        let out = machine.run(
            "echo 3 > /proc/sys/vm/drop_caches; \
            for from in nullb0 ram0; do dd if=/dev/$from of=/tmp/back bs=64k count=64 2>/dev/null; cmp /tmp/back /tmp/after && echo same; done",
        );
        assert_eq!(out.matches("same").count(), 2, "{out}");
        for (module, entry) in [("null_blk", "null_queue_rq"), ("brd", "brd_submit_bio")] {
            assert_eq!(machine.status(module).violations, 0);
            assert!(machine.entry(module, entry).commits >= 64);
            machine.isolator.release(module).unwrap();
        }
        machine.assert_healthy();
    }
}
