//! Random histories: at any point of one, a twin that was restored from the stored state goes on as
//! the original does; and what a hostile guest writes, or a state that lies, breaks nothing.

use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::tests::Guest;
use super::*;
use crate::state::Part;
use crate::state::tests::{Random, stored};

/// One thing happens; the same for the same random numbers. What a guest could see of it.
fn step(guest: &Guest, random: &mut Random) -> Vec<u8> {
    let button = [Button::Left, Button::Right, Button::Middle][random.below(3) as usize];
    let mut seen = Vec::new();
    match random.below(10) {
        0 => guest.tell(random.next() as u8),
        1 => guest.give(random.next() as u8),
        2 | 3 => {
            // What the mouse understands, or nearly.
            guest.tell(0xd4);
            let known = [
                0xf3, 200, 100, 80, 0xf4, 0xf4, 0xe9, 0xeb, 0xf0, 0xea, 0xe7, 0xee,
            ];
            let byte = match random.below(4) {
                0 => 0xe0 | random.next() as u8,
                _ => known[random.below(12) as usize],
            };
            guest.give(byte);
        }
        4 => {
            guest.tell(0x60);
            guest.give(random.next() as u8 & 0xdf);
        }
        5 => {
            let (x, y) = (random.below(2000) as i32 - 1000, random.below(9) as i32);
            seen.push(u8::from(guest.event(MouseEvent::Move { x, y }).is_ok()));
        }
        6 => seen.push(u8::from(guest.event(MouseEvent::Click(button)).is_ok())),
        7 => seen.push(u8::from(guest.event(MouseEvent::Wheel(-3)).is_ok())),
        _ => {
            for _ in 0..random.below(9) {
                seen.extend([guest.status(), guest.take()]);
            }
        }
    }
    // Not the reset line: nobody is there.
    seen.push(guest.status());
    seen
}

#[test]
fn a_restored_twin_goes_on_as_the_original() {
    let mut packets = 0;
    for seed in 1..300 {
        let original = Guest::new();
        let mut random = Random(seed);
        for _ in 0..random.below(400) {
            step(&original, &mut random);
        }
        let twin = Guest::new();
        let part = stored(&lock(&original.controller).save().unwrap());
        lock(&twin.controller).restore(&part).unwrap();
        let mut same = Random(random.0);
        let waits = |guest: &Guest| {
            let (keyboard, aux) = lock(&guest.controller).wanted_lines();
            (
                keyboard || aux,
                guest.aux.edges.load(Ordering::Acquire) > 0
                    || guest.keyboard.edges.load(Ordering::Acquire) > 0,
            )
        };
        let (waits, interrupted) = waits(&twin);
        assert_eq!(waits, interrupted, "what waits interrupts again");
        for at in 0..400 {
            let (of_one, of_other) = (step(&original, &mut random), step(&twin, &mut same));
            assert_eq!(of_one, of_other, "seed {seed}, step {at}");
        }
        let (one, other) = (lock(&original.controller), lock(&twin.controller));
        assert_eq!(one.registers, other.registers, "seed {seed}");
        packets += one.mouse_counts().packets;
    }
    assert!(
        packets > 500,
        "{packets} packets are too few to show anything"
    );
}

#[test]
fn a_state_of_any_moment_is_one_that_a_controller_can_have() {
    for seed in 1..100 {
        let guest = Guest::new();
        let mut random = Random(seed);
        for _ in 0..300 {
            step(&guest, &mut random);
            let mut controller = lock(&guest.controller);
            let part = controller.save().unwrap();
            controller.restore(&part).unwrap();
        }
    }
}

#[test]
fn a_state_that_lies_is_refused_and_changes_nothing() {
    let form = crate::state::Form {
        kind: "keyboard controller",
        version: 1,
    };
    type Lie = fn(&mut Registers);
    let lies: [Lie; 4] = [
        |registers| registers.awaits = Some(0x20),
        |registers| registers.answers = vec![Output::own(0); MAX_ANSWERS + 1].into(),
        |registers| registers.mouse = lying_mouse(r#"{"rate":0}"#),
        |registers| registers.mouse = lying_mouse(r#"{"awaits":1}"#),
    ];
    let guest = Guest::new();
    let before = lock(&guest.controller).registers.clone();
    for lie in lies {
        let mut registers = before.clone();
        lie(&mut registers);
        let part = Part::new(form, &registers).unwrap();
        assert!(lock(&guest.controller).restore(&part).is_err());
        assert_eq!(lock(&guest.controller).registers, before);
    }
    let newer = crate::state::Form { version: 2, ..form };
    let part = Part::new(newer, &before).unwrap();
    assert!(lock(&guest.controller).restore(&part).is_err());
}

/// A mouse with these members otherwise than after power-on.
fn lying_mouse(members: &str) -> Mouse {
    let mut mouse = serde_json::to_value(Mouse::default()).unwrap();
    let lies: serde_json::Value = serde_json::from_str(members).unwrap();
    for (member, value) in lies.as_object().unwrap() {
        mouse[member] = value.clone();
    }
    serde_json::from_value(mouse).unwrap()
}

proptest! {
    /// Any content with a head that fits is refused, or is a state with which the controller works.
    #[test]
    fn any_content_is_refused_or_works(content in proptest::collection::vec(any::<u8>(), 0..200), seed in 1u64..) {
        let guest = Guest::new();
        if let Ok((registers, _)) = postcard::take_from_bytes::<Registers>(&content) {
            let form = crate::state::Form { kind: "keyboard controller", version: 1 };
            let part = Part::new(form, &registers).unwrap();
            let _ = lock(&guest.controller).restore(&part);
        }
        let mut random = Random(seed);
        for _ in 0..50 {
            step(&guest, &mut random);
        }
    }
}
