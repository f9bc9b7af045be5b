//! Memory that nobody has to change, looked at after a mark.

use std::collections::BTreeMap;
use std::time::Duration;

use isolation::attach::plan::Wanted;
use vm_memory::Bytes;

use super::booted;
use crate::machine::Machine;

const LIMIT: Duration = Duration::from_secs(60);

/// What has changed since the mark and is not among `known`.
fn changed(machine: &Machine, known: &BTreeMap<u64, u64>) -> Vec<(u64, u64, String)> {
    let mut is_known = |at: u64| {
        let (_, end) = known.range(..=at).next_back()?;
        (at < *end).then_some(*end)
    };
    let isolator = &machine.isolator;
    let found = isolator.bystanders("dummy", "still", LIMIT, &mut is_known);
    let found = found.unwrap().into_iter();
    found
        .map(|one| (one.range.start, one.range.end, one.what))
        .collect()
}

/// The last thing that anybody would write: the text that `/proc/version` is made from.
const STILL: &str = "linux_proc_banner";

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_byte_that_nobody_had_to_change_is_found_among_all_that_changes_by_itself() {
    let mut machine = booted();
    machine.load("dummy", "numdummies=1");
    machine.isolate("dummy", Wanted::All).unwrap();
    machine.mark("still");
    let work = "ip link set dummy0 up; ethtool -i dummy0 >/dev/null; ip link set dummy0 down";
    machine.run(work);
    let mut known = BTreeMap::new();
    let first = changed(&machine, &known);
    assert!(
        first.iter().any(|(_, _, what)| what.contains("object")),
        "{first:?}"
    );
    assert!(
        !first.iter().any(|(_, _, what)| what.contains(STILL)),
        "{first:?}"
    );
    known.extend(first.into_iter().map(|(start, end, _)| (start, end)));
    let (at, memory) = (machine.physical(STILL), machine.memory());
    let byte: u8 = memory.read_obj(at).unwrap();
    memory.write_obj(!byte, at).unwrap();
    let found = changed(&machine, &known);
    eprintln!("{} others: {found:?}", found.len());
    assert!(
        found.iter().any(|(_, _, what)| what.contains(STILL)),
        "{found:?}"
    );
    memory.write_obj(byte, at).unwrap();
    let found = changed(&machine, &known);
    assert!(
        !found.iter().any(|(_, _, what)| what.contains(STILL)),
        "{found:?}"
    );
    machine.forget_mark("still");
    machine.assert_healthy();
}
