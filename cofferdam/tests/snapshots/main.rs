//! Snapshots and marks as a user takes them, of a guest that does nothing: what is said, written
//! and refused.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

use std::process::Child;

use serde_json::Value;

#[path = "../common/mod.rs"]
mod common;
mod filled;
mod golden;
mod killed;
#[path = "../../../vmm/tests/nic/mod.rs"]
mod nic;
mod other_processor;
mod template;
mod wires;
mod working_set;

use common::place::{Place, end, finish};

fn json(place: &Place, words: &str) -> Value {
    serde_json::from_str(&place.ask(words)).unwrap()
}

/// A VM that goes on from a snapshot.
fn go_on(place: &Place, words: &str) -> Child {
    let mut words: Vec<_> = words.split(' ').collect();
    words.insert(0, "run");
    place.command().args(words).spawn().unwrap()
}

#[test]
fn a_guest_is_snapshotted_and_goes_on_under_two_names() {
    let place = Place::new();
    let vm = place.idle("--memory 32M");
    let path = |name: &str| place.path(name).display().to_string();
    let (full, diff, whole) = (path("full"), path("diff"), path("whole"));
    let said = place.ask(&format!("snapshot idle {full} --track"));
    assert!(said.contains("full snapshot"), "{said}");
    let taken = json(
        &place,
        &format!("snapshot idle {diff} --diff {full} --json"),
    );
    assert_eq!(taken["diff"], true);
    place.ask(&format!("snapshot check {diff}"));
    place.ask(&format!("snapshot merge {diff} {whole}"));
    let shown = json(&place, &format!("snapshot show {diff} --json"));
    assert_eq!(shown.as_array().unwrap().len(), 2);
    assert_eq!(shown[0]["manifest"]["id"], taken["id"]);
    assert_eq!(shown[0]["manifest"]["vm"]["name"], "idle");
    let shown = place.ask(&format!("snapshot show {whole}"));
    assert!(
        shown.contains("32 MiB") && shown.contains("full"),
        "{shown}"
    );

    place.ask_refused(&format!("snapshot idle {full}"), "is not empty");
    place.ask_refused(
        &format!("snapshot idle {}", path("not/there")),
        "cannot write",
    );
    place.ask_refused(
        &format!("snapshot idle {} --diff {}", path("x"), path("nothing")),
        "is no snapshot",
    );
    place.ask_refused("snapshot nobody /tmp/x", "no VM named");
    place.ask_refused(
        &format!("run --snapshot {full} --memory 64M"),
        "cannot be used with",
    );
    place.ask_refused(
        &format!("run --snapshot {full} --name x --net user"),
        "0 NICs",
    );
    assert_eq!(place.status()["state"], "running");

    let lazily = format!(
        "--snapshot {diff} --name lazy --lazy --serial file={}",
        path("l")
    );
    let eagerly = format!(
        "--snapshot {whole} --name eager --serial file={}",
        path("e")
    );
    let clones = [("lazy", lazily), ("eager", eagerly)].map(|(name, words)| {
        let clone = go_on(&place, &words);
        place.wait_for(name);
        assert_eq!(place.status_of(name)["state"], "running");
        clone
    });
    for (clone, others) in clones.into_iter().zip([&["eager", "idle"][..], &["idle"]]) {
        common::place::signal(&clone, libc::SIGTERM);
        finish(clone);
        let mut left = place.left();
        left.sort();
        assert_eq!(left, others);
    }

    place.ask(&format!("snapshot idle {} --stop", path("end")));
    assert!(finish(vm).status.success());
    place.ask(&format!("snapshot check {}", path("end")));
    place.assert_empty();
}

#[test]
fn a_paused_guest_is_saved_and_stays_paused() {
    let place = Place::new();
    let vm = place.idle("--memory 32M");
    let dir = place.path("s").display().to_string();
    place.ask("pause idle");
    place.ask(&format!("snapshot idle {dir}"));
    assert_eq!(place.status()["state"], "paused");
    let twin = go_on(
        &place,
        &format!("--snapshot {dir} --name twin --serial file={dir}.log"),
    );
    place.wait_for("twin");
    assert_eq!(place.status_of("twin")["state"], "running");
    end(&place, twin, &["idle"]);
    place.ask("resume idle");
    assert_eq!(place.status()["state"], "running");
    end(&place, vm, &[]);
}

#[test]
fn marks_are_set_shown_gone_back_to_and_forgotten() {
    let place = Place::new();
    let vm = place.idle("--memory 32M");
    assert!(place.ask("marks idle").contains("no marks"));
    place.ask_refused("rewind idle", "has no mark");
    assert!(place.ask("mark idle").starts_with("mark: "));
    assert_eq!(json(&place, "mark idle later --json")["parent"], "mark");
    place.ask_refused("mark idle later", "already");
    place.ask_refused("mark idle a/b", "is no name");
    place.ask_refused("rewind idle elsewhere", "there is no mark elsewhere");
    assert!(place.ask("rewind idle mark").starts_with("back at mark: "));
    let marks = json(&place, "marks idle --json");
    let current = |index: usize| marks[index]["current"].as_bool().unwrap();
    assert!(current(0) && !current(1), "{marks}");
    place.ask("pause idle");
    assert_eq!(json(&place, "rewind idle later --json")["mark"], "later");
    assert_eq!(place.status()["state"], "paused");
    place.ask("marks idle --forget mark");
    assert_eq!(
        json(&place, "marks idle --json").as_array().unwrap().len(),
        1
    );
    end(&place, vm, &[]);
}
