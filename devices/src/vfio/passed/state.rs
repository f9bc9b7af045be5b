//! The state of one of a function's users as a value: what a snapshot of its guest holds of it.
//!
//! ```text
//!   hold: quiesce, registers ─► saved_part ─► let_go: it runs as before
//!   take_over: configuration space, table of MSI-X; registers ─► the device, or the image
//! ```
//!
//! A user without the device has its image saved, and what is saved of either is loaded into the
//! other: whoever goes on may have the device then, or not. Causes of interrupts are no part of it:
//! a device that is loaded has its driver look at everything.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::PassedError;
use super::function::{PassedFunction, Seat, Stage};
use crate::pci::config::ConfigSpaceState;
use crate::pci::msix::MsixState;
use crate::pci::registers::RegisterCheckpoint;
use crate::pci::registers::parked::{Parked, ParkedLink, Shown, StoredState};
use crate::state::{Form, Part, StateError};

const FORM: Form = Form {
    kind: "function of the host",
    version: 1,
};

#[derive(Serialize, Deserialize)]
struct State {
    config: ConfigSpaceState,
    msix: Option<MsixState>,
    registers: StoredState,
}

impl PassedFunction {
    /// Has the device, if it is here, stand still, and knows its state, until [`Self::let_go`]. In
    /// between it may come and go.
    pub(super) fn hold(&mut self) -> Result<(), StateError> {
        self.held = true;
        let known = match self.has_device() {
            true => self.quiesce().and_then(|()| self.save()),
            false => Ok(()),
        };
        known.map_err(|error| FORM.does_not_fit(error))
    }

    /// Has the device go on, if it is here.
    pub(super) fn let_go(&mut self) {
        self.held = false;
        if let Some(Seat::Here {
            stage:
                Stage::Still {
                    running: Some(_),
                    saved,
                    foreign: false,
                },
            ..
        }) = &mut self.seat
        {
            // It has its state still, and its driver need not look at everything.
            *saved = None;
        }
        if self.has_device()
            && let Err(error) = self.go_on()
        {
            tracing::error!(%error, "the device of a guest that was saved does not go on");
        }
    }

    /// The state of a user whose device stands still, or is elsewhere.
    pub(super) fn saved_part(&self) -> Result<Part, StateError> {
        let registers = match &self.seat {
            Some(Seat::Parked { image, shown }) => {
                StoredState::new(&Parked::clone(image).into_checkpoint(), shown)
            }
            Some(Seat::Here {
                stage: Stage::Still {
                    saved: Some(saved), ..
                },
                ..
            }) => StoredState::new(&saved.0, &saved.1),
            _ => return Err(FORM.does_not_fit("it does not stand still")),
        };
        let state = State {
            config: self.side.config.save(),
            msix: self.side.msix.as_ref().map(|msix| msix.save()),
            registers,
        };
        Part::new(FORM, &state)
    }

    /// Goes on as the user that `part` was taken of: by the device, if it is here.
    ///
    /// # Errors
    /// It cannot be one of this function, or the device does not hold it: it stands still then and
    /// reaches no memory.
    pub(super) fn take_over(&mut self, part: &Part) -> Result<(), StateError> {
        let state: State = part.open(FORM)?;
        let (registers, shown) = state
            .registers
            .open(&self.kind.description)
            .map_err(|error| FORM.does_not_fit(error))?;
        match (&self.side.msix, &state.msix) {
            (None, None) => {}
            (Some(msix), Some(saved)) => {
                let check = msix.check(saved);
                check.map_err(|error| FORM.does_not_fit(error))?;
            }
            _ => return Err(FORM.does_not_fit("one has MSI-X, the other has not")),
        }
        let restored = self.side.config.restore(&state.config);
        restored.map_err(|error| FORM.does_not_fit(error))?;
        if let (Some(msix), Some(saved)) = (&mut self.side.msix, &state.msix) {
            let restored = msix.restore(saved, &self.side.config);
            restored.map_err(|error| FORM.does_not_fit(error))?;
        }
        self.held = false;
        let loaded = match self.has_device() {
            true => self.quiesce().and_then(|()| {
                self.replace(Box::new((registers, shown)));
                self.go_on()
            }),
            false => self.park(registers, shown, ParkedLink::Down),
        };
        loaded.map_err(|error: PassedError| {
            self.silence_here();
            FORM.does_not_fit(error)
        })
    }

    /// The device, which is here and stands still, is to have this state when it goes on.
    fn replace(&mut self, with: Box<(RegisterCheckpoint, Shown)>) {
        if let Some(Seat::Here { stage, .. }) = &mut self.seat {
            *stage = Stage::Still {
                running: None,
                saved: Some(with),
                foreign: true,
            };
        }
        self.forget_interrupts();
    }

    /// Gives its user another address: that of a NIC that was made with it.
    pub fn set_address(&mut self, address: [u8; 6]) {
        let survey = self.kind.survey.clone();
        self.survey = Arc::new(survey.with_address(&self.kind.description, address));
        self.address = address;
    }

    /// Gives the user this address in the place of the one that it was saved with, also in the
    /// registers.
    pub fn readdress(&mut self, address: [u8; 6]) {
        self.set_address(address);
        let description = self.kind.description.clone();
        let Some([(low, low_value), (high, high_value)]) = description.station_stores(address)
        else {
            return;
        };
        let has = [low, high].map(|at| match &mut self.seat {
            Some(Seat::Here { hardware, .. }) => hardware.load(at),
            Some(Seat::Parked { image, .. }) => {
                let mut bytes = [0; 4];
                image.read(at.into(), &mut bytes);
                u32::from_le_bytes(bytes)
            }
            None => 0,
        });
        if has == [low_value, high_value] {
            return;
        }
        // A half-written address is not valid.
        for (at, value) in [(high, 0), (low, low_value), (high, high_value)] {
            match &mut self.seat {
                Some(Seat::Here { hardware, .. }) => hardware.store(at, value),
                Some(Seat::Parked { image, .. }) => image.write(at.into(), &value.to_le_bytes()),
                None => {}
            }
        }
    }
}
