//! The mouse: a PS/2 auxiliary device with three buttons, which becomes one with a wheel when it is
//! knocked at (sample rates 200, 100, 80 one behind the other).
//!
//! Sources: *IBM Personal System/2 Mouse Technical Reference* (1989) for commands, modes and
//! packets; Microsoft's *Intellimouse* notes for the knock and the fourth byte, as Linux'
//! `drivers/input/mouse/psmouse-base.c` (`intellimouse_detect`, `psmouse_process_byte`) has them.
//!
//! | bit of a packet's first byte | 7 | 6 | 5 | 4 | 3 | 2 | 1 | 0 |
//! | --- | --- | --- | --- | --- | --- | --- | --- | --- |
//! | | Y overflow | X overflow | Y sign | X sign | 1 | middle | right | left |
//!
//! Two things are otherwise than in a mouse of metal. Events of the host wait in a queue, in place
//! of being added up while the guest is slow, and the sample rate is told but does not slow them
//! down: what the host sends is what the guest gets. And a packet of which the guest has not got
//! all when it sends a command is sent again as a whole when packets go on.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::events::{Button, MouseEvent, NotMoved, Step, doubled, nine_bits, steps_of};

/// Events that wait for the guest. One that moves far counts as several.
pub const MAX_EVENTS: usize = 1024;
/// Bytes that wait for the controller: an acknowledgement and a packet.
const MAX_BYTES: usize = 5;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const ERROR: u8 = 0xfc;
/// The self-test after a reset was passed.
const TEST_PASSED: u8 = 0xaa;
/// Sample rates that there are, in packets a second.
const RATES: [u8; 7] = [10, 20, 40, 60, 80, 100, 200];
const DEFAULT_RATE: u8 = 100;
/// Four counts a millimetre.
const DEFAULT_RESOLUTION: u8 = 2;
const MAX_RESOLUTION: u8 = 3;
/// Rates that make a mouse with a wheel of it.
const KNOCK: [u8; 3] = [200, 100, 80];
const ID_PLAIN: u8 = 0;
const ID_WHEEL: u8 = 3;

const SET_RESOLUTION: u8 = 0xe8;
const SET_RATE: u8 = 0xf3;
const RESET_WRAP: u8 = 0xec;
const RESET: u8 = 0xff;

/// What became of the events that the host sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MouseCounts {
    /// Steps that came: an event that moves far has several, and so has a click.
    pub steps: u64,
    /// Packets of which the controller took all bytes.
    pub packets: u64,
    /// Steps that wait.
    pub waiting: u64,
    /// Steps that were forgotten by a reset, or by what the driver told the mouse.
    pub forgotten: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Mode {
    Stream,
    Remote,
}

/// The mouse.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mouse {
    mode: Mode,
    /// Each byte is sent back.
    wraps: bool,
    /// Packets are sent by itself in stream mode.
    reports: bool,
    /// Scaling is 2:1.
    doubles: bool,
    resolution: u8,
    rate: u8,
    id: u8,
    /// The last rates that were set, oldest first.
    rates: [u8; 3],
    /// The command whose argument comes next.
    awaits: Option<u8>,
    /// The byte that came last was none that there is.
    was_wrong: bool,
    /// Buttons that the guest was told last are down.
    told_buttons: u8,
    /// Those that are.
    buttons: u8,
    steps: VecDeque<Step>,
    /// What is being sent.
    bytes: VecDeque<u8>,
    /// It is the packet of this step.
    sending: Option<Step>,
    /// What was sent last, to be sent again.
    last: Vec<u8>,
    counts: MouseCounts,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            mode: Mode::Stream,
            wraps: false,
            reports: false,
            doubles: false,
            resolution: DEFAULT_RESOLUTION,
            rate: DEFAULT_RATE,
            id: ID_PLAIN,
            rates: [0; 3],
            awaits: None,
            was_wrong: false,
            told_buttons: 0,
            buttons: 0,
            steps: VecDeque::new(),
            bytes: VecDeque::new(),
            sending: None,
            last: Vec::new(),
            counts: MouseCounts::default(),
        }
    }
}

