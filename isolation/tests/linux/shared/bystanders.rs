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

/// `ret`, in place of what an interface's per-CPU memory is given back by.
const NOTHING: &[u8] = &[0xc3];

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn what_calls_have_changed_of_the_kernels_is_told_from_what_they_change_in_other_runs() {
    let mut machine = booted();
    machine.load("dummy", "numdummies=0");
    machine.isolate("dummy", Wanted::All).unwrap();
    machine.mark("still");
    let mut known = BTreeMap::new();
    assert!(changed(&machine, &known).is_empty(), "from now on");
    let work = |machine: &mut Machine| {
        machine.run("/bin/ip link add dummy5 type dummy && /bin/ip link del dummy5")
    };
    for _ in 0..4 {
        work(&mut machine);
        let found = changed(&machine, &known);
        eprintln!("in a run like others: {found:?}");
        known.extend(found.into_iter().map(|(start, end, _)| (start, end)));
    }
    let inject = |machine: &Machine, code: &[u8]| {
        let isolator = &machine.isolator;
        isolator
            .inject("dummy", "dummy_dev_uninit", 5, code)
            .unwrap()
    };
    let before = changed(&machine, &known);
    let original = inject(&machine, NOTHING);
    work(&mut machine);
    let found = changed(&machine, &known);
    eprintln!("{before:?}, and where nothing is given back {found:?}");
    assert!(before.is_empty() && !found.is_empty());
    inject(&machine, &original);
    machine.forget_mark("still");
    machine.assert_healthy();
}
