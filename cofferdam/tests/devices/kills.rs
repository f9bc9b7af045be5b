//! What is killed takes nothing else with it.

use crate::common::place::{Place, end, finish, signal};
use crate::guest::{Guest, wait};
use crate::host::{FAR, Far, Host};

#[test]
fn a_vm_that_is_killed_with_the_turn_passes_it_on_and_a_parked_one_leaves_it() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    let kernel = place.idle_kernel();
    let start = |name: &str| place.start(name, &kernel, "--memory 32M --nic device=nic");
    let (mut first, mut second) = (start("first"), start("second"));
    host.await_turn(Some("first"));
    let mut right = Guest::boot(&place, "right", 2);
    second.kill().unwrap();
    second.wait().unwrap();
    wait("second's end", || !host.context("second").connected);
    assert_eq!(host.status().turn.as_deref(), Some("first"));
    first.kill().unwrap();
    first.wait().unwrap();
    host.await_turn(Some("right"));
    let status = host.status();
    let last = status.switches.last().unwrap();
    assert_eq!(
        (last.from.as_deref(), last.reason.text()),
        (Some("first"), "VM gone")
    );
    for context in &status.contexts {
        let memory = if context.vm == "right" {
            crate::guest::MEMORY
        } else {
            0
        };
        assert_eq!(context.dma_bytes, memory, "{}", context.vm);
    }
    right.await_link(true);
    right.send(FAR, "goes on");
    assert_eq!(far.receive(), "goes on");
    // Its name is free again, and its context its own.
    let first = start("first");
    wait("first's context", || host.context("first").attached == 2);
    assert_eq!(host.status().turn.as_deref(), Some("right"));
    end(&place, first, &[".devices"]);
}

#[test]
fn a_vm_that_is_paused_passes_its_turn_on_and_is_given_none_until_it_goes_on() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let kernel = place.idle_kernel();
    let start = |name: &str| place.start(name, &kernel, "--memory 32M --nic device=nic");
    let (left, right) = (start("left"), start("right"));
    host.await_turn(Some("left"));
    place.ask("pause left");
    let status = host.status();
    assert_eq!(status.turn.as_deref(), Some("right"));
    assert_eq!(status.switches.last().unwrap().reason.text(), "VM at rest");
    place.ask_refused("switch nic --to left", "paused");
    place.ask("pause right");
    assert_eq!(host.status().turn, None);
    place.ask("resume left");
    assert_eq!(host.status().turn.as_deref(), Some("left"));
    place.ask("resume right");
    place.ask("switch nic --to right");
    assert_eq!(host.status().turn.as_deref(), Some("right"));
    signal(&left, libc::SIGTERM);
    finish(left);
    end(&place, right, &[".devices"]);
}

#[test]
fn a_device_host_that_is_killed_takes_no_vm_with_it_and_is_served_anew() {
    let place = Place::new();
    let mut host = Host::start(&place, "");
    let vm = place.idle("--memory 32M --nic device=nic");
    host.await_turn(Some("idle"));
    host.child.kill().unwrap();
    host.child.wait().unwrap();
    assert_eq!(place.status()["state"], "running");
    drop(host);
    let host = Host::start(&place, "");
    host.await_turn(Some("idle"));
    assert_eq!(host.context("idle").attached, 1);
    let output = place.ask("device stop nic");
    assert_eq!(output, "");
    assert_eq!(place.status()["state"], "running");
    end(&place, vm, &[".devices"]);
    assert!(finish_of(host));
}

/// To the new host it is one more VM that attaches, but for what it says.
#[test]
fn a_vm_that_is_paused_keeps_no_turn_at_a_host_that_begins_anew() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let vm = place.idle("--memory 32M --nic device=nic");
    host.await_turn(Some("idle"));
    place.ask("pause idle");
    drop(host);
    let host = Host::start(&place, "");
    wait("its rest", || {
        host.context_of("idle").is_some_and(|idle| idle.away)
    });
    host.await_turn(None);
    place.ask("resume idle");
    assert_eq!(host.status().turn.as_deref(), Some("idle"));
    end(&place, vm, &[".devices"]);
}

/// Nobody waits for it: what is given to it waits for it, what is taken from it is its own still.
#[test]
fn a_vm_whose_process_is_stopped_holds_up_no_switch() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    let stopped = place.idle("--memory 32M --nic device=nic");
    host.await_turn(Some("idle"));
    let mut right = Guest::boot(&place, "right", 2);
    signal(&stopped, libc::SIGSTOP);
    for round in 0..3 {
        host.switch("right");
        right.await_link(true);
        let text = format!("round-{round}");
        right.send(FAR, &text);
        assert_eq!(far.receive(), text);
        host.switch("idle");
    }
    signal(&stopped, libc::SIGCONT);
    assert_eq!(place.status()["state"], "running");
    assert_eq!(host.status().failed_switches, 0);
    end(&place, stopped, &[".devices"]);
}

/// Whether the device host has ended in order.
fn finish_of(mut host: Host) -> bool {
    let child = std::mem::replace(
        &mut host.child,
        std::process::Command::new("true").spawn().unwrap(),
    );
    finish(child).status.success()
}

/// Clients come and go at random while switches are asked for: whoever is left has the turn.
#[test]
fn clients_that_go_in_the_middle_of_switches_leave_a_device_that_works() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    for round in 0..30 {
        let mut left = Guest::boot(&place, "left", 1);
        let right = Guest::boot(&place, "right", 2);
        std::thread::scope(|scope| {
            let goes = scope.spawn(move || drop(right));
            for _ in 0..4 {
                // Refused where it has gone already, or has it.
                for to in ["right", "left"] {
                    let request = cofferdam::device::protocol::Request::Switch { to: to.into() };
                    let _ = host.ask(&request);
                }
            }
            goes.join().unwrap();
        });
        host.await_turn(Some("left"));
        left.await_link(true);
        let text = format!("round-{round}");
        left.send(FAR, &text);
        assert_eq!(far.receive(), text);
        far.send(left.mac, &text);
        assert_eq!(left.await_frame().1, text);
        drop(left);
        host.await_turn(None);
    }
}
