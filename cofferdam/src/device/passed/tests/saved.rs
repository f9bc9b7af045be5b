//! Guests that are saved with their part of the function, and go on with it.

use super::device::{Device, ICR};
use super::guest::connect_saved;
use super::*;

/// Link status change: what a driver is told that is to look at everything.
const LOOK: u32 = 4;

/// The device works for this guest, and for nobody else.
#[track_caller]
fn assert_works_for(device: &Device, guest: &mut Guest, tail: u32) {
    {
        let state = device.lock();
        assert_eq!(state.get(RDBAL), guest.ring());
        assert_eq!(state.address(), guest.mac);
        assert_eq!((state.get(RCTL), state.get(TCTL)), (2, 2));
        assert_eq!((state.masters, state.mapped), (true, MEMORY));
        assert_eq!(state.goes, Goes::Messages(5));
    }
    guest.send(tail);
    assert_eq!(guest.read(TDT), tail);
    assert_eq!(device.lock().sent.last(), Some(&tail));
}

/// It neither reads and writes memory nor is it about to.
#[track_caller]
fn assert_stands_still(device: &Device) {
    let state = device.lock();
    assert!(!state.masters);
    assert_eq!([RCTL, TCTL, IMS].map(|at| state.get(at)), [0; 3]);
}

#[test]
fn a_device_stands_still_while_its_guest_is_saved_and_works_on_as_if_nothing_had_been() {
    let (host, device) = host(ParkedAs::Down, 8);
    let mut left = Guest::boot(&host, "left", 1);
    assert_works_for(&device, &mut left, 3);
    left.rearm();
    left.interrupts();
    for _ in 0..3 {
        left.stop();
        assert_stands_still(&device);
        left.save();
        assert_stands_still(&device);
        let mask = device.lock().get(ICR);
        left.go_on();
        // Its driver is not made to look at anything; the device of the test sends its last tail
        // once more when its transmitter begins.
        assert_eq!(device.lock().get(ICR), mask);
        assert_eq!(left.interrupts(), [2]);
        assert_eq!(left.read(IMS) | TXQ0, 0x01f0_0004);
        left.rearm();
        assert_works_for(&device, &mut left, 4);
        left.rearm();
        left.interrupts();
    }
    // Without being told to stand still, too.
    left.save();
    assert_works_for(&device, &mut left, 5);
    // One that goes meanwhile leaves nothing.
    left.stop();
    drop(left);
    wait("left's end", || device.lock().is_silent());
    let mut left = Guest::boot(&host, "left", 1);
    assert_works_for(&device, &mut left, 6);
}

#[test]
fn a_guest_goes_on_from_what_was_saved_with_the_device_and_without_it() {
    for (saved_with, goes_on_with) in [(true, true), (true, false), (false, true), (false, false)] {
        let text = format!("{saved_with}, {goes_on_with}");
        let (host, device) = host(ParkedAs::Down, 8);
        let mut left = Guest::boot(&host, "left", 1);
        let mut right = Guest::boot(&host, "right", 2);
        if !saved_with {
            host.switch_to(&"right".parse().unwrap()).unwrap();
        }
        left.send(7);
        left.write(RDT, 0x40);
        left.stop();
        let state = left.save();
        drop(left);
        wait("right's turn", || host.turn().as_deref() == Some("right"));
        if goes_on_with {
            host.set_away(&"right".parse().unwrap(), true).unwrap();
        }
        let mut left = Guest::from_saved(&host, "left", 1, &state);
        assert_eq!(left.info.turn, goes_on_with, "{text}");
        assert_eq!(left.read(RDBAL), left.ring(), "{text}");
        assert_eq!((left.read(TDT), left.read(RDT)), (7, 0x40), "{text}");
        assert_eq!(station(&mut left), left.mac, "{text}");
        let link = if goes_on_with { LINK } else { 0 };
        assert_eq!(left.read(STATUS) & LINK, link, "{text}");
        if !goes_on_with {
            assert_works_for(&device, &mut right, 9);
            host.switch_to(&"left".parse().unwrap()).unwrap();
        }
        // Its driver looks at everything; what it had not been sent yet is.
        assert_eq!(device.lock().get(ICR) & LOOK, LOOK, "{text}");
        assert_eq!(device.lock().sent.last(), Some(&7), "{text}");
        assert_works_for(&device, &mut left, 10);
    }
}

#[test]
fn the_device_changes_hands_while_a_guest_is_being_saved() {
    let (host, device) = host(ParkedAs::Down, 8);
    let mut left = Guest::boot(&host, "left", 1);
    let mut right = Guest::boot(&host, "right", 2);
    left.stop();
    host.switch_to(&"right".parse().unwrap()).unwrap();
    assert_works_for(&device, &mut right, 3);
    // It gets it back while it stands still, and so does the device.
    host.switch_to(&"left".parse().unwrap()).unwrap();
    assert_stands_still(&device);
    let state = left.save();
    assert_stands_still(&device);
    left.go_on();
    assert_works_for(&device, &mut left, 4);
    // It goes on without it.
    left.stop();
    host.switch_to(&"right".parse().unwrap()).unwrap();
    left.go_on();
    assert_eq!(left.read(RDBAL), left.ring());
    assert_works_for(&device, &mut right, 5);
    // Somebody else's state, which leaves the device alone where it is not had.
    assert!(left.restore(&state));
    assert_works_for(&device, &mut right, 6);
    host.switch_to(&"left".parse().unwrap()).unwrap();
    assert_works_for(&device, &mut left, 7);
}

#[test]
fn a_clone_has_its_own_address_and_another_model_is_refused() {
    for with_turn in [true, false] {
        let (host, device) = host(ParkedAs::Down, 8);
        let mut left = Guest::boot(&host, "left", 1);
        let state = left.save();
        if with_turn {
            host.set_away(&"left".parse().unwrap(), true).unwrap();
        }
        let mut clone = Guest::from_saved(&host, "clone", 3, &state);
        assert_eq!(clone.info.turn, with_turn);
        assert_eq!(station(&mut clone), clone.mac);
        if !with_turn {
            host.switch_to(&"clone".parse().unwrap()).unwrap();
        }
        assert_eq!(device.lock().address(), clone.mac);
        assert_eq!(clone.read(RDBAL), left.ring());
        // Its own reset brings back that address.
        clone.write(CTRL, RESET);
        assert_eq!(station(&mut clone), clone.mac);
        let error = connect_saved(&host, ("other", 4), Some("e1000")).unwrap_err();
        assert!(error.to_string().contains("was saved with"), "{error}");
    }
}

/// It comes from a VM, and may be anything.
#[test]
fn a_state_that_is_none_is_refused_and_the_device_is_usable_behind_it() {
    let (host, device) = host(ParkedAs::Down, 8);
    let mut left = Guest::boot(&host, "left", 1);
    let mut right = Guest::boot(&host, "right", 2);
    let state = left.save();
    for at in (0..state.len()).step_by(11) {
        let mut other = state.clone();
        other[at] ^= 0x10;
        assert!(!left.restore(&other), "{at}");
        assert!(!left.restore(&state[..at]), "{at}");
        let silent = !device.lock().masters;
        assert!(silent, "{at}");
        left.reset();
    }
    left.start();
    assert_works_for(&device, &mut left, 3);
    host.switch_to(&"right".parse().unwrap()).unwrap();
    assert_works_for(&device, &mut right, 4);
}
