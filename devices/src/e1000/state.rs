//! The controller's whole state as one value, for checkpoints.

use serde::{Deserialize, Serialize};

use super::eeprom::Eeprom;
use super::interrupts::{InterruptState, LONGEST_THROTTLE_NS};
use super::packet::{Transmitter, TransmitterState};
use super::phy::Phy;
use super::regs::{RCTL, RDBAL, RegisterFile, TCTL, TDBAL, rctl, tctl};
use super::ring::Ring;
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

/// The descriptor rings of a controller that was using them: guest memory that the controller writes behind the
/// processor's back, and so a part of what a driver's call changes.
#[derive(Debug, Clone, Default)]
pub struct RingMemory(Vec<(u64, Vec<u8>)>);

impl E1000 {
    /// Takes the contents of the rings that the controller uses now.
    pub fn save_rings(&self) -> RingMemory {
        let enabled = [(TDBAL, TCTL, tctl::EN), (RDBAL, RCTL, rctl::EN)]
            .into_iter()
            .filter(|(_, control, enable)| self.regs.get(*control) & enable != 0);
        let saved = enabled.filter_map(|(base, ..)| {
            let (address, bytes) = Ring::at(&self.regs, base).memory();
            let mut contents = vec![0; bytes];
            // A ring outside of guest memory is one that the controller cannot write either.
            self.dma.read(address, &mut contents).ok()?;
            Some((address, contents))
        });
        RingMemory(saved.collect())
    }

    /// Puts the rings' contents back: descriptors that the controller finished since then are as if it had not.
    pub fn restore_rings(&self, rings: &RingMemory) {
        for (address, contents) in &rings.0 {
            if let Err(error) = self.dma.write(*address, contents) {
                tracing::error!("a ring cannot be put back: {error}");
            }
        }
    }

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
