//! A device host whose function is one of registers in this process, behind real vfio-user
//! connections.

pub mod device;
pub mod guest;
mod keeps;
#[cfg(debug_assertions)]
mod kills_at_steps;
mod lost;
mod saved;
mod soak;

use std::sync::Arc;
use std::time::Duration;

use recovery::switch::{Outcome, Step};

use self::device::{
    CTRL, EIAC, GPTC, Goes, IMC, IMS, RAH, RAL, RCTL, RDBAL, RDH, RDT, RESET, STATUS, TCTL, TDT,
    TXQ0,
};
use self::guest::{Guest, MEMORY, connect, host, wait};
use super::PassedCard;
use crate::device::ParkedAs;
use crate::device::card::Card;
use crate::device::context::Context;
use crate::device::host::Host;
use crate::device::protocol::Reason;
use crate::options::MacAddress;

/// Link up.
const LINK: u32 = 2;
const TURNS: usize = 20;

fn station(guest: &mut Guest) -> [u8; 6] {
    let [a, b, c, d] = guest.read(RAL).to_le_bytes();
    let [e, f, ..] = guest.read(RAH).to_le_bytes();
    [a, b, c, d, e, f]
}

#[test]
fn two_guests_have_a_function_by_turns_and_each_finds_its_own() {
    let (host, device) = host(ParkedAs::Down, 8);
    let mut guests = [("left", 1), ("right", 2)].map(|(vm, mac)| Guest::boot(&host, vm, mac));
    assert!(guests[0].info.turn && !guests[1].info.turn);
    for turn in 0..TURNS {
        let (has, parked) = (turn % 2, 1 - turn % 2);
        if turn > 0 {
            let vm = ["left", "right"][has].parse().unwrap();
            let record = host.switch_to(&vm).unwrap();
            assert_eq!(record.outcome, Outcome::Switched {});
            assert!(record.phases.map_ns.is_some() && record.phases.save_ns.is_some());
        }
        {
            let state = device.lock();
            assert_eq!(state.get(RDBAL), guests[has].ring());
            assert_eq!(state.address(), guests[has].mac);
            assert!(state.masters);
            assert_eq!((state.mapped, state.goes), (MEMORY, Goes::Messages(5)));
        }
        for guest in &mut guests {
            assert_eq!(guest.read(RDBAL), guest.ring());
            assert_eq!(station(guest), guest.mac);
        }
        assert_eq!(guests[parked].read(STATUS) & LINK, 0);
        assert_eq!(guests[has].read(STATUS) & LINK, LINK);
        let tail = 1 + turn as u32;
        device.lock().sent.clear();
        guests[parked].send(100 + tail);
        assert_eq!(guests[parked].read(device::TDT), 100 + tail);
        guests[has].send(tail);
        assert_eq!(guests[has].read(device::TDT), tail);
        assert_eq!(device.lock().sent, [tail], "what the other one sends waits");
        // What was counted for one is not told the other.
        device.lock().registers.insert(GPTC, 7);
    }
    let status = host.status();
    assert_eq!(status.failed_switches, 0);
    assert_eq!(status.function.as_deref(), Some("0000:00:02.0"));
    assert_eq!(status.model, "82574L");
    let passed = status.contexts[0].passed.unwrap();
    assert_eq!(passed.turns, TURNS as u64 / 2);
    assert!(passed.accesses > 0 && passed.parked_accesses > 0);
}

/// Memory that comes is no reason to stop a device; what goes is not taken from under one that runs.
#[test]
fn a_device_works_on_while_memory_comes_and_stands_still_while_some_goes() {
    let (host, device) = host(ParkedAs::Down, 8);
    let mut left = Guest::boot(&host, "left", 1);
    let mut right = Guest::boot(&host, "right", 2);
    let still = device.lock().stood_still;
    left.give_more();
    assert_eq!(device.lock().mapped, 2 * MEMORY);
    assert_eq!(device.lock().stood_still, still);
    // That of a parked guest is in no map, until its turn.
    right.give_more();
    assert_eq!(device.lock().mapped, 2 * MEMORY);
    left.take_back();
    {
        let state = device.lock();
        assert_eq!((state.mapped, state.stood_still), (MEMORY, still + 1));
        assert!(state.masters);
    }
    left.send(3);
    assert_eq!(device.lock().sent.last(), Some(&3));
    host.switch_to(&"right".parse().unwrap()).unwrap();
    assert_eq!(device.lock().mapped, 2 * MEMORY);
    right.take_back();
    assert_eq!(device.lock().mapped, MEMORY);
}

