//! Frames that a device says to have lost, and guests that have gone.

use super::device::{Device, MPC};
use super::guest::{Guest, host, host_without_keeper, wait};
use crate::device::ParkedAs;
use crate::device::happened::Happened;
use crate::device::passed::PassedCard;

/// Frames that the device had no room for are each counted once, wherever they are read: for the
/// guest in whose turn they came, or for nobody, and not told to the next one.
#[test]
fn frames_that_the_device_has_lost_are_counted_for_whoever_had_it() {
    let (host, device) = host(ParkedAs::Down, 8);
    let mut left = Guest::boot(&host, "left", 1);
    let mut right = Guest::boot(&host, "right", 2);
    let lose = |frames: u32| {
        device.lock().registers.insert(MPC, frames);
    };
    let missed = || {
        let contexts = host.status().contexts;
        [0, 1].map(|index: usize| contexts[index].passed.unwrap().missed)
    };
    let before = host.status().lost_without_turn;
    // Its driver is told of what it reads itself.
    lose(3);
    assert_eq!(left.read(MPC), 3);
    lose(4);
    let amid = device.clone();
    device.lock().amid = Some(Box::new(move || {
        // Between the one's turn and the other's.
        amid.lock().registers.insert(MPC, 5);
    }));
    host.switch_to(&"right".parse().unwrap()).unwrap();
    assert_eq!(right.read(MPC), 0);
    assert_eq!(missed(), [7, 0]);
    assert_eq!(host.status().lost_without_turn - before, 5);
    // One that does not answer has not lost as many as there are.
    lose(u32::MAX);
    host.switch_to(&"left".parse().unwrap()).unwrap();
    assert_eq!(left.read(MPC), 0);
    assert_eq!(missed(), [7, 0]);
    assert_eq!(host.status().lost_without_turn - before, 5);
}

/// Whoever takes the place of a guest that has gone away may be waiting for a switch: that it has
/// gone is known without, and a switch does not give it the function.
#[test]
fn a_guest_that_has_gone_is_known_to_have_before_its_place_is_free() {
    let (_device, kind, hardware) = Device::new();
    let card = PassedCard::of(kind, hardware, ParkedAs::Down);
    let (host, events) = host_without_keeper(card, ParkedAs::Down, 8);
    let _left = Guest::boot(&host, "left", 1);
    drop(Guest::boot(&host, "right", 2));
    let right = host.contexts()[1].clone();
    wait("right's end", || !right.is_connected());
    assert!(right.is_taken());
    let refused = host.switch_to(&right.vm).unwrap_err().to_string();
    assert!(refused.contains("is not attached"), "{refused}");
    let Ok(Happened::Gone { vm, serial, why }) = events.recv() else {
        panic!("nobody is told");
    };
    host.gone(&vm, serial, &why);
    assert!(!right.is_taken());
    // It comes back.
    let _right = Guest::boot(&host, "right", 2);
    assert!(right.is_connected());
    host.switch_to(&right.vm).unwrap();
}
