//! Stock drivers with each of their stores looked at, where others have objects on the page.

use isolation::attach::request::Contain;

use super::e1000::{E1000_ENTRIES, operations};
use super::with_network;
use crate::named;

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn stock_drivers_work_with_each_of_their_stores_looked_at() {
    let mut machine = with_network();
    machine.settings.contain = Contain::Exact;
    machine.load("null_blk", "nr_devices=1 memory_backed=1 gb=1 bs=4096");
    let modules: [(&str, &[&str]); 2] =
        [("e1000", E1000_ENTRIES), ("null_blk", &["null_queue_rq"])];
    for (module, entries) in modules {
        let isolated = machine.isolate(module, named(entries)).unwrap();
        assert!(isolated.strength.each_store);
    }
    let out = machine.run(
        "dd if=/dev/urandom of=/tmp/data bs=4k count=16 2>/dev/null; \
        for round in 1 2; do dd if=/tmp/data of=/dev/nullb0 bs=4k oflag=direct 2>/dev/null; \
        dd if=/dev/nullb0 of=/tmp/back bs=4k count=16 iflag=direct 2>/dev/null; cmp /tmp/data /tmp/back && echo same; done; \
        ping -c 5 -i 0.05 -W 2 10.0.2.2",
    );
    assert_eq!(out.matches("same").count(), 2, "{out}");
    machine.run(&operations(7));
    machine.print_status();
    for (module, entries) in modules {
        let status = machine.status(module);
        assert_eq!((status.violations, &status.broken), (0, &None));
        for entry in entries {
            assert!(machine.entry(module, entry).commits > 0, "{entry}");
        }
        machine.isolator.release(module).unwrap();
    }
    machine.assert_healthy();
}
