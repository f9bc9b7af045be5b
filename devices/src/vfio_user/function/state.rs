//! The function's state: what is kept here, and what the server gives.

use std::sync::PoisonError;

use serde::{Deserialize, Serialize};

use super::{FunctionError, VfioUserFunction};
use crate::pci::config::ConfigSpaceState;
use crate::pci::msix::MsixState;
use crate::state::{Form, Part, StateError};

const FORM: Form = Form {
    kind: "function of another process",
    version: 1,
};

#[derive(Serialize, Deserialize)]
struct State {
    config: ConfigSpaceState,
    msix: Option<(u16, MsixState)>,
    server: Vec<u8>,
}

impl VfioUserFunction {
    /// Has the device stand still while guest memory and all states are taken: it reads and writes
    /// no memory and does not interrupt until [`VfioUserFunction::go_on`]. The guest stands still
    /// meanwhile: its accesses would be refused.
    ///
    /// # Errors
    /// Its server has gone, or does not give the device's state away.
    pub fn stop(&mut self) -> Result<(), FunctionError> {
        if !self.is_connected() {
            return Err(FunctionError::Gone);
        }
        if !self.client().can_migrate()? {
            return Err(FunctionError::Kept);
        }
        if let Err(error) = self.client().stop() {
            self.check::<()>(Err(error.clone()));
            return Err(error.into());
        }
        self.stopped = true;
        Ok(())
    }

    /// Has a device go on that was stopped. One whose server refuses that is as one whose server has
    /// gone: it would refuse each access, and whoever is attached anew begins with a device that
    /// runs.
    pub fn go_on(&mut self) {
        self.stopped = false;
        if self.is_connected() {
            let goes_on = self.client().go_on();
            if self.check(goes_on).is_none() && self.is_connected() {
                self.disconnect("its server does not have it go on");
            }
        }
    }

    pub(super) fn save_part(&self) -> Result<Part, StateError> {
        let server = {
            let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
            client.save()
        };
        let state = State {
            config: self.config.save(),
            msix: self.msix.as_ref().map(|msix| (msix.control(), msix.save())),
            server: server.map_err(|error| FORM.does_not_fit(error))?,
        };
        Part::new(FORM, &state)
    }

    pub(super) fn restore_part(&mut self, part: &Part) -> Result<(), StateError> {
        let state: State = part.open(FORM)?;
        match (&self.msix, &state.msix) {
            (None, None) => {}
            (Some(msix), Some((_, saved))) => {
                let check = msix.check(saved);
                check.map_err(|error| FORM.does_not_fit(error))?;
            }
            _ => return Err(FORM.does_not_fit("one has MSI-X, the other has not")),
        }
        let restored = self.config.restore(&state.config);
        restored.map_err(|error| FORM.does_not_fit(error))?;
        if let (Some(msix), Some((control, saved))) = (&mut self.msix, &state.msix) {
            let restored = msix.restore_with(saved, *control);
            restored.map_err(|error| FORM.does_not_fit(error))?;
        }
        // The server interrupts as soon as it goes on.
        let connected = self.connect_interrupts().and_then(|()| {
            let restored = self.client().restore(&state.server);
            restored.map_err(FunctionError::Client)
        });
        connected.map_err(|error| {
            if let FunctionError::Client(error) = &error {
                self.check::<()>(Err(error.clone()));
            }
            FORM.does_not_fit(error)
        })
    }
}
