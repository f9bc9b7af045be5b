//! What is known of a function before anybody has it: how it is described, how it looks, what it is
//! after a reset.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::PassedError;
use super::hardware::Hardware;
use super::opened::{Opened, Shape};
use crate::pci::registers::Description;
use crate::pci::registers::parked::Survey;
use crate::vfio::address::PciAddress;
use crate::vfio::layout::GuestView;

/// See the module.
#[derive(Debug)]
pub struct Kind {
    pub(super) description: Arc<Description>,
    pub(super) survey: Survey,
    shape: Shape,
    /// Frames that it has lost while nobody had it, as far as it counts them.
    lost: AtomicU64,
}

impl Kind {
    /// A function that was opened: it is reset and stands still.
    ///
    /// # Errors
    /// There is no description by which it could be taken from one guest to another, or it does not
    /// answer.
    pub fn open(opened: Opened) -> Result<(Self, Box<dyn Hardware>), PassedError> {
        let (mut hardware, shape, description) = opened.described()?;
        hardware.set_bar(description.device.bar);
        Self::of(Box::new(hardware), description, shape)
    }

    /// The same for a function that is reached in another way.
    ///
    /// # Errors
    /// It is another one than is described, or does not answer.
    pub fn of(
        mut hardware: Box<dyn Hardware>,
        description: Description,
        shape: Shape,
    ) -> Result<(Self, Box<dyn Hardware>), PassedError> {
        hardware.set_master(false)?;
        if let Err(error) = hardware.reset() {
            tracing::debug!(%error, "the host does not reset the device");
        }
        hardware.set_master(false)?;
        // Its address is given to it with the state of whoever has it first.
        description.reset(hardware.as_mut(), [0; 6])?;
        let survey = description.survey(hardware.as_mut())?;
        description.quiesce(hardware.as_mut())?;
        let kind = Self {
            description: Arc::new(description),
            survey,
            shape,
            lost: AtomicU64::new(0),
        };
        kind.view()?;
        Ok((kind, hardware))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.description.device.name
    }

    /// Frames that it says to have lost while no user had it.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Counts some more of them.
    pub(super) fn add_lost(&self, lost: u64) {
        self.lost.fetch_add(lost, Ordering::Relaxed);
    }

    /// Where it is on the host.
    pub fn address(&self) -> PciAddress {
        self.shape.address
    }

    /// What a guest is shown.
    pub(super) fn view(&self) -> Result<GuestView, PassedError> {
        self.shape.view()
    }
}