#[test]
fn what_one_guest_has_counted_is_not_told_the_next() {
    let (host, device) = host(ParkedAs::Down, 8);
    let _left = Guest::boot(&host, "left", 1);
    let mut right = Guest::boot(&host, "right", 2);
    device.lock().registers.insert(GPTC, 7);
    host.switch_to(&"right".parse().unwrap()).unwrap();
    assert_eq!(right.read(GPTC), 0);
}

/// Packet memory has frames of whoever had the device before.
#[test]
fn no_guest_reaches_the_devices_packet_memory() {
    let (host, device) = host(ParkedAs::Down, 8);
    let mut left = Guest::boot(&host, "left", 1);
    let mut right = Guest::boot(&host, "right", 2);
    let (first, last) = (0x1_0000, 0x1_fffc);
    for vm in ["right", "left"] {
        host.switch_to(&vm.parse().unwrap()).unwrap();
        for guest in [&mut left, &mut right] {
            for at in [first, last] {
                device.lock().registers.insert(at, 0x6672_616d);
                assert_eq!(guest.read(at), 0);
                guest.write(at, 1);
                assert_eq!(device.lock().get(at), 0x6672_616d);
            }
        }
    }
    // What lies before it is the device's, for whoever has it.
    left.write(first - 4, 7);
    assert_eq!(device.lock().get(first - 4), 7);
}

#[test]
fn a_parked_guest_is_told_that_its_link_has_gone_and_looks_again_later() {
    let (host, device) = host(ParkedAs::Down, 8);
    let left = Guest::boot(&host, "left", 1);
    let _right = Guest::boot(&host, "right", 2);
    left.interrupts();
    device.lock().registers.insert(device::ICR, 0);
    host.switch_to(&"right".parse().unwrap()).unwrap();
    host.switch_to(&"left".parse().unwrap()).unwrap();
    // Link status change, among others: its driver looks at everything.
    assert_eq!(device.lock().get(device::ICR) & 4, 4);
}

/// Seen in the lab: what waited in a ring is sent as soon as the transmitter runs, before the mask
/// is put back; its cause is due then, and has masked itself when the mask is looked at.
#[test]
fn a_device_that_interrupts_as_soon_as_it_may_is_taken_over() {
    let (host, device) = host(ParkedAs::Stall, 8);
    let mut left = Guest::boot(&host, "left", 1);
    let _right = Guest::boot(&host, "right", 2);
    host.switch_to(&"right".parse().unwrap()).unwrap();
    left.send(9);
    left.interrupts();
    assert_eq!(left.read(IMS) & TXQ0, TXQ0);
    host.switch_to(&"left".parse().unwrap()).unwrap();
    assert_eq!(device.lock().sent.last(), Some(&9));
    assert_eq!(left.read(IMS) & TXQ0, 0);
    assert!(left.interrupts().contains(&2));
}

/// A cause that has masked itself, and whose message did not arrive before the device was made to
/// stand still, does not come again: its driver would wait for ever.
#[test]
fn an_interrupt_that_was_on_its_way_in_a_switch_is_made_up_for() {
    let (host, device) = host(ParkedAs::Down, 8);
    let mut left = Guest::boot(&host, "left", 1);
    let _right = Guest::boot(&host, "right", 2);
    let turns = |left: &mut Guest| {
        host.switch_to(&"right".parse().unwrap()).unwrap();
        left.interrupts();
        host.switch_to(&"left".parse().unwrap()).unwrap();
    };
    *device.lock().registers.get_mut(&IMS).unwrap() &= !TXQ0;
    turns(&mut left);
    assert_eq!(left.interrupts(), [0, 1, 2, 3, 4]);
    // A driver that has masked everything is not interrupted: it is about to give up its rings.
    left.write(IMC, u32::MAX);
    left.write(EIAC, 0);
    turns(&mut left);
    assert!(left.interrupts().is_empty());
}

