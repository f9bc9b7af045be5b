//! Where a function's interrupts go for one of its users.

use std::io;
use std::sync::Arc;

use super::PassedError;
use super::hardware::{Hardware, Interrupts};
use super::vectors::UserVectors;
use crate::pci::msix::Msix;
use crate::vfio::interrupts::Mode;
use crate::vfio::layout::FoundMsix;
use crate::vfio_user::server::ClientInterrupts;

/// See the module.
pub struct UserInterrupts {
    client: ClientInterrupts,
    vectors: Arc<UserVectors>,
    /// What interrupts: `None` if that is to be said anew.
    set: Option<(Mode, Vec<bool>)>,
}

impl UserInterrupts {
    /// For a user with as many vectors as the function shows it. Gives its table, too.
    ///
    /// # Errors
    /// There are no descriptors.
    pub fn new(msix: Option<FoundMsix>) -> io::Result<(Self, Option<Msix>)> {
        let client = ClientInterrupts::new(msix.map_or(0, |msix| msix.vectors));
        let vectors = Arc::new(UserVectors::new(client.vectors())?);
        let table = msix.map(|found| Msix::at(vectors.clone(), found.layout, found.capability));
        let interrupts = Self {
            client,
            vectors,
            set: None,
        };
        Ok((interrupts, table))
    }

    /// What the user's client has given.
    pub fn client(&self) -> ClientInterrupts {
        self.client.clone()
    }

    /// Sets the level of the user's line.
    pub fn set_level(&self, level: bool) {
        self.client.line().set_level(level);
    }

    /// What interrupts is to be said anew.
    pub fn forget(&mut self) {
        self.set = None;
    }

    /// Has the interrupts of `hardware` go where the user wants them. Says whether that was news.
    ///
    /// # Errors
    /// There are no descriptors, or the host refuses it.
    pub fn direct(&mut self, hardware: &mut dyn Hardware, mode: Mode) -> Result<bool, PassedError> {
        let wanted = (mode, self.vectors.open());
        if self.set.as_ref() == Some(&wanted) {
            return Ok(false);
        }
        let to = match mode {
            Mode::Off => Interrupts::Off,
            Mode::Intx => match self.client.line().events() {
                Some(events) => Interrupts::Line(events),
                None => Interrupts::Off,
            },
            Mode::Msix => Interrupts::Messages(self.vectors.events().map_err(PassedError::Events)?),
        };
        self.set = None;
        hardware
            .set_interrupts(to)
            .map_err(PassedError::Interrupts)?;
        self.set = Some(wanted);
        Ok(true)
    }

    /// Vectors for which something came while they could not be delivered.
    pub fn take_waiting(&self) -> Vec<u16> {
        self.vectors.take_waiting()
    }
}
