//! A keyboard controller with a PS/2 mouse behind its auxiliary port, and no keyboard.
//!
//! ```text
//!            port 0x60 data ◄──┐                          ┌── its own answers
//!   guest    port 0x64 status  ├── output buffer (1 byte) ┤
//!            lines 1 and 12 ◄──┘                          └── mouse ◄── events of the host
//!            port 0x64 command ──► the controller, or what follows to the mouse
//! ```
//!
//! Sources: *IBM Personal System/2 Hardware Interface Technical Reference* (1988), *Keyboard and
//! Auxiliary Device Controller*, for ports, commands and bits; what an 8042 leaves open is as
//! Linux' `drivers/input/serio/i8042.c` takes it for granted.
//!
//! The controller does at once what it is told, so its input buffer is never full. A byte that is
//! for a keyboard is answered as where none is connected: `0xFE`, with the bit of a time-out.
//! A line is asserted while the output buffer holds a byte that is to interrupt, and comes down
//! between two of them: each byte has an edge of its own.

mod events;
mod hold;
mod mouse;
mod state;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use events::{Button, MouseEvent, NotMoved};
pub use hold::HoldableI8042;
pub use mouse::{MAX_EVENTS, MouseCounts};

use crate::bus::BusDevice;
use crate::irq::IrqLine;

use mouse::Mouse;

/// Data port: the output buffer is read, data of commands is written.
pub const DATA_PORT: u16 = 0x60;
/// Status is read, commands are written.
pub const COMMAND_PORT: u16 = 0x64;
/// ISA interrupt of the keyboard.
pub const KEYBOARD_IRQ: u8 = 1;
/// ISA interrupt of the auxiliary device, here the mouse.
pub const AUX_IRQ: u8 = 12;

/// Bits of the status register.
mod status {
    /// The output buffer is full.
    pub const OUTPUT_FULL: u8 = 1 << 0;
    /// The self-test was passed.
    pub const SYSTEM_FLAG: u8 = 1 << 2;
    /// What was written last was a command.
    pub const COMMAND: u8 = 1 << 3;
    /// The keyboard is not locked.
    pub const NOT_LOCKED: u8 = 1 << 4;
    /// What is in the output buffer is of the auxiliary device.
    pub const AUX: u8 = 1 << 5;
    /// A device did not answer.
    pub const TIME_OUT: u8 = 1 << 6;
}

/// Bits of the command byte, which is byte 0 of the controller's memory.
mod command_byte {
    pub const KEYBOARD_INTERRUPT: u8 = 1 << 0;
    pub const AUX_INTERRUPT: u8 = 1 << 1;
    pub const SYSTEM_FLAG: u8 = 1 << 2;
    pub const KEYBOARD_DISABLED: u8 = 1 << 4;
    pub const AUX_DISABLED: u8 = 1 << 5;
    pub const TRANSLATE: u8 = 1 << 6;
    /// As firmware leaves it for a machine with a mouse.
    pub const AFTER_RESET: u8 =
        KEYBOARD_INTERRUPT | AUX_INTERRUPT | SYSTEM_FLAG | AUX_DISABLED | TRANSLATE;
}

/// Bytes of the controller's memory that commands reach.
const RAM_BYTES: usize = 32;
/// Answers of the controller that wait for the output buffer. A guest that asks for more without
/// reading any loses them.
const MAX_ANSWERS: usize = 16;
/// What a device is taken to say that does not answer ("resend").
const NO_ANSWER: u8 = 0xfe;

/// A byte that is in the output buffer, or waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Output {
    byte: u8,
    /// It is of the auxiliary device.
    aux: bool,
    /// It stands for an answer that did not come.
    time_out: bool,
}

impl Output {
    fn own(byte: u8) -> Self {
        Self {
            byte,
            aux: false,
            time_out: false,
        }
    }

    fn aux(byte: u8) -> Self {
        Self {
            aux: true,
            ..Self::own(byte)
        }
    }
}

/// All that a controller and its mouse remember.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Registers {
    ram: [u8; RAM_BYTES],
    /// The self-test was passed.
    tested: bool,
    /// What was written last went to the command port.
    command_last: bool,
    /// The command whose data is to be written next.
    awaits: Option<u8>,
    /// What the data port shows; also when the guest has read it.
    data: Output,
    /// The guest has not read it yet.
    full: bool,
    answers: VecDeque<Output>,
    mouse: Mouse,
}

