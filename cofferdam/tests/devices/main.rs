//! A NIC that guests share by turns, as its users see it: guests that attach, switches, what goes
//! away and comes back. The guests are hand-made vfio-user clients with a driver of a page, or VMs
//! that do nothing.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

mod at_once;
#[path = "../common/mod.rs"]
mod common;
mod guest;
mod hellos;
mod host;
mod kills;
mod kills_at_steps;
mod marks;
#[path = "../../../vmm/tests/nic/mod.rs"]
mod nic;
mod snapshots;
mod words;

use cofferdam::device::protocol::{Reason, Request};
use common::place::Place;
use guest::{Guest, wait};
use host::{FAR, Far, Host};
use recovery::switch::Outcome;

const GROUP: [u8; 6] = [0xff; 6];

/// Five hundred switches, with frames both ways in each turn.
#[test]
fn frames_are_the_ones_of_whoever_has_the_turn_and_nobody_has_anothers() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    let mut guests = [("left", 1), ("right", 2)].map(|(vm, mac)| Guest::boot(&place, vm, mac));
    assert!(guests[0].info.turn && !guests[1].info.turn);
    assert_eq!(guests[0].info.model, "e1000");
    let names = ["left", "right"];
    for round in 0..500 {
        let turn = round % 2;
        let parked = 1 - turn;
        if round > 0 {
            let record = host.switch(names[turn]);
            assert_eq!(record.outcome, Outcome::Switched {});
            assert_eq!(record.from.as_deref(), Some(names[parked]));
        }
        guests[turn].await_link(true);
        let sent = guests[turn].send(FAR, &format!("from-{}-{round}", names[turn]));
        assert_eq!(far.receive(), format!("from-{}-{round}", names[turn]));
        guests[turn].await_sent(sent);
        far.send(guests[parked].mac, &format!("for-{}-lost", names[parked]));
        far.send(guests[turn].mac, &format!("for-{}-{round}", names[turn]));
        far.send(GROUP, &format!("all-{round}"));
        let (mac, text) = guests[turn].await_frame();
        assert_eq!(
            (mac, text),
            (guests[turn].mac, format!("for-{}-{round}", names[turn]))
        );
        assert_eq!(guests[turn].await_frame(), (GROUP, format!("all-{round}")));
        assert_eq!(guests[turn].receive(), None);
        assert_eq!(guests[parked].receive(), None);
    }
    guests[0].await_link(false);
    for (own, other) in [(0, 1), (1, 0)] {
        let for_other = format!("for-{}", names[other]);
        assert!(!guests[own].has_in_memory(for_other.as_bytes()));
        let own_lost = format!("for-{}-lost", names[own]);
        assert!(!guests[own].has_in_memory(own_lost.as_bytes()));
        let frames = host.context(names[own]).frames;
        assert_eq!(
            (frames.sent, frames.received, frames.turns),
            (250, 500, 250)
        );
        assert_eq!(
            (frames.lost_while_parked, frames.refused_as_anothers),
            (250, 250)
        );
    }
    let status = host.status();
    assert_eq!((status.switch_count, status.failed_switches), (500, 0));
    assert!(
        status
            .switches
            .iter()
            .all(|switch| switch.outage_ns.is_some())
    );
}

#[test]
fn frames_wait_for_a_stalled_guest_both_ways() {
    let place = Place::new();
    let host = Host::start(&place, "--parked stall");
    let mut far = Far::connect(&place);
    let mut left = Guest::boot(&place, "left", 1);
    let mut right = Guest::boot(&place, "right", 2);
    // Where the machine was so busy that the guest had waited too long, it is tried again.
    for round in 0..50 {
        // It has it already where this is tried again.
        let _ = host.ask(&Request::Switch { to: "right".into() });
        right.await_link(true);
        let before = host.context("right").frames;
        host.switch("left");
        let descriptor = right.send(FAR, &format!("waits-{round}"));
        far.send(right.mac, "waits too");
        far.send(left.mac, "goes");
        assert_eq!(left.await_frame().1, "goes");
        let waited_in_ring = !right.is_sent(descriptor);
        host.switch("right");
        let after = host.context("right").frames;
        let in_time = waited_in_ring
            && after.waited > before.waited
            && after.lost_after_wait == before.lost_after_wait;
        if !in_time {
            while right.receive().is_some() {}
            continue;
        }
        assert_eq!(right.await_frame().1, "waits too");
        while far.receive() != format!("waits-{round}") {}
        right.await_sent(descriptor);
        let frames = host.context("right").frames;
        assert!(frames.delivered_after_wait > 0);
        return;
    }
    panic!("never in time");
}

