//! Memory that calls have written since a mark.

use std::collections::BTreeMap;
use std::time::Duration;

use isolation::attach::plan::Wanted;

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

/// `incb (%rdi); ret`: an interface's first byte, which is its driver's to write.
const CHANGES: &[u8] = &[0xfe, 0x07, 0xc3];

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn what_a_call_has_written_is_told_from_what_it_writes_in_other_runs() {
    let mut machine = booted();
    machine.load("dummy", "numdummies=1");
    machine.isolate("dummy", Wanted::All).unwrap();
    machine.mark("still");
    let mut known = BTreeMap::new();
    assert!(changed(&machine, &known).is_empty(), "from now on");
    let work = |machine: &mut Machine| machine.run("ethtool -i dummy0 >/dev/null; true");
    for _ in 0..3 {
        work(&mut machine);
        let found = changed(&machine, &known);
        eprintln!("in a run like others: {found:?}");
        known.extend(found.into_iter().map(|(start, end, _)| (start, end)));
    }
    let inject = |machine: &Machine, code: &[u8]| {
        let isolator = &machine.isolator;
        isolator
            .inject("dummy", "dummy_get_drvinfo", 5, code)
            .unwrap()
    };
    let before = changed(&machine, &known);
    let original = inject(&machine, CHANGES);
    work(&mut machine);
    let found = changed(&machine, &known);
    eprintln!("{before:?}, and with other code {found:?}");
    let interface = |what: &str| what.contains(" object at ") && what.ends_with("+ 0x0");
    let is_there = |found: &[(u64, u64, String)]| found.iter().any(|(_, _, what)| interface(what));
    assert!(
        !is_there(&before) && is_there(&found),
        "{before:?} {found:?}"
    );
    inject(&machine, &original);
    machine.forget_mark("still");
    machine.assert_healthy();
}
