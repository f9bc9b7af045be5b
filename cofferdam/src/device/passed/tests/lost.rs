//! Frames that a device says to have lost.

use super::device::MPC;
use super::guest::{Guest, host};
use crate::device::ParkedAs;

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