impl Mouse {
    /// See [`super::I8042::move_mouse`].
    pub fn happened(&mut self, event: MouseEvent) -> Result<(), NotMoved> {
        if !self.reports && self.mode == Mode::Stream {
            return Err(NotMoved::NotListening);
        }
        if matches!(event, MouseEvent::Wheel(_)) && self.id != ID_WHEEL {
            return Err(NotMoved::NoWheel);
        }
        let (steps, buttons) = steps_of(event, self.buttons)?;
        let room = MAX_EVENTS.saturating_sub(self.steps.len());
        if steps.len() > room {
            return Err(NotMoved::Full);
        }
        self.buttons = buttons;
        self.counts.steps = self.counts.steps.saturating_add(steps.len() as u64);
        self.steps.extend(steps);
        Ok(())
    }

    pub fn counts(&self) -> MouseCounts {
        let waiting = self.steps.len() + usize::from(self.sending.is_some());
        MouseCounts {
            waiting: waiting as u64,
            ..self.counts
        }
    }

    /// Is set as `before` was, whatever it has been told since; what happened to it stays.
    pub fn be_set_as(&mut self, before: &Self) {
        self.bytes.clear();
        if let Some(step) = self.sending.take() {
            self.steps.push_front(step);
        }
        self.awaits = None;
        (self.mode, self.wraps) = (before.mode, before.wraps);
        (self.reports, self.doubles) = (before.reports, before.doubles);
        (self.resolution, self.rate) = (before.resolution, before.rate);
        (self.id, self.rates) = (before.id, before.rates);
    }

    /// It sends no packets by itself any more.
    pub fn silence(&mut self) {
        self.reports = false;
        self.forget_steps();
    }

    /// The next byte for the controller.
    pub fn next_byte(&mut self) -> Option<u8> {
        if self.bytes.is_empty() && self.may_report() {
            let step = self.steps.pop_front()?;
            self.send_packet(step);
        }
        let byte = self.bytes.pop_front()?;
        if self.bytes.is_empty() && self.sending.take().is_some() {
            self.counts.packets = self.counts.packets.saturating_add(1);
        }
        Some(byte)
    }

    fn may_report(&self) -> bool {
        self.mode == Mode::Stream && self.reports && !self.wraps && self.awaits.is_none()
    }

