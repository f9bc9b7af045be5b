//! What happens to a mouse, and the steps that its packets tell of.

use serde::{Deserialize, Serialize};

use super::MAX_EVENTS;

/// Farthest that one packet says the mouse has moved on an axis, in counts: nine bits with a sign.
const STEP: i32 = 255;
/// Most that one packet says the wheel has turned: four bits with a sign.
const WHEEL_STEP: i32 = 7;
/// Longest that one event may move on an axis, or turn, so that it fits into an empty queue.
const MAX_DISTANCE: i32 = 4096;

/// A button.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Button {
    /// Bit 0 of a packet's first byte.
    Left,
    /// Bit 1.
    Right,
    /// Bit 2.
    Middle,
}

impl Button {
    /// Its bit in a packet's first byte.
    pub(super) fn bit(self) -> u8 {
        match self {
            Self::Left => 1,
            Self::Right => 2,
            Self::Middle => 4,
        }
    }
}

/// Something that happens to the mouse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum MouseEvent {
    /// It is moved, in counts: `x` to the right, `y` towards its user (down on a screen).
    Move {
        /// To the right.
        x: i32,
        /// Down.
        y: i32,
    },
    /// The wheel is turned, in notches away from the user (up on a screen).
    Wheel(i32),
    /// A button goes down.
    Press(Button),
    /// A button goes up.
    Release(Button),
    /// A button goes down and up.
    Click(Button),
}

/// Why an event did not reach the mouse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotMoved {
    /// Its driver has not switched packets on.
    #[error("the guest does not listen to its mouse: no driver has switched it on")]
    NotListening,
    /// The queue has no room.
    #[error("the guest has not taken {MAX_EVENTS} events that came before")]
    Full,
    /// Too far.
    #[error("a mouse moves at most {MAX_DISTANCE} at once")]
    TooFar,
    /// It has none for the guest.
    #[error("the guest's driver did not ask the mouse for its wheel")]
    NoWheel,
}

/// One packet's worth of what happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    pub x: i16,
    /// Up, as packets have it.
    pub y: i16,
    /// Towards the user, as packets have it.
    pub z: i8,
    pub buttons: u8,
}

impl Step {
    /// Whether there can be such a step.
    pub fn is_possible(&self) -> bool {
        let far = |counts: i16| (-STEP..=STEP).contains(&i32::from(counts));
        let turned = (-WHEEL_STEP..=WHEEL_STEP).contains(&i32::from(self.z));
        far(self.x) && far(self.y) && turned && self.buttons <= 7
    }
}

/// The steps of `event` where `buttons` are down, and the buttons that are down behind it.
pub fn steps_of(event: MouseEvent, buttons: u8) -> Result<(Vec<Step>, u8), NotMoved> {
    let here = Step {
        buttons,
        ..Step::default()
    };
    let with = |buttons: u8| Step {
        buttons,
        ..Step::default()
    };
    let near = |distance: i32| (-MAX_DISTANCE..=MAX_DISTANCE).contains(&distance);
    Ok(match event {
        MouseEvent::Move { x, y } if near(x) && near(y) => {
            let (mut x, mut y) = (x, -y);
            let mut steps = Vec::new();
            while x != 0 || y != 0 {
                let (here_x, here_y) = (x.clamp(-STEP, STEP), y.clamp(-STEP, STEP));
                steps.push(Step {
                    // Both fit: they are clamped.
                    x: here_x as i16,
                    y: here_y as i16,
                    ..here
                });
                (x, y) = (x - here_x, y - here_y);
            }
            (steps, buttons)
        }
        MouseEvent::Wheel(notches) if near(notches) => {
            let mut z = -notches;
            let mut steps = Vec::new();
            while z != 0 {
                let step = z.clamp(-WHEEL_STEP, WHEEL_STEP);
                steps.push(Step {
                    z: step as i8,
                    ..here
                });
                z -= step;
            }
            (steps, buttons)
        }
        MouseEvent::Move { .. } | MouseEvent::Wheel(_) => return Err(NotMoved::TooFar),
        MouseEvent::Press(button) | MouseEvent::Release(button) => {
            let after = match matches!(event, MouseEvent::Press(_)) {
                true => buttons | button.bit(),
                false => buttons & !button.bit(),
            };
            let steps = (after != buttons).then(|| with(after));
            (steps.into_iter().collect(), after)
        }
        MouseEvent::Click(button) => {
            let (down, up) = (buttons | button.bit(), buttons & !button.bit());
            (vec![with(down), with(up)], up)
        }
    })
}

/// Scaling 2:1, which is one by itself for small counts.
pub fn doubled(counts: i16) -> i32 {
    let counts = i32::from(counts);
    let by = match counts.abs() {
        0 => 0,
        1 | 2 => 1,
        3 => 3,
        4 => 6,
        5 => 9,
        many => 2 * many,
    };
    by * counts.signum()
}

/// The lower eight bits of a counter of nine, its sign, and whether it stopped at its end.
pub fn nine_bits(counts: i32) -> (u8, bool, bool) {
    let kept = counts.clamp(-256, 255);
    (kept as u8, kept < 0, kept != counts)
}
