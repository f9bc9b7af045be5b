//! Upgrades of a guest that is a double.

use std::sync::Arc;

use super::*;
use crate::asker::Nobody;
use crate::double::{DRIVER, Double, INSTALLED, build, request};
use crate::ladder::LadderConfig;

const LIMIT: Duration = Duration::from_secs(5);

fn start(isolated: bool) -> (Arc<Supervisor<Double>>, Double) {
    let guest = Double::new();
    let supervisor = Supervisor::start(guest.clone()).unwrap();
    if isolated {
        supervisor
            .isolate(request(), LadderConfig::default(), &Nobody)
            .unwrap();
    }
    guest.world().done.clear();
    (supervisor, guest)
}

fn upgrade_to(supervisor: &Supervisor<Double>, file: &[u8]) -> anyhow::Result<UpgradeReport> {
    supervisor.upgrade(DRIVER, file, LIMIT, &Nobody)
}

#[test]
fn another_build_takes_the_place_with_configuration_and_isolation() {
    let (supervisor, guest) = start(true);
    let report = upgrade_to(&supervisor, &build(2)).unwrap();
    assert_eq!(report.outcome, UpgradeOutcome::New, "{report:?}");
    assert_eq!(report.old_build, "01".repeat(20));
    assert_eq!(report.new_build, "02".repeat(20));
    assert_eq!(
        (report.isolated, report.interfaces),
        (1, vec!["eth0".to_owned()])
    );
    assert!(report.problems.is_empty());
    let world = guest.world();
    assert_eq!(world.loaded, Some(build(2)));
    assert_eq!((world.mtu, world.up, world.link_held), (1400, true, false));
    assert!(world.policy.is_some());
}

#[test]
fn what_was_upgraded_is_what_a_restart_inserts_until_the_guest_is_reset() {
    let (supervisor, guest) = start(true);
    upgrade_to(&supervisor, &build(2)).unwrap();
    let path = supervisor.driver_file(DRIVER).unwrap();
    // The file of the one that runs stays, that of the one before goes.
    upgrade_to(&supervisor, &build(3)).unwrap();
    let next = supervisor.driver_file(DRIVER).unwrap();
    assert_ne!(path, next);
    assert_eq!(guest.world().files.get(&next), Some(&build(3)));
    assert!(!guest.world().files.contains_key(&path));
    assert!(guest.world().files.contains_key(INSTALLED));
    supervisor.guest_was_reset();
    assert_eq!(supervisor.driver_file(DRIVER), None);
}

#[test]
fn a_new_driver_that_cannot_be_inserted_gives_way_to_the_old_one() {
    let (supervisor, guest) = start(true);
    guest.world().fails = |step, _| step.starts_with("insert /run");
    let report = upgrade_to(&supervisor, &build(2)).unwrap();
    assert_eq!(report.outcome, UpgradeOutcome::Old, "{report:?}");
    assert_eq!((report.isolated, report.problems.len()), (1, 1));
    let world = guest.world();
    assert_eq!(world.loaded, Some(build(1)));
    assert_eq!((world.mtu, world.up, world.link_held), (1400, true, false));
    assert_eq!(world.files.len(), 2, "the new file is gone");
    // Restored as the old one had left it: 7 in use, 8 when it was gone; and the old one came once
    // more.
    assert_eq!(world.device, 9);
    assert!(world.done.contains(&"restore device".to_owned()));
}

#[test]
fn a_new_driver_without_a_link_gives_way_in_its_limit() {
    let (supervisor, guest) = start(false);
    guest.world().no_link.push(build(2));
    let report = upgrade_to(&supervisor, &build(2)).unwrap();
    assert_eq!(report.outcome, UpgradeOutcome::Old);
    assert!(report.problems[0].contains("has no link"), "{report:?}");
    let waited = guest.world().now;
    assert!(waited >= LIMIT && waited < LIMIT * 2, "{waited:?}");
    assert_eq!(report.isolated, 0, "it was not isolated before");
    assert!(guest.world().policy.is_none());
}

#[test]
fn a_driver_that_cannot_be_removed_stays_as_it_was() {
    let (supervisor, guest) = start(true);
    guest.world().fails = |step, _| step == "remove";
    let error = format!("{:#}", upgrade_to(&supervisor, &build(2)).unwrap_err());
    assert!(error.contains("driver cannot be removed"), "{error}");
    let world = guest.world();
    assert!(world.policy.is_some() && !world.link_held);
    assert_eq!(world.loaded, Some(build(1)));
    assert_eq!(world.files.len(), 2, "the new file is gone");
}

#[test]
fn where_neither_driver_can_be_inserted_the_report_says_so() {
    let (supervisor, guest) = start(true);
    guest.world().fails = |step, _| step.starts_with("insert");
    let report = upgrade_to(&supervisor, &build(2)).unwrap();
    assert_eq!(
        (report.outcome, report.isolated),
        (UpgradeOutcome::Neither, 0)
    );
    assert_eq!(report.problems.len(), 2, "{report:?}");
    assert!(!guest.world().link_held);
}

#[test]
fn nothing_is_touched_for_a_file_that_does_not_fit() {
    let (supervisor, guest) = start(true);
    let other_kernel = crate::double::module_file::module(DRIVER, "vermagic=6.2\0", &[2; 20]);
    let other_module = crate::double::module_file::module("veth", "vermagic=6.1 SMP\0", &[2; 20]);
    for file in [&other_kernel[..], &other_module, b"no module"] {
        upgrade_to(&supervisor, file).unwrap_err();
    }
    let long = supervisor.upgrade(DRIVER, &build(2), Duration::from_secs(61), &Nobody);
    assert!(long.unwrap_err().to_string().contains("not sensible"));
    assert!(guest.world().done.is_empty());
}

#[test]
fn a_driver_that_runs_and_whose_file_is_not_there_is_not_exchanged() {
    let (supervisor, guest) = start(true);
    guest.world().files.insert(INSTALLED.to_owned(), build(9));
    let error = format!("{:#}", upgrade_to(&supervisor, &build(2)).unwrap_err());
    assert!(
        error.contains("is not the build of driver that runs"),
        "{error}"
    );
    assert!(guest.world().done.is_empty());
}

#[test]
fn the_new_file_never_lies_where_the_old_one_does() {
    let first = new_path("e1000", "/lib/modules/6.1/e1000.ko");
    let second = new_path("e1000", &first);
    assert_ne!(first, second);
    assert_eq!(new_path("e1000", &second), first);
}