impl Registers {
    fn new() -> Self {
        let mut ram = [0; RAM_BYTES];
        ram[0] = command_byte::AFTER_RESET;
        Self {
            ram,
            tested: true,
            command_last: false,
            awaits: None,
            data: Output::own(0),
            full: false,
            answers: VecDeque::new(),
            mouse: Mouse::default(),
        }
    }
}

/// What the controller's reset line is connected to.
pub type OnReset = Box<dyn Fn() + Send + Sync>;

/// The controller. Share it in a [`Mutex`] and map [`Port`]s of it.
pub struct I8042 {
    registers: Registers,
    keyboard_line: Arc<dyn IrqLine>,
    aux_line: Arc<dyn IrqLine>,
    on_reset: OnReset,
    /// Lines stay as they are.
    frozen: bool,
    /// A byte has come while they did.
    came_frozen: bool,
    /// The auxiliary device's line stays down.
    withheld: bool,
}

impl I8042 {
    /// A controller as after power-on, with a mouse. `on_reset` is called where the guest has it
    /// restart the machine.
    pub fn new(
        keyboard_line: Arc<dyn IrqLine>,
        aux_line: Arc<dyn IrqLine>,
        on_reset: OnReset,
    ) -> Self {
        Self {
            registers: Registers::new(),
            keyboard_line,
            aux_line,
            on_reset,
            frozen: false,
            came_frozen: false,
            withheld: false,
        }
    }

    /// Goes back to the state after power-on; what the host has sent and the guest has not seen is
    /// lost. Lines that were withheld or frozen are let go: whoever did it knows nothing of the
    /// driver that comes next.
    pub fn reset(&mut self) {
        (self.withheld, self.frozen, self.came_frozen) = (false, false, false);
        self.become_registers(Registers::new());
    }

    /// Has the mouse see `event`: all of it, or nothing.
    ///
    /// # Errors
    /// The guest does not listen, or has not taken what came before.
    pub fn move_mouse(&mut self, event: MouseEvent) -> Result<(), NotMoved> {
        self.registers.mouse.happened(event)?;
        self.fill();
        Ok(())
    }

    /// What became of the mouse's events.
    pub fn mouse_counts(&self) -> MouseCounts {
        self.registers.mouse.counts()
    }

    /// The status register.
    fn status(&self) -> u8 {
        let registers = &self.registers;
        let bit = |is: bool, bit: u8| if is { bit } else { 0 };
        status::NOT_LOCKED
            | bit(registers.full, status::OUTPUT_FULL)
            | bit(registers.full && registers.data.aux, status::AUX)
            | bit(registers.full && registers.data.time_out, status::TIME_OUT)
            | bit(registers.tested, status::SYSTEM_FLAG)
            | bit(registers.command_last, status::COMMAND)
    }

    /// Takes the byte out of the output buffer. Where there is none the last one shows.
    fn read_data(&mut self) -> u8 {
        let byte = self.registers.data.byte;
        if std::mem::take(&mut self.registers.full) {
            self.drive();
            self.fill();
        }
        byte
    }

    fn command(&mut self, command: u8) {
        self.registers.command_last = true;
        self.registers.awaits = None;
        let ram_byte = usize::from(command) % RAM_BYTES;
        match command {
            0x20..=0x3f => self.answer(Output::own(self.registers.ram[ram_byte])),
            0x60..=0x7f | 0xd1..=0xd4 => self.registers.awaits = Some(command),
            // No password is set.
            0xa4 => self.answer(Output::own(0xf1)),
            0xa7 => self.change_command_byte(0, command_byte::AUX_DISABLED),
            0xa8 => self.change_command_byte(command_byte::AUX_DISABLED, 0),
            // Tests of the controller itself and of both interfaces: nothing is wrong.
            0xaa => {
                self.registers.tested = true;
                self.answer(Output::own(0x55));
            }
            0xa9 | 0xab => self.answer(Output::own(0)),
            0xad => self.change_command_byte(0, command_byte::KEYBOARD_DISABLED),
            0xae => self.change_command_byte(command_byte::KEYBOARD_DISABLED, 0),
            // The input port: the keyboard is not locked. Both clocks and data lines are up.
            0xc0 => self.answer(Output::own(0x80)),
            0xe0 => self.answer(Output::own(0x03)),
            0xd0 => {
                let port = self.output_port();
                self.answer(Output::own(port));
            }
            // Pulses of the output port: its bit 0 is the reset line, and goes down where it is 0.
            0xf0..=0xff if command & 1 == 0 => (self.on_reset)(),
            // Others that there were on some controllers do nothing.
            _ => {}
        }
    }