    /// The host of the mouse, which is the guest, sends it a byte.
    pub fn told(&mut self, byte: u8) {
        self.bytes.clear();
        // A packet that is given up comes again.
        let given_up = self.sending.take();
        if byte == RESEND
            && !self.wraps
            && self.awaits.is_none()
            && let Some(step) = given_up
        {
            return self.send_packet(step);
        }
        if let Some(step) = given_up {
            self.steps.push_front(step);
        }
        if self.wraps && byte != RESET && byte != RESET_WRAP {
            return self.send(&[byte]);
        }
        match self.awaits.take() {
            Some(command) => self.argument(command, byte),
            None => self.command(byte),
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.last = bytes.to_vec();
        self.bytes.extend(bytes);
    }

    fn wrong(&mut self) {
        let again = std::mem::replace(&mut self.was_wrong, true);
        if again {
            self.was_wrong = false;
        }
        self.send(&[if again { ERROR } else { RESEND }]);
    }

    fn argument(&mut self, command: u8, value: u8) {
        match command {
            SET_RATE if RATES.contains(&value) => {
                self.rate = value;
                self.rates = [self.rates[1], self.rates[2], value];
                if self.rates == KNOCK {
                    self.id = ID_WHEEL;
                }
            }
            SET_RESOLUTION if value <= MAX_RESOLUTION => self.resolution = value,
            _ => {
                // The argument comes again.
                self.awaits = (!self.was_wrong).then_some(command);
                return self.wrong();
            }
        }
        self.was_wrong = false;
        self.send(&[ACK]);
    }

    fn command(&mut self, command: u8) {
        let mut answer = vec![ACK];
        match command {
            0xe6 => self.doubles = false,
            0xe7 => self.doubles = true,
            SET_RESOLUTION | SET_RATE => self.awaits = Some(command),
            0xe9 => answer.extend(self.status()),
            0xea => self.mode = Mode::Stream,
            0xeb => {
                let step = self.sum_of_steps();
                answer.extend(self.packet(step));
                // All that there is to know of it was said, and is said again if it is asked for.
                self.told_buttons = step.buttons;
            }
            RESET_WRAP => self.wraps = false,
            0xee => self.wraps = true,
            0xf0 => self.mode = Mode::Remote,
            0xf2 => answer.push(self.id),
            0xf4 => self.reports = true,
            0xf5 => self.reports = false,
            0xf6 => self.set_defaults(),
            RESEND => answer.clone_from(&self.last),
            RESET => {
                self.set_defaults();
                (self.id, self.rates) = (ID_PLAIN, [0; 3]);
                answer.extend([TEST_PASSED, ID_PLAIN]);
            }
            _ => return self.wrong(),
        }
        self.was_wrong = false;
        self.send(&answer);
    }

    fn set_defaults(&mut self) {
        (self.mode, self.wraps, self.reports) = (Mode::Stream, false, false);
        (self.rate, self.resolution) = (DEFAULT_RATE, DEFAULT_RESOLUTION);
        self.doubles = false;
        self.forget_steps();
    }

    fn forget_steps(&mut self) {
        let waiting = self.counts().waiting;
        self.counts.forgotten = self.counts.forgotten.saturating_add(waiting);
        self.steps.clear();
        if self.sending.take().is_some() {
            self.bytes.clear();
        }
        self.told_buttons = self.buttons;
    }

    fn status(&self) -> [u8; 3] {
        let bit = |is: bool, bit: u8| u8::from(is) << bit;
        let down = |button: Button| self.buttons & button.bit() != 0;
        let first = bit(self.mode == Mode::Remote, 6)
            | bit(self.reports, 5)
            | bit(self.doubles, 4)
            | bit(down(Button::Left), 2)
            | bit(down(Button::Middle), 1)
            | bit(down(Button::Right), 0);
        [first, self.resolution, self.rate]
    }

    fn send_packet(&mut self, step: Step) {
        let packet = self.packet(step);
        self.send(&packet);
        self.sending = Some(step);
        self.told_buttons = step.buttons;
    }

    /// All that has moved until a button changes, as one; the counters of a mouse stop at their
    /// ends.
    fn sum_of_steps(&mut self) -> Step {
        let Some(first) = self.steps.pop_front() else {
            return Step {
                buttons: self.told_buttons,
                ..Step::default()
            };
        };
        let mut sum = first;
        while let Some(next) = self.steps.front().copied()
            && next.buttons == sum.buttons
        {
            self.steps.pop_front();
            sum.x = sum.x.saturating_add(next.x);
            sum.y = sum.y.saturating_add(next.y);
            sum.z = sum.z.saturating_add(next.z);
        }
        sum
    }

    /// What a step looks like to the guest.
    fn packet(&self, step: Step) -> Vec<u8> {
        let scale = |counts: i16| match self.doubles && self.mode == Mode::Stream {
            true => doubled(counts),
            false => counts.into(),
        };
        let (x, x_sign, x_over) = nine_bits(scale(step.x));
        let (y, y_sign, y_over) = nine_bits(scale(step.y));
        let bit = |is: bool, bit: u8| u8::from(is) << bit;
        let first = step.buttons & 7
            | 1 << 3
            | bit(x_sign, 4)
            | bit(y_sign, 5)
            | bit(x_over, 6)
            | bit(y_over, 7);
        let mut packet = vec![first, x, y];
        if self.id == ID_WHEEL {
            packet.push(step.z.clamp(-8, 7) as u8);
        }
        packet
    }

    /// Whether a mouse can be so; what is wrong otherwise.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.steps.len() > MAX_EVENTS + 1 || !self.steps.iter().all(Step::is_possible) {
            return Err("its mouse has moved in a way that it cannot");
        }
        if self.bytes.len() > MAX_BYTES || self.last.len() > MAX_BYTES {
            return Err("its mouse has said more than it can");
        }
        let sends = self.sending.is_none_or(|step| step.is_possible()) && self.sends_what_it_says();
        let knows = |rate: &u8| *rate == 0 || RATES.contains(rate);
        let awaits = matches!(self.awaits, None | Some(SET_RATE | SET_RESOLUTION));
        let is_mouse = self.resolution <= MAX_RESOLUTION
            && RATES.contains(&self.rate)
            && self.rates.iter().all(knows)
            && matches!(self.id, ID_PLAIN | ID_WHEEL)
            && self.buttons <= 7
            && self.told_buttons <= 7;
        match sends && awaits && is_mouse {
            true => Ok(()),
            false => Err("its mouse is as no mouse is"),
        }
    }

    /// Where a packet is being sent there are bytes left of it.
    fn sends_what_it_says(&self) -> bool {
        self.sending.is_none() || !self.bytes.is_empty()
    }
}