#[test]
fn resets_by_drivers_bring_back_their_own_address_and_nothing_of_the_other() {
    let (host, device) = host(ParkedAs::Down, 8);
    let mut left = Guest::boot(&host, "left", 1);
    let mut right = Guest::boot(&host, "right", 2);
    left.write(CTRL, RESET);
    assert_eq!(station(&mut left), left.mac);
    assert_eq!(device.lock().address(), left.mac);
    assert_eq!(left.read(RDBAL), 0);
    right.write(CTRL, RESET);
    assert_eq!(station(&mut right), right.mac);
    assert_eq!(right.read(RDBAL), 0);
    let resets = device.lock().resets;
    host.switch_to(&"right".parse().unwrap()).unwrap();
    assert_eq!(device.lock().address(), right.mac);
    // A guest that begins anew while it is parked, and the one that has the device.
    left.reset();
    assert_eq!(device.lock().resets, resets);
    assert_eq!(device.lock().address(), right.mac);
    right.reset();
    assert!(device.lock().resets > resets);
    assert_eq!(device.lock().address(), right.mac);
    assert!(device.lock().mapped == 0 && !device.lock().masters);
}

#[test]
fn a_reset_that_the_device_does_in_part_is_done_whole() {
    let (host, device) = host(ParkedAs::Down, 8);
    device.lock().resets_in_part = true;
    let mut left = Guest::boot(&host, "left", 1);
    let rings = [RCTL, TCTL, RDH, RDT, TDT];
    // It gets its turn after it has stopped its units and before it resets the device.
    left.write(IMC, u32::MAX);
    for register in rings {
        left.write(register, 0x40);
    }
    let mut right = Guest::boot(&host, "right", 2);
    host.switch_to(&"right".parse().unwrap()).unwrap();
    host.switch_to(&"left".parse().unwrap()).unwrap();
    assert_eq!(rings.map(|register| left.read(register)), [0x40; 5]);
    left.write(CTRL, RESET);
    assert_eq!(rings.map(|register| left.read(register)), [0; 5]);
    assert_eq!(station(&mut left), left.mac);
    assert_eq!(station(&mut right), right.mac);
}

#[test]
fn whatever_step_fails_one_guest_has_the_function_or_nobody() {
    for step in Step::ALL {
        let (host, device) = host(ParkedAs::Down, 8);
        let mut left = Guest::boot(&host, "left", 1);
        let mut right = Guest::boot(&host, "right", 2);
        // What is loaded then is what the device had.
        for vm in ["right", "left"] {
            host.switch_to(&vm.parse().unwrap()).unwrap();
        }
        // It goes on as soon as it reaches its rings, and has all of the memory in the end.
        assert!(device.lock().mapped_in_part > 0);
        assert_eq!(device.lock().mapped, MEMORY);
        device.lock().fails = Some(step);
        let failed = host.switch_to(&"right".parse().unwrap());
        let error = failed.expect_err(&format!("{step}"));
        let error = format!("{error:#}");
        assert!(error.starts_with(&format!("{step} failed")), "{error}");
        let turn = host.turn();
        match turn.as_deref() {
            Some(vm) => {
                assert_eq!(vm, "left", "{step}");
                let state = device.lock();
                assert_eq!(state.get(RDBAL), left.ring(), "{step}");
                assert_eq!((state.masters, state.mapped), (true, MEMORY), "{step}");
            }
            None => assert!(device.lock().is_silent(), "{step}"),
        }
        // Neither has lost anything, and each gets it again when nothing fails.
        device.lock().fails = None;
        if turn.is_none() {
            host.switch_to(&"left".parse().unwrap()).unwrap();
        }
        for (vm, guest) in [("right", &mut right), ("left", &mut left)] {
            host.switch_to(&vm.parse().unwrap()).unwrap();
            assert_eq!(guest.read(RDBAL), guest.ring(), "{step}");
            assert_eq!(device.lock().address(), guest.mac, "{step}");
            device.lock().sent.clear();
            guest.send(3);
            guest.read(RDBAL);
            assert_eq!(device.lock().sent, [3], "{step}");
        }
    }
}

#[test]
fn who_goes_with_the_turn_leaves_a_silent_device_and_passes_it_on() {
    let (host, device) = host(ParkedAs::Down, 8);
    let left = Guest::boot(&host, "left", 1);
    assert!(device.lock().masters);
    drop(left);
    wait("left's end", || device.lock().is_silent());
    let left = Guest::boot(&host, "left", 1);
    assert!(left.info.turn && left.info.returned);
    let mut right = Guest::boot(&host, "right", 2);
    drop(left);
    wait("the turn", || host.turn().as_deref() == Some("right"));
    assert_eq!(device.lock().get(RDBAL), right.ring());
    assert_eq!(device.lock().mapped, MEMORY);
    right.send(5);
    right.read(RDBAL);
    assert_eq!(device.lock().sent.last(), Some(&5));
    // A parked one that goes is missed by nobody.
    let left = Guest::boot(&host, "left", 1);
    drop(left);
    wait("left's end", || !host.status().contexts[0].connected);
    assert_eq!(host.turn().as_deref(), Some("right"));
    assert!(device.lock().masters);
}