/// Linux resets a card that has lost its link with frames in its ring; there is nothing to reset it
/// for.
#[test]
fn what_a_parked_guest_sends_is_lost_and_does_not_stay_in_its_ring() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    let mut left = Guest::boot(&place, "left", 1);
    let _right = Guest::boot(&place, "right", 2);
    left.await_link(true);
    host.switch("right");
    for n in 0..300 {
        let sent = left.send(FAR, &format!("lost-{n}"));
        left.await_sent(sent);
    }
    assert!(!left.link());
    host.switch("left");
    left.await_link(true);
    left.send(FAR, "not lost");
    assert_eq!(far.receive(), "not lost");
    assert_eq!(host.context("left").frames.sent_without_carrier, 300);
}

#[test]
fn the_turn_is_passed_on_by_time_and_held() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let _guests = [("a", 1), ("b", 2), ("c", 3)].map(|(vm, mac)| Guest::boot(&place, vm, mac));
    assert!(host.ask(&Request::Every { ms: 0 }).is_err());
    host.ask(&Request::Every { ms: 5 }).unwrap();
    wait("ten slices", || host.status().switch_count > 10);
    host.ask(&Request::Hold {}).unwrap();
    // One may be under way.
    host.ask(&Request::Yield { vm: "a".into() }).unwrap();
    let status = host.status();
    let slices: Vec<_> = status
        .switches
        .iter()
        .filter(|switch| switch.reason == Reason::Slice)
        .collect();
    assert!(slices.len() > 8);
    for pair in slices.windows(2) {
        assert_eq!(pair[0].to, pair[1].from);
        let next = match pair[1].from.as_deref() {
            Some("a") => "b",
            Some("b") => "c",
            _ => "a",
        };
        assert_eq!(pair[1].to.as_deref(), Some(next));
    }
    assert_eq!(status.every_ms, None);
}

/// A guest that is paused gives its turn up and gets none until it goes on.
#[test]
fn a_guest_at_rest_is_not_given_the_turn() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let _left = Guest::boot(&place, "left", 1);
    let right = Guest::boot(&place, "right", 2);
    host.ask(&Request::Yield { vm: "left".into() }).unwrap();
    assert_eq!(host.status().turn.as_deref(), Some("right"));
    let refused = host
        .ask(&Request::Switch { to: "left".into() })
        .unwrap_err();
    assert!(refused.to_string().contains("left is paused"), "{refused}");
    host.ask(&Request::Yield { vm: "right".into() }).unwrap();
    assert_eq!(host.status().turn, None);
    // Nobody wants it.
    host.ask(&Request::Return { vm: "left".into() }).unwrap();
    assert_eq!(host.status().turn.as_deref(), Some("left"));
    host.ask(&Request::Return { vm: "right".into() }).unwrap();
    assert_eq!(host.status().turn.as_deref(), Some("left"));
    drop(right);
    wait("right's end", || !host.context("right").connected);
    let refused = host
        .ask(&Request::Switch { to: "right".into() })
        .unwrap_err();
    assert!(
        refused.to_string().contains("is not attached to nic now"),
        "{refused}"
    );
}

