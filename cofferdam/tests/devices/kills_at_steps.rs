//! What is killed in the middle of a switch, before each of its steps, takes nothing else with it.

use std::process::Child;

use cofferdam::device::protocol::{Reason, Request};
use recovery::switch::{Outcome, Step, StepFailed};

use crate::common::place::{Place, end, finish, signal};
use crate::guest::{Guest, wait};
use crate::host::{FAR, Far, Hold, Host};

/// Asks for a switch to `to`, and does something when it has come to `step`. What is answered is
/// the host's to choose.
fn amid(place: &Place, host: &Host, to: &str, step: Step, act: impl FnOnce()) {
    let hold = Hold::at(place, step);
    std::thread::scope(|scope| {
        let asks = scope.spawn(|| host.ask(&Request::Switch { to: to.into() }).is_ok());
        hold.wait();
        act();
        drop(hold);
        asks.join().unwrap();
    });
}

fn kill(mut vm: Child) {
    vm.kill().unwrap();
    vm.wait().unwrap();
}

/// What `device status` says of a switch: from whom, to whom, why, and what failed.
type Said = (Option<String>, Option<String>, Reason, Option<StepFailed>);

/// A switch that was done, as it is said.
fn done(from: &str, to: &str, reason: Reason) -> Said {
    (Some(from.to_owned()), Some(to.to_owned()), reason, None)
}

/// Of the switches after the first so many.
fn said(host: &Host, after: u64) -> Vec<Said> {
    let switches = host.status().switches.into_iter();
    let new = switches.filter(|switch| switch.number > after);
    new.map(|switch| {
        let failed = match switch.outcome {
            Outcome::Switched {} => None,
            Outcome::Back { failed } => Some(failed),
            outcome @ Outcome::Nobody { .. } => panic!("{outcome:?}"),
        };
        (switch.from, switch.to, switch.reason, failed)
    })
    .collect()
}

/// The guest has the turn, and frames come through both ways.
fn assert_works(host: &Host, far: &mut Far, guest: &mut Guest, name: &str, text: &str) {
    host.await_turn(Some(name));
    guest.await_link(true);
    guest.send(FAR, text);
    assert_eq!(far.receive(), text);
    far.send(guest.mac, text);
    assert_eq!(guest.await_frame().1, text);
    assert_eq!(host.context(name).dma_bytes, crate::guest::MEMORY, "{text}");
}

/// Kills a VM in the middle of a switch. The host has no memory of it any more, and knows that
/// before the switch goes on, if it is the one that is to get the turn: the NIC of the other one is
/// held then.
fn kill_amid(place: &Place, host: &Host, to: &str, step: Step, (name, vm): (&str, Child)) {
    let its_end = || {
        wait("its end", || !host.context(name).connected);
        assert_eq!(host.context(name).dma_bytes, 0, "{name}, {step}");
    };
    amid(place, host, to, step, || {
        kill(vm);
        if name == to {
            its_end();
        }
    });
    its_end();
}