/// One that has gone and does not stand still is reset: nobody waits for its state.
#[test]
fn a_device_of_a_guest_that_has_gone_is_reset_if_it_does_not_stand_still() {
    let (host, device) = host(ParkedAs::Down, 8);
    let left = Guest::boot(&host, "left", 1);
    let right = Guest::boot(&host, "right", 2);
    let resets = device.lock().resets;
    device.lock().fails = Some(Step::Quiesce);
    drop(left);
    wait("a reset", || device.lock().resets > resets);
    device.lock().fails = None;
    wait("left's end", || !host.status().contexts[0].connected);
    if host.turn().is_none() {
        host.switch_to(&"right".parse().unwrap()).unwrap();
    }
    wait("the turn", || host.turn().as_deref() == Some("right"));
    assert_eq!(device.lock().get(RDBAL), right.ring());
}

/// As seen of monitors in wide use: a function attached in the moment in which another guest gives
/// it up is refused as busy, the second attempt is accepted and the device never sends anything;
/// and attempts that fail use up the slots.
#[test]
fn an_attach_in_the_moment_of_another_guests_end_is_served_whole_or_refused_whole() {
    const ROUNDS: u32 = 30;
    let (host, device) = host(ParkedAs::Down, 2);
    for round in 0..ROUNDS {
        let left = Guest::boot(&host, "left", 1);
        let ends = std::thread::spawn(move || drop(left));
        // At once, while the other one is on its way out.
        let mut right = Guest::boot(&host, "right", 2);
        ends.join().unwrap();
        wait("the turn", || host.turn().as_deref() == Some("right"));
        let tail = round + 1;
        right.send(tail);
        right.read(RDBAL);
        assert_eq!(device.lock().sent.last(), Some(&tail), "round {round}");
        // One that is refused takes nothing.
        let refused = connect(&host, "right", 2).map(drop).unwrap_err();
        assert!(refused.to_string().contains("busy"), "{refused}");
        drop(right);
        wait("its end", || {
            device.lock().is_silent() && host.turn().is_none()
        });
    }
    assert_eq!(host.status().contexts.len(), 2);
}

#[test]
fn a_guests_link_stays_for_a_moment_if_that_was_chosen() {
    let (host, _device) = host(ParkedAs::Stall, 8);
    let mut left = Guest::boot(&host, "left", 1);
    let mut right = Guest::boot(&host, "right", 2);
    assert_eq!(left.read(STATUS) & LINK, LINK);
    // Nobody had a link before its first turn.
    assert_eq!(right.read(STATUS) & LINK, 0);
    host.switch_to(&"right".parse().unwrap()).unwrap();
    let stayed = left.read(STATUS) & LINK == LINK;
    wait("the link's end", || left.read(STATUS) & LINK == 0);
    host.switch_to(&"left".parse().unwrap()).unwrap();
    assert_eq!(left.read(STATUS) & LINK, LINK);
    // It may be over before it is looked at, on a machine that is busy enough, but not twenty
    // times.
    let mut again = (0..20).filter(|turn| {
        let vm = ["right", "left"][turn % 2].parse().unwrap();
        host.switch_to(&vm).unwrap();
        [&mut left, &mut right][turn % 2].read(STATUS) & LINK == LINK
    });
    assert!(stayed || again.next().is_some());
}

/// The moment's end comes just when a switch has the function: neither waits for the other.
#[test]
fn a_link_that_ends_in_a_switch_holds_nobody_up() {
    let (_device, kind, hardware) = device::Device::new();
    let card = PassedCard::of(kind, hardware, ParkedAs::Stall);
    let mac = MacAddress([2, 0, 0, 0, 0, 1]);
    let context = Context::new("left".parse().unwrap(), mac, card.share(mac).unwrap()).unwrap();
    let (done, is_done) = std::sync::mpsc::channel();
    let context = Arc::new(context);
    let switches = context.clone();
    std::thread::spawn(move || {
        let _held = switches.share.function.lock().unwrap();
        switches.share.set_turn(false);
        std::thread::sleep(Duration::from_millis(1500));
        switches.share.set_turn(true);
        done.send(()).unwrap();
    });
    is_done.recv_timeout(Duration::from_secs(120)).unwrap();
}

