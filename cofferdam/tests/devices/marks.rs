//! Guests that are rewound to marks with a NIC of a device host: what the device has written to
//! their memory goes, and its state is the mark's again.

use std::os::unix::fs::FileExt;

use crate::common::place::{Place, end};
use crate::guest::{Guest, wait};
use crate::host::{FAR, Far, Host};
use crate::nic;
use crate::snapshots::{carry_on, folder, received, start};

/// What the device alone writes.
const WRITTEN: &str = "written by the device alone";

/// How often [`WRITTEN`] is in the guest's memory.
fn written(place: &Place, far: &mut Far, name: &str) -> usize {
    let dir = folder(place, name);
    saved(place, far, &format!("snapshot web {dir}"));
    let image = std::fs::File::open(place.path(name).join("memory.image")).unwrap();
    let mut bytes = vec![0; image.metadata().unwrap().len() as usize];
    image.read_exact_at(&mut bytes, 0).unwrap();
    std::fs::remove_dir_all(dir).unwrap();
    memchr::memmem::find_iter(&bytes, WRITTEN).count()
}

/// Has this done while the guest's frames are read, so that its wire is never full.
fn saved(place: &Place, far: &mut Far, words: &str) -> String {
    std::thread::scope(|scope| {
        let done = scope.spawn(|| place.ask(words));
        while !done.is_finished() {
            far.number();
        }
        done.join().unwrap()
    })
}

/// Eight frames reach the guest, as many as its ring has buffers.
fn fill(place: &Place, far: &mut Far) {
    let before = received(place, "web");
    for _ in 0..8 {
        far.send(nic::MAC, WRITTEN);
    }
    while received(place, "web") < before + 8 {
        far.number();
    }
}

/// Does this, by which the guest is rewound to a mark that it has gone on from, and gives the first
/// number that is sent from there.
fn rewind(place: &Place, far: &mut Far, words: &str) -> u64 {
    let mut last = far.number();
    carry_on(far, &mut last, 100);
    std::thread::scope(|scope| {
        let done = scope.spawn(|| place.ask(words));
        let first = loop {
            let next = far.number();
            if next != last + 2 {
                break next;
            }
            last = next;
        };
        let mut at = first;
        while !done.is_finished() {
            carry_on(far, &mut at, 1);
        }
        done.join().unwrap();
        first
    })
}

#[test]
fn a_guest_goes_back_to_its_marks_and_nothing_is_left_of_what_its_device_has_written() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    let vm = start(&place, "web");
    far.number();
    saved(&place, &mut far, "mark web empty");
    let until = [far.number(), 0];
    fill(&place, &mut far);
    assert_eq!(written(&place, &mut far, "before"), 8);
    saved(&place, &mut far, "mark web full");
    let until = [until[0], far.number()];
    let mut firsts = [Vec::new(), Vec::new()];
    for round in 0..6 {
        let which = [0, 0, 1, 1, 0, 1][round];
        let (mark, there) = [("empty", 0), ("full", 8)][which];
        firsts[which].push(rewind(&place, &mut far, &format!("rewind web {mark}")));
        assert_eq!(written(&place, &mut far, "after"), there, "round {round}");
        // Each frame once from there on, both ways.
        let mut number = far.number();
        carry_on(&mut far, &mut number, 50);
        fill(&place, &mut far);
        assert_eq!(host.context("web").attached, 1);
        assert_eq!(host.status().turn.as_deref(), Some("web"));
    }
    // The same frame is the next one each time: none was sent before the state was in place.
    for (firsts, until) in firsts.iter().zip(until) {
        assert!(
            firsts
                .iter()
                .all(|first| *first == firsts[0] && *first <= until)
        );
    }
    end(&place, vm, &[".devices"]);
}

#[test]
fn who_has_the_turn_is_not_rewound() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    let vm = start(&place, "web");
    far.number();
    saved(&place, &mut far, "mark web with");
    let mut left = Guest::boot(&place, "left", 9);
    host.switch("left");
    place.ask("mark web without");
    // The mark is of one that had the turn; now the other one has it.
    place.ask("rewind web with");
    assert_eq!(host.status().turn.as_deref(), Some("left"));
    left.await_link(true);
    left.send(FAR, "of the other one");
    while far.receive() != "of the other one" {}
    left.send(FAR, "and nothing in between");
    assert_eq!(far.receive(), "and nothing in between");
    host.switch("web");
    let mut number = far.number();
    carry_on(&mut far, &mut number, 50);
    // And the other way round.
    rewind(&place, &mut far, "rewind web without");
    assert_eq!(host.status().turn.as_deref(), Some("web"));
    number = far.number();
    carry_on(&mut far, &mut number, 50);
    fill(&place, &mut far);
    left.await_link(false);
    drop(left);
    end(&place, vm, &[".devices"]);
}

#[test]
fn without_its_device_a_guest_is_neither_marked_nor_rewound_and_goes_on() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    let vm = start(&place, "web");
    far.number();
    saved(&place, &mut far, "mark web here");
    let until = far.number();
    drop(far);
    drop(host);
    wait("the end of its device", || {
        let again = place.command().args(["mark", "web", "again"]).output();
        let has_gone = !again.unwrap().status.success();
        if !has_gone {
            place.ask("marks web --forget again");
        }
        has_gone
    });
    for words in ["mark web again", "rewind web here"] {
        place.ask_refused(words, "the device's server has gone");
    }
    assert_eq!(place.status_of("web")["state"], "running");
    // A new host's NIC was just powered on. With the mark's state it works, without a probe.
    let host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    host.await_turn(Some("web"));
    place.ask("rewind web here");
    let mut number = far.number();
    assert!(number <= until, "{number} after {until}");
    carry_on(&mut far, &mut number, 50);
    fill(&place, &mut far);
    end(&place, vm, &[".devices"]);
}
