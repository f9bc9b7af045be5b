//! The controller's whole state as one value, for checkpoints.

use serde::{Deserialize, Serialize};

use super::eeprom::Eeprom;
use super::interrupts::{InterruptState, LONGEST_THROTTLE_NS};
use super::packet::{Transmitter, TransmitterState};
use super::phy::Phy;
use super::regs::RegisterFile;
use super::timers::TimersState;
use super::{E1000, Error};
use crate::pci::config::ConfigSpaceState;
use crate::wire::MAX_FRAME_BYTES;

/// Everything that a controller is, besides what it is connected to.
///
/// It is taken between two register accesses and holds no pointer and no clock reading: timers are
/// stored as the time that they have left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct E1000State {
    config: ConfigSpaceState,
    registers: RegisterFile,
    eeprom: Eeprom,
    phy: Phy,
    transmitter: TransmitterState,
    /// Frame that waits for descriptors.
    held_frame: Option<Vec<u8>>,
    interrupt: InterruptState,
    timers: TimersState,
    io_address: u32,
}

impl E1000 {
    /// Takes the state. The controller goes on unchanged.
    pub fn save(&self) -> E1000State {
        let now = self.timers.now();
        E1000State {
            config: self.config.save(),
            registers: self.regs.clone(),
            eeprom: self.eeprom.clone(),
            phy: self.phy.clone(),
            transmitter: self.tx.save(),
            held_frame: self.rx.held.map(|length| self.rx.buffer[..length].to_vec()),
            interrupt: InterruptState {
                asserted: self.line.asserted,
                since_assertion_ns: self
                    .line
                    .last_assertion_ns
                    .map(|last| now.saturating_sub(last).min(LONGEST_THROTTLE_NS)),
            },
            timers: self.timers.save(),
            io_address: self.io_address,
        }
    }

    /// Becomes the controller that `state` was taken of; on an error nothing changes.
    ///
    /// The wire stays. Where its carrier differs from that of the saved controller's wire, the
    /// guest sees the link change.
    pub fn restore(&mut self, state: E1000State) -> Result<(), Error> {
        let held = state.held_frame.as_deref().unwrap_or(&[]);
        if !state.eeprom.is_valid() || !state.phy.is_valid() || held.len() > MAX_FRAME_BYTES {
            return Err(Error::InvalidState);
        }
        let transmitter = Transmitter::restore(state.transmitter).ok_or(Error::InvalidState)?;
        self.config.restore(&state.config)?;
        self.regs = state.registers;
        self.eeprom = state.eeprom;
        self.phy = state.phy;
        self.tx = transmitter;
        self.rx.held = state.held_frame.as_ref().map(|frame| {
            self.rx.buffer[..frame.len()].copy_from_slice(frame);
            frame.len()
        });
        self.io_address = state.io_address;
        self.timers.restore(&state.timers);
        self.line.asserted = state.interrupt.asserted;
        let since = state.interrupt.since_assertion_ns;
        self.line.last_assertion_ns = since.map(|since| {
            self.timers
                .now()
                .saturating_sub(since.min(LONGEST_THROTTLE_NS))
        });
        self.drive_line();
        self.update_link();
        // The event loop looks again at what it has to wait for.
        self.kick();
        Ok(())
    }
}