/// There is nobody to go back to: the device reaches nothing then, although it ran already.
#[test]
fn a_device_that_nobody_had_and_that_does_not_get_all_of_its_memory_is_silent() {
    let (host, device) = host(ParkedAs::Down, 8);
    let left_vm = "left".parse().unwrap();
    let mut left = Guest::boot(&host, "left", 1);
    host.set_away(&left_vm, true).unwrap();
    assert_eq!(host.turn(), None);
    device.lock().fails = Some(Step::Complete);
    let error = host.set_away(&left_vm, false).unwrap_err();
    assert!(error.to_string().contains("complete failed"), "{error:#}");
    assert_eq!(host.turn(), None);
    assert!(device.lock().is_silent());
    device.lock().fails = None;
    host.switch_to(&left_vm).unwrap();
    assert_eq!(left.read(RDBAL), left.ring());
    assert_eq!(device.lock().mapped, MEMORY);
    left.send(7);
    left.read(RDBAL);
    assert_eq!(device.lock().sent.last(), Some(&7));
}

#[test]
fn a_guest_that_is_paused_gives_the_function_up_and_gets_it_again_when_it_goes_on() {
    let (host, device) = host(ParkedAs::Down, 8);
    let [left_vm, right_vm] = ["left", "right"].map(|vm| vm.parse().unwrap());
    let mut left = Guest::boot(&host, "left", 1);
    let mut right = Guest::boot(&host, "right", 2);
    host.set_away(&left_vm, true).unwrap();
    assert_eq!(host.turn().as_deref(), Some("right"));
    assert_eq!(host.status().switches[1].reason, Reason::Yielded);
    assert_eq!(device.lock().address(), right.mac);
    assert_eq!(host.status().contexts[0].mapped_bytes, Some(0));
    right.send(1);
    right.read(RDBAL);
    assert_eq!(device.lock().sent.last(), Some(&1));
    let refused = host.switch_to(&left_vm).unwrap_err().to_string();
    assert!(refused.contains("left is paused"), "{refused}");
    // Nobody else wants it: it reaches nothing, and who has it the next time finds its own.
    host.set_away(&right_vm, true).unwrap();
    assert_eq!(host.turn(), None);
    assert!(device.lock().is_silent());
    host.set_away(&left_vm, false).unwrap();
    assert_eq!(host.turn().as_deref(), Some("left"));
    assert_eq!(device.lock().get(RDBAL), left.ring());
    assert_eq!(left.read(RDBAL), left.ring());
    assert_eq!(device.lock().address(), left.mac);
    assert_eq!(device.lock().mapped, MEMORY);
    left.send(2);
    left.read(RDBAL);
    assert_eq!(device.lock().sent.last(), Some(&2));
    // One that goes on takes nothing from anybody.
    host.set_away(&right_vm, false).unwrap();
    assert_eq!(host.turn().as_deref(), Some("left"));
}

/// In the middle of a switch nobody has the turn, which is not to say that it is to be had.
#[test]
fn nobody_takes_the_turn_that_somebody_is_just_given() {
    type Asks = fn(&Host<PassedCard>);
    let ways: [Asks; 2] = [
        |host| host.set_away(&"third".parse().unwrap(), false).unwrap(),
        |host| drop(Guest::attach(host, "fourth", 4)),
    ];
    for asks in ways {
        let (host, device) = host(ParkedAs::Down, 8);
        let _guests =
            [("left", 1), ("right", 2), ("third", 3)].map(|(vm, mac)| Guest::boot(&host, vm, mac));
        host.set_away(&"third".parse().unwrap(), true).unwrap();
        let (begun, has_begun) = std::sync::mpsc::channel();
        let other = host.clone();
        device.lock().amid = Some(Box::new(move || {
            let asks = std::thread::spawn(move || {
                assert_eq!(other.turn(), None);
                asks(&other);
            });
            begun.send(asks).unwrap();
            // It asks, and waits for the end of this switch.
            std::thread::sleep(Duration::from_millis(300));
        }));
        host.switch_to(&"right".parse().unwrap()).unwrap();
        has_begun.recv().unwrap().join().unwrap();
        assert_eq!(host.turn().as_deref(), Some("right"));
        assert_eq!(
            host.status().switch_count,
            2,
            "the first turn, and one more"
        );
    }
}
