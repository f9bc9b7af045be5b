//! What is killed in the middle of a switch, before each of its steps, takes nothing else with it.

use std::process::Child;

use cofferdam::device::protocol::Request;
use recovery::switch::Step;

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

/// The guest has the turn, and frames come through both ways; the VM that was killed has no memory
/// at the host any more.
fn assert_works(
    host: &Host,
    far: &mut Far,
    guest: &mut Guest,
    name: &str,
    killed: &str,
    text: &str,
) {
    host.await_turn(Some(name));
    wait("the end of who was killed", || {
        !host.context(killed).connected
    });
    host.await_turn(Some(name));
    assert_eq!(host.context(killed).dma_bytes, 0, "{text}");
    guest.await_link(true);
    guest.send(FAR, text);
    assert_eq!(far.receive(), text);
    far.send(guest.mac, text);
    assert_eq!(guest.await_frame().1, text);
}

#[test]
fn a_vm_that_is_killed_at_any_step_leaves_a_device_that_the_other_one_has() {
    let place = Place::new();
    let host = Host::start_held(&place);
    let mut far = Far::connect(&place);
    let kernel = place.idle_kernel();
    let start = |name: &str| place.start(name, &kernel, "--memory 32M --nic device=nic");
    for step in Step::ALL {
        let old = start("old");
        host.await_turn(Some("old"));
        let mut new = Guest::boot(&place, "new", 2);
        amid(&place, &host, "new", step, || kill(old));
        assert_works(
            &host,
            &mut far,
            &mut new,
            "new",
            "old",
            &format!("old, {step}"),
        );
        // And the other way round: it has it, and whoever is to get it dies.
        let next = start("next");
        wait("next", || {
            host.context_of("next").is_some_and(|next| next.connected)
        });
        amid(&place, &host, "next", step, || kill(next));
        assert_works(
            &host,
            &mut far,
            &mut new,
            "new",
            "next",
            &format!("next, {step}"),
        );
        drop(new);
        host.await_turn(None);
    }
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
        std::thread::scope(|scope| {
            amid(&place, &host, "new", step, || {
                // Answered when the switch is over.
                scope.spawn(|| host.ask(&Request::Yield { vm: "new".into() }).unwrap());
                wait("new's rest", || host.context("new").away);
            });
        });
        assert_eq!(host.status().turn.as_deref(), Some("old"), "{step}");
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
