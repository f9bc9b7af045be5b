//! A host that does not take memory away from a device.

use super::*;

#[test]
fn nobody_is_given_a_device_that_reaches_anothers_memory() {
    let (host, device) = host(ParkedAs::Down, 8);
    let left = Guest::boot(&host, "left", 1);
    let mut right = Guest::boot(&host, "right", 2);
    device.lock().keeps_memory = true;
    drop(left);
    wait("a switch that fails", || host.status().failed_switches > 0);
    let to = "right".parse().unwrap();
    for _ in 0..2 {
        let error = format!("{:#}", host.switch_to(&to).unwrap_err());
        assert!(error.starts_with("map failed"), "{error}");
        assert_eq!(host.turn(), None);
        assert!(!device.lock().masters);
    }
    device.lock().keeps_memory = false;
    wait("the turn", || {
        host.switch_to(&to).is_ok() || host.turn().as_deref() == Some("right")
    });
    right.send(3);
    right.read(RDBAL);
    let state = device.lock();
    assert!(state.masters && state.mapped == MEMORY);
    assert_eq!(state.sent.last(), Some(&3));
}

#[test]
fn a_device_whose_memory_goes_and_is_not_taken_away_neither_masters_the_bus_nor_interrupts() {
    let (host, device) = host(ParkedAs::Down, 8);
    let mut left = Guest::boot(&host, "left", 1);
    left.give_more();
    left.send(3);
    left.read(RDBAL);
    device.lock().keeps_memory = true;
    left.take_back();
    {
        let state = device.lock();
        assert!(!state.masters && state.mapped > 0);
        assert_eq!(state.goes, Goes::Nowhere);
    }
    device.lock().keeps_memory = false;
    left.give_more();
    left.send(4);
    left.read(RDBAL);
    let state = device.lock();
    assert!(state.masters && state.mapped == 2 * MEMORY);
    assert_ne!(state.goes, Goes::Nowhere);
    assert_eq!(state.sent.last(), Some(&4));
}
