//! Its state: taken, looked at, put back.

use super::{I8042, MAX_ANSWERS, Registers};
use crate::state::{Form, Part, StateError};

const FORM: Form = Form {
    kind: "keyboard controller",
    version: 1,
};

impl I8042 {
    /// The state of the controller and its mouse; what the host has sent and the guest has not seen
    /// is in it.
    ///
    /// # Errors
    /// It is longer than any state, which it is not.
    pub fn save(&self) -> Result<Part, StateError> {
        Part::new(FORM, &self.registers)
    }

    /// Goes on as the one that `part` was taken of. It interrupts once more for a byte that the
    /// guest has not read.
    ///
    /// # Errors
    /// It is the state of something else, or none that a controller can have. Nothing was changed.
    pub fn restore(&mut self, part: &Part) -> Result<(), StateError> {
        let registers: Registers = part.open(FORM)?;
        registers.check().map_err(|what| FORM.does_not_fit(what))?;
        self.become_registers(registers);
        Ok(())
    }

    pub(super) fn become_registers(&mut self, registers: Registers) {
        self.registers = registers;
        self.came_frozen |= self.frozen;
        self.drive_anew();
        // Where it stood still with an empty buffer there is nothing to be put into it; a state
        // that lies about that is made to go on.
        self.fill();
    }
}

impl Registers {
    fn check(&self) -> Result<(), &'static str> {
        if self.answers.len() > MAX_ANSWERS {
            return Err("it has more answers than it can have");
        }
        if !matches!(self.awaits, None | Some(0x60..=0x7f | 0xd1..=0xd4)) {
            return Err("it waits for the data of a command that has none");
        }
        self.mouse.check()
    }
}
