//! Processes that are killed or interrupted while they write or read a snapshot.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use crate::common::place::{Place, end, finish, signal};
use crate::filled::{self, is_under_way, partial, wait_until};

/// A snapshot that was there before, which has to stay whole.
fn older(place: &Place) -> String {
    let dir = place.path("older").display().to_string();
    place.ask(&format!("snapshot one {dir}"));
    dir
}

#[test]
fn what_a_killed_vm_has_written_is_refused_and_the_next_snapshot_succeeds() {
    let place = Place::new();
    let mut vm = filled::start(&place, "one");
    let (older, dir) = (older(&place), place.path("new"));
    let name = dir.display().to_string();
    for (round, mib) in [0, 1, 60, 120].into_iter().enumerate() {
        let words = ["snapshot", "one", &name];
        let old = partial(&dir);
        let asks = place.command().args(words).spawn().unwrap();
        assert!(is_under_way(&dir, mib, &old), "it was too fast");
        signal(&vm, libc::SIGKILL);
        assert_eq!(finish(vm).status.signal(), Some(libc::SIGKILL));
        let asked = finish(asks);
        let error = String::from_utf8(asked.stderr).unwrap();
        assert!(
            !asked.status.success() && error.lines().count() == 1,
            "{error}"
        );
        assert!(!dir.exists());
        let left = partial(&dir);
        assert_eq!(left.len(), round + 1, "{left:?}");
        for left in &left {
            let left = left.display().to_string();
            place.ask_refused(&format!("snapshot check {left}"), "is no snapshot");
            place.ask_refused(&format!("run --snapshot {left}"), "is no snapshot");
            place.ask_refused(&format!("snapshot merge {left} {name}"), "is no snapshot");
        }
        place.ask(&format!("snapshot check {older}"));
        // The folder of the VM that was killed is taken over.
        vm = filled::start(&place, "one");
    }
    place.ask(&format!("snapshot one {name}"));
    place.ask(&format!("snapshot check {name}"));
    end(&place, vm, &[]);
}

#[test]
fn a_vm_that_is_killed_while_it_goes_on_leaves_the_snapshot_whole() {
    let place = Place::new();
    let vm = filled::start(&place, "one");
    let dir = older(&place);
    end(&place, vm, &[]);
    let words = ["run", "--snapshot", &dir, "--serial", "control"];
    for lazily in [None, Some("--lazy")] {
        for wait_ms in [0, 5, 20, 50, 100, 150] {
            let mut command = place.command();
            let twin = command.args(words).args(lazily).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(wait_ms));
            signal(&twin, libc::SIGKILL);
            finish(twin);
        }
    }
    place.ask(&format!("snapshot check {dir}"));
    let twin = place.command().args(words).spawn().unwrap();
    place.wait_for("one");
    assert_eq!(place.status_of("one")["state"], "running");
    end(&place, twin, &[]);
}

#[test]
fn an_interrupted_snapshot_leaves_nothing_and_the_guest_goes_on() {
    let place = Place::new();
    let vm = filled::start(&place, "one");
    let older = older(&place);
    let mut given_up = 0;
    for (round, by) in [libc::SIGINT, libc::SIGTERM, libc::SIGINT]
        .into_iter()
        .enumerate()
    {
        let dir = place.path(&round.to_string());
        let words = ["snapshot", "one", &dir.display().to_string()];
        let asks = place.command().args(words).spawn().unwrap();
        assert!(is_under_way(&dir, 1, &[]), "it was too fast");
        signal(&asks, by);
        finish(asks);
        wait_until("nothing is left of it", || partial(&dir).is_empty());
        // The whole snapshot is there if that came too late.
        given_up += u32::from(!dir.exists());
        assert_eq!(place.status_of("one")["state"], "running");
    }
    assert!(given_up > 0);
    place.ask(&format!("snapshot check {older}"));
    let last = place.path("last").display().to_string();
    place.ask(&format!("snapshot one {last} --diff {older}"));
    place.ask(&format!("snapshot check {last}"));
    end(&place, vm, &[]);
}

#[test]
fn an_interrupted_merge_leaves_nothing() {
    let place = Place::new();
    let vm = filled::start(&place, "one");
    let older = older(&place);
    let diff = place.path("diff").display().to_string();
    place.ask(&format!("snapshot one {diff} --diff {older}"));
    end(&place, vm, &[]);
    let mut given_up = 0;
    for (round, by) in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP]
        .into_iter()
        .enumerate()
    {
        let into = place.path(&round.to_string());
        let words = ["snapshot", "merge", &diff, &into.display().to_string()];
        let merges = place.command().args(words).spawn().unwrap();
        assert!(is_under_way(&into, 1, &[]), "it was too fast");
        signal(&merges, by);
        let ended = finish(merges);
        assert_eq!(ended.status.signal(), Some(by), "{ended:?}");
        assert!(partial(&into).is_empty());
        given_up += u32::from(!into.exists());
    }
    assert!(given_up > 0);
    for dir in [&older, &diff] {
        place.ask(&format!("snapshot check {dir}"));
    }
    let whole = place.path("whole").display().to_string();
    place.ask(&format!("snapshot merge {diff} {whole}"));
    place.ask(&format!("snapshot check {whole}"));
}

#[test]
fn a_vm_that_is_interrupted_while_it_goes_on_ends_and_leaves_nothing() {
    let place = Place::new();
    let vm = filled::start(&place, "one");
    let dir = older(&place);
    end(&place, vm, &[]);
    let words = ["run", "--snapshot", &dir, "--serial", "control"];
    for wait_ms in [20, 40, 60, 80, 100, 140, 200] {
        let twin = place.command().args(words).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(wait_ms));
        signal(&twin, libc::SIGINT);
        let ended = finish(twin);
        assert_eq!(ended.status.signal(), Some(libc::SIGINT));
        let error = String::from_utf8(ended.stderr).unwrap();
        assert!(error.lines().count() <= 1, "{error}");
        place.assert_empty();
    }
    place.ask(&format!("snapshot check {dir}"));
}
