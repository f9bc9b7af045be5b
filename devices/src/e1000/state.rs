//! The controller's whole state as one value, for checkpoints.

use serde::{Deserialize, Serialize};

use super::eeprom::Eeprom;
use super::interrupts::{InterruptState, LONGEST_THROTTLE_NS};
use super::packet::{Transmitter, TransmitterState};
use super::phy::Phy;
use super::regs::{
    CTRL, RCTL, RDBAH, RDBAL, RDH, RDLEN, RDT, RegisterFile, TCTL, TDBAH, TDBAL, TDH, TDLEN, TDT,
    rctl, tctl,
};
use super::ring::Ring;
use super::timers::TimersState;
use super::{E1000, Error};
use crate::pci::config::ConfigSpaceState;
use crate::state::{Form, Part, StateError};
use crate::wire::MAX_FRAME_BYTES;

const FORM: Form = Form {
    kind: "82540EM",
    version: 1,
};

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

/// The descriptor rings of a controller that was using them: guest memory that the controller
/// writes behind the processor's back, and so a part of what a driver's call changes.
#[derive(Debug, Clone, Default)]
pub struct RingMemory(Vec<(u64, Vec<u8>)>);

/// A controller and the descriptor rings that it uses, at one moment.
pub type Moment = (E1000State, RingMemory);

/// Registers that the controller and its driver move along together: what one of them did in
/// between cannot be put together with where they were before.
const ENTANGLED: [u32; 13] = [
    CTRL, RCTL, TCTL, RDBAL, RDBAH, RDLEN, RDH, RDT, TDBAL, TDBAH, TDLEN, TDH, TDT,
];

/// Registers that say whether and from where the controller transmits. The head is its own to move.
const TRANSMISSION: [u32; 5] = [TCTL, TDBAL, TDBAH, TDLEN, TDT];

impl E1000State {
    /// Whether its driver has switched transmission, moved the ring or its tail between this state
    /// and `after`.
    pub fn transmits_otherwise(&self, after: &Self) -> bool {
        let differs =
            |register: &u32| self.registers.get(*register) != after.registers.get(*register);
        TRANSMISSION.iter().any(differs)
    }

    /// This state without what was done between `before` and `after`.
    fn without(self, before: &Self, after: &Self) -> Result<Self, Error> {
        Ok(Self {
            registers: self
                .registers
                .without(&before.registers, &after.registers, &ENTANGLED)
                .map_err(Error::UsedMeanwhile)?,
            config: pick(self.config, &before.config, &after.config),
            eeprom: pick(self.eeprom, &before.eeprom, &after.eeprom),
            phy: pick(self.phy, &before.phy, &after.phy),
            transmitter: pick(self.transmitter, &before.transmitter, &after.transmitter),
            held_frame: pick(self.held_frame, &before.held_frame, &after.held_frame),
            io_address: pick(self.io_address, &before.io_address, &after.io_address),
            // Line and timers follow from the rest, or run on.
            interrupt: self.interrupt,
            timers: self.timers,
        })
    }
}

/// `now` unless it is what was left `after` something: then what was there `before` it.
fn pick<T: PartialEq + Clone>(now: T, before: &T, after: &T) -> T {
    if now == *after { before.clone() } else { now }
}

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

    /// Puts the rings' contents back: descriptors that the controller finished since then are as if
    /// it had not.
    pub fn restore_rings(&self, rings: &RingMemory) {
        for (address, contents) in &rings.0 {
            if let Err(error) = self.dma.write(*address, contents) {
                tracing::error!("a ring cannot be put back: {error}");
            }
        }
    }

    /// Where the rings are that the controller uses now: guest address and length in bytes.
    pub fn ring_ranges(&self) -> Vec<(u64, u64)> {
        let rings = self.save_rings().0.into_iter();
        rings
            .map(|(address, contents)| (address, contents.len() as u64))
            .collect()
    }

    /// Takes back what was done in parts, oldest first, with what the controller was before and
    /// after each, while it may have been used in between. What was changed in between stays; where
    /// that cannot go together with what was before, nothing is done.
    pub fn undo(&mut self, parts: &[(&Moment, &Moment)]) -> Result<(), Error> {
        let mut state = self.save();
        for ((before, _), (after, _)) in parts.iter().rev() {
            state = state.without(before, after)?;
        }
        for ((_, before), (_, after)) in parts.iter().rev() {
            self.undo_rings(before, after);
        }
        self.restore(state)?;
        self.update_interrupt();
        Ok(())
    }

    /// Puts back what the controller itself wrote into the descriptors of a ring that it used
    /// before and after.
    fn undo_rings(&self, before: &RingMemory, after: &RingMemory) {
        const DESCRIPTOR_BYTES: usize = 16;
        for (address, old) in &before.0 {
            let new = after
                .0
                .iter()
                .find(|(at, new)| at == address && new.len() == old.len());
            let Some((_, new)) = new else { continue };
            let mut now = vec![0; old.len()];
            if self.dma.read(*address, &mut now).is_err() {
                continue;
            }
            for at in (0..old.len()).step_by(DESCRIPTOR_BYTES) {
                let one = at..(at + DESCRIPTOR_BYTES).min(old.len());
                let (old, new, now) = (&old[one.clone()], &new[one.clone()], &now[one]);
                if now == new
                    && now != old
                    && let Err(error) = self.dma.write(address + at as u64, old)
                {
                    tracing::error!("a descriptor cannot be put back: {error}");
                }
            }
        }
    }

    /// The controller's state and its wire's, to be stored.
    pub(super) fn save_part(&self) -> Result<Part, StateError> {
        Part::new(FORM, &(self.save(), self.wire.save()?))
    }

    /// Goes on as the controller that `part` was taken of, with the wire that it was on.
    pub(super) fn restore_part(&mut self, part: &Part) -> Result<(), StateError> {
        let (state, wire): (E1000State, Option<Part>) = part.open(FORM)?;
        self.wire.restore(&wire)?;
        let result = self.restore(state);
        result.map_err(|error| FORM.does_not_fit(error))
    }

    /// Takes the state. The controller goes on unchanged.
    pub fn save(&self) -> E1000State {
        let now = self.timers.now();
        E1000State {
            config: self.config.save(),
            registers: self.registers(),
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
        self.set_registers(state.registers);
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
        self.tell_stations();
        self.update_link();
        // The event loop looks again at what it has to wait for.
        self.kick();
        Ok(())
    }
}