    /// The output port: gate A20 and the reset line are up, both interrupts as they are.
    fn output_port(&self) -> u8 {
        let (keyboard, aux) = self.wanted_lines();
        0x03 | u8::from(keyboard) << 4 | u8::from(aux) << 5
    }

    fn write_data(&mut self, byte: u8) {
        self.registers.command_last = false;
        match self.registers.awaits.take() {
            Some(command @ 0x60..=0x7f) => {
                self.registers.ram[usize::from(command) % RAM_BYTES] = byte;
                if command == 0x60 {
                    self.registers.tested = byte & command_byte::SYSTEM_FLAG != 0;
                    self.drive();
                    self.fill();
                }
            }
            Some(0xd1) if byte & 1 == 0 => (self.on_reset)(),
            Some(0xd2) => self.answer(Output::own(byte)),
            Some(0xd3) => self.answer(Output::aux(byte)),
            Some(0xd4) => {
                self.registers.mouse.told(byte);
                self.fill();
            }
            Some(_) => {}
            None => self.answer(Output {
                time_out: true,
                ..Output::own(NO_ANSWER)
            }),
        }
    }

    fn change_command_byte(&mut self, clear: u8, set: u8) {
        self.registers.ram[0] = self.registers.ram[0] & !clear | set;
        self.fill();
    }

    fn answer(&mut self, answer: Output) {
        if self.registers.answers.len() < MAX_ANSWERS {
            self.registers.answers.push_back(answer);
        }
        self.fill();
    }

    /// Puts the next byte into the output buffer if it is empty: answers of the controller first.
    fn fill(&mut self) {
        let registers = &mut self.registers;
        if registers.full {
            return;
        }
        let aux_is_on = registers.ram[0] & command_byte::AUX_DISABLED == 0;
        let next = registers.answers.pop_front().or_else(|| {
            let byte = aux_is_on.then(|| registers.mouse.next_byte()).flatten();
            byte.map(Output::aux)
        });
        if let Some(next) = next {
            registers.data = next;
            registers.full = true;
            self.came_frozen |= self.frozen;
            self.drive();
        }
    }

    /// Whether the keyboard's and the auxiliary device's line are to be asserted.
    fn wanted_lines(&self) -> (bool, bool) {
        let Registers {
            full, data, ram, ..
        } = &self.registers;
        let enabled = |bit: u8| *full && ram[0] & bit != 0;
        (
            !data.aux && enabled(command_byte::KEYBOARD_INTERRUPT),
            data.aux && enabled(command_byte::AUX_INTERRUPT),
        )
    }

    fn drive(&self) {
        if !self.frozen {
            let (keyboard, aux) = self.wanted_lines();
            self.keyboard_line.set_level(keyboard);
            self.aux_line.set_level(aux && !self.withheld);
        }
    }

    /// Interrupts anew for what is in the output buffer.
    fn drive_anew(&self) {
        if !self.frozen {
            self.keyboard_line.set_level(false);
            self.aux_line.set_level(false);
            self.drive();
        }
    }
}

/// One of a controller's two ports, for the bus.
pub struct Port {
    controller: Arc<Mutex<I8042>>,
    is_command: bool,
}

impl Port {
    /// [`DATA_PORT`] of `controller`.
    pub fn data(controller: Arc<Mutex<I8042>>) -> Self {
        Self {
            controller,
            is_command: false,
        }
    }

    /// [`COMMAND_PORT`] of `controller`.
    pub fn command(controller: Arc<Mutex<I8042>>) -> Self {
        Self {
            controller,
            is_command: true,
        }
    }
}

/// The controller, locked.
pub fn lock(controller: &Mutex<I8042>) -> MutexGuard<'_, I8042> {
    // Whatever a guest did that made it panic, its state is a state.
    controller.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BusDevice for Port {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        let mut controller = lock(&self.controller);
        // Each has one byte; the bus cuts what is longer.
        if let Some(byte) = data.first_mut() {
            *byte = match self.is_command {
                true => controller.status(),
                false => controller.read_data(),
            };
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let mut controller = lock(&self.controller);
        if let Some(byte) = data.first() {
            match self.is_command {
                true => controller.command(*byte),
                false => controller.write_data(*byte),
            }
        }
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod history_tests;