/// A VM that comes back has its context again, with all that its NIC was, and the NIC reaches no
/// memory until it is allowed to.
#[test]
fn who_comes_back_has_its_context_again_and_no_dma_before_it_says_so() {
    let place = Place::new();
    let host = Host::start(&place, "--on-exit keep");
    let mut far = Far::connect(&place);
    let mut left = Guest::boot(&place, "left", 1);
    left.await_link(true);
    let ring = left.ring();
    let mac = left.mac;
    drop(left);
    wait("left's end", || !host.context("left").connected);
    let context = host.context("left");
    assert_eq!(
        (context.dma_bytes, context.dma_maps, context.turn),
        (0, 0, true)
    );
    assert!(!context.carrier);
    far.send(mac, "nobody is there");
    let mut left = Guest::attach(&place, "left", 1, guest::MEMORY);
    assert!(left.info.returned && left.info.turn);
    assert_eq!(left.ring(), ring);
    assert_eq!(left.command() & 4, 0, "bus mastering is off");
    left.await_link(true);
    far.send(mac, "not yet");
    assert_eq!(left.receive(), None);
    assert!(!left.has_in_memory(b"not yet"));
    assert_eq!(host.context("left").dma_bytes, guest::MEMORY);
}

/// Nothing is left of two hundred attaches and switches.
#[test]
fn attaches_and_switches_leave_no_descriptor_and_no_thread() {
    let place = Place::new();
    let host = Host::start(&place, "--slots 3");
    let _left = Guest::boot(&place, "left", 1);
    let round = |n: u32| {
        // One that comes back, and others that take the place of those that have gone.
        let vm = if n.is_multiple_of(2) {
            "right".to_owned()
        } else {
            format!("guest{n}")
        };
        let guest = Guest::attach(&place, &vm, 2, guest::MEMORY);
        host.switch(&vm);
        host.switch("left");
        drop(guest);
        wait("its end", || !host.context(&vm).connected);
        // One that breaks off.
        drop(guest::connect(&place, &vm, 2));
        wait("its end", || !host.context(&vm).connected);
    };
    for n in 0..4 {
        round(n);
    }
    let settled = |before: Option<(usize, usize)>| {
        let mut now = host.resources();
        // Threads of connections to the control socket end a moment after their connections.
        for _ in 0..500 {
            if before.is_none_or(|before| now.0 <= before.0 && now.1 <= before.1) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
            now = host.resources();
        }
        now
    };
    std::thread::sleep(std::time::Duration::from_millis(100));
    let before = settled(None);
    for n in 4..104 {
        round(n);
    }
    let after = settled(Some(before));
    assert!(
        after.0 <= before.0 && after.1 <= before.1,
        "{before:?} {after:?}"
    );
    assert_eq!(host.status().failed_switches, 0);
}

/// The steps are the same few whatever memory a guest has. How long they take is printed.
#[test]
fn a_switch_does_not_touch_a_guests_memory() {
    for mib in [256, 2048] {
        let place = Place::new();
        let host = Host::start(&place, "");
        let mut far = Far::connect(&place);
        let mut guests = [("left", 1), ("right", 2)]
            .map(|(vm, mac)| Guest::boot_with(&place, vm, mac, mib << 20));
        let messages = |host: &Host| host.context("left").messages.unwrap();
        let (mut totals, mut firsts) = (Vec::new(), Vec::new());
        for round in 0..100 {
            let turn = (round + 1) % 2;
            let before = messages(&host);
            let record = host.switch(["left", "right"][turn]);
            assert_eq!(messages(&host), before, "nothing is asked of a guest");
            totals.push(record.phases.total_ns());
            // The frame waits in the ring until the link is up.
            guests[turn].send(FAR, "first");
            assert_eq!(far.receive(), "first");
            firsts.push(
                host.status()
                    .switches
                    .last()
                    .unwrap()
                    .first_frame_ns
                    .unwrap(),
            );
        }
        assert_eq!(host.context("left").dma_bytes, mib << 20);
        totals.sort_unstable();
        firsts.sort_unstable();
        println!(
            "{mib} MiB: switch p50 {} ns, p99 {} ns; first frame p50 {} ns",
            totals[50], totals[98], firsts[50]
        );
    }
}