/// With a bystander that has nothing to do with it.
#[test]
fn a_vm_that_is_killed_at_any_step_leaves_a_device_that_the_other_one_has() {
    let place = Place::new();
    let host = Host::start_held(&place);
    let mut far = Far::connect(&place);
    let kernel = place.idle_kernel();
    let start = |name: &str| {
        let vm = place.start(name, &kernel, "--memory 32M --nic device=nic");
        wait("its attachment", || {
            host.context_of(name).is_some_and(|one| one.connected)
        });
        vm
    };
    // Their contexts come first: of whoever goes with the turn, the bystander is not the next.
    drop([("old", 1), ("new", 2)].map(|(vm, mac)| Guest::boot(&place, vm, mac)));
    let mut bystander = Guest::boot(&place, "bystander", 3);
    for step in Step::ALL {
        let old = start("old");
        if host.status().turn.as_deref() != Some("old") {
            host.switch("old");
        }
        let mut new = Guest::boot(&place, "new", 2);
        let before = host.status().switch_count;
        kill_amid(&place, &host, "new", step, ("old", old));
        // Its part is done by the device alone, wherever it stops.
        assert_works(&host, &mut far, &mut new, "new", &format!("old, {step}"));
        assert_eq!(
            said(&host, before),
            [done("old", "new", Reason::Asked)],
            "old, {step}"
        );
        // And the other way round: it has it, and whoever is to get it dies.
        let next = start("next");
        let before = host.status().switch_count;
        kill_amid(&place, &host, "next", step, ("next", next));
        assert_works(&host, &mut far, &mut new, "new", &format!("next, {step}"));
        let asked = done("new", "next", Reason::Asked);
        let expected = match step {
            Step::Prepare | Step::Quiesce | Step::Save | Step::Unmap | Step::Map => {
                let failed = StepFailed {
                    step: Step::Map,
                    reason: "next has gone".to_owned(),
                };
                vec![(asked.0, asked.1, asked.2, Some(failed))]
            }
            // It had been there when it was asked; who comes after it has it.
            Step::Load | Step::Resume | Step::Complete => {
                vec![asked, done("next", "new", Reason::Gone)]
            }
        };
        assert_eq!(said(&host, before), expected, "next, {step}");
        host.switch("bystander");
        let text = format!("bystander, {step}");
        assert_works(&host, &mut far, &mut bystander, "bystander", &text);
        drop(new);
        wait("new's end", || !host.context("new").connected);
    }
    assert_eq!(host.status().failed_switches, 5);
    let frames = host.context("bystander").frames;
    let turns = Step::ALL.len() as u64;
    assert_eq!((frames.sent, frames.received), (turns, turns));
}

/// A VM that is paused while it is being given the turn does not keep it.
#[test]
fn a_vm_that_comes_to_rest_at_any_step_passes_on_what_it_was_about_to_get() {
    let place = Place::new();
    let host = Host::start_held(&place);
    let _old = Guest::boot(&place, "old", 1);
    let _new = Guest::boot(&place, "new", 2);
    for step in Step::ALL {
        host.await_turn(Some("old"));
        let before = host.status().switch_count;
        std::thread::scope(|scope| {
            amid(&place, &host, "new", step, || {
                // Answered when the switch is over.
                scope.spawn(|| host.ask(&Request::Yield { vm: "new".into() }).unwrap());
                wait("new's rest", || host.context("new").away);
            });
        });
        assert_eq!(host.status().turn.as_deref(), Some("old"), "{step}");
        let expected = [
            done("old", "new", Reason::Asked),
            done("new", "old", Reason::Yielded),
        ];
        assert_eq!(said(&host, before), expected, "{step}");
        host.ask(&Request::Return { vm: "new".into() }).unwrap();
    }
}

#[test]
fn a_host_that_is_killed_at_any_step_takes_no_vm_with_it() {
    let place = Place::new();
    let kernel = place.idle_kernel();
    let start = |name: &str| place.start(name, &kernel, "--memory 32M --nic device=nic");
    let mut host = Host::start_held(&place);
    let vms = [start("left"), start("right")];
    for step in Step::ALL {
        wait("both", || {
            ["left", "right"]
                .iter()
                .all(|vm| host.context_of(vm).is_some_and(|one| one.connected))
        });
        let turn = host.status().turn.unwrap();
        let to = if turn == "left" { "right" } else { "left" };
        let pid = host.child.id();
        amid(&place, &host, to, step, || {
            // SAFETY: a plain system call on a process of this test's own.
            assert_eq!(unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) }, 0);
        });
        host.child.wait().unwrap();
        for name in ["left", "right"] {
            let status = place.ask(&format!("status {name} --json"));
            assert!(status.contains("\"running\""), "{step}: {status}");
        }
        drop(host);
        host = Host::start_held(&place);
    }
    let [left, right] = vms;
    signal(&left, libc::SIGTERM);
    finish(left);
    end(&place, right, &[".devices"]);
}
