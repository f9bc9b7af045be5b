//! Any sequence of accesses to the keyboard controller's ports and of what happens to its mouse;
//! half-way a twin is restored from the saved state, which has to behave the same from there on.
//! Random sequences run in `cargo test -p devices`, too.

use std::sync::{Arc, Mutex};

use devices::bus::BusDevice;
use devices::i8042::{Button, I8042, MouseEvent, Port, lock};
use devices::irq::IrqLine;

struct Line;

impl IrqLine for Line {
    fn set_level(&self, _asserted: bool) {}
}

fn controller() -> Arc<Mutex<I8042>> {
    Arc::new(Mutex::new(I8042::new(
        Arc::new(Line),
        Arc::new(Line),
        Box::new(|| {}),
    )))
}

/// What two bytes do, and what is seen of it.
fn step(controller: &Arc<Mutex<I8042>>, what: u8, value: u8) -> u8 {
    let (data, command) = (
        Port::data(controller.clone()),
        Port::command(controller.clone()),
    );
    let mut seen = [0];
    let event = |event| u8::from(lock(controller).move_mouse(event).is_ok());
    let signed = i32::from(value as i8);
    match what % 8 {
        0 => data.write(0, &[value]),
        1 => command.write(0, &[value]),
        2 => {
            command.write(0, &[0xd4]);
            data.write(0, &[value]);
        }
        3 => command.read(0, &mut seen),
        4 => data.read(0, &mut seen),
        5 => {
            seen[0] = event(MouseEvent::Move {
                x: signed * 40,
                y: signed,
            })
        }
        6 => seen[0] = event(MouseEvent::Wheel(signed)),
        _ => seen[0] = event(MouseEvent::Click(Button::Left)),
    }
    seen[0]
}

/// One input.
pub fn run(input: &[u8]) {
    let one = controller();
    let steps: Vec<[u8; 2]> = input
        .chunks_exact(2)
        .map(|pair| [pair[0], pair[1]])
        .collect();
    let (before, after) = steps.split_at(steps.len() / 2);
    for [what, value] in before {
        step(&one, *what, *value);
    }
    let saved = lock(&one).save().expect("it has a state");
    let twin = controller();
    lock(&twin).restore(&saved).expect("its own state");
    for [what, value] in after {
        assert_eq!(
            step(&one, *what, *value),
            step(&twin, *what, *value),
            "the twin differs"
        );
    }
    assert_eq!(lock(&one).save(), lock(&twin).save(), "the twin differs");
}
