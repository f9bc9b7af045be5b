//! What is known of a function before anybody has it: how it is described, how it looks, what it is
//! after a reset.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::PassedError;
use super::hardware::{Hardware, VfioHardware};
use crate::pci::config::{BAR_COUNT, CONFIG_SPACE_BYTES, offset};
use crate::pci::registers::Description;
use crate::pci::registers::parked::Survey;
use crate::vfio::address::PciAddress;
use crate::vfio::layout::{GuestView, HostView};
use crate::vfio::notices::Notices;

/// The least memory that a function is tried with: no guest has less.
const LEAST_MEMORY: u64 = 16 << 20;

/// See the module.
#[derive(Debug)]
pub struct Kind {
    pub(super) description: Arc<Description>,
    pub(super) survey: Survey,
    address: PciAddress,
    bytes: [u8; CONFIG_SPACE_BYTES],
    bars: [u64; BAR_COUNT],
    has_pin: bool,
    /// Frames that it has lost while nobody had it, as far as it counts them.
    lost: AtomicU64,
}

/// What a function shows of itself on its bus.
pub struct Shape {
    /// Where it is.
    pub address: PciAddress,
    /// Its configuration space.
    pub bytes: [u8; CONFIG_SPACE_BYTES],
    /// Bytes of each of its base address registers.
    pub bars: [u64; BAR_COUNT],
    /// Whether its pin can be used.
    pub has_pin: bool,
}

impl Kind {
    /// The function at `address`, which `vfio-pci` has: it was reset, stands still and reaches no
    /// memory. What the host tells of it is told to `notices`.
    ///
    /// # Errors
    /// It cannot be had, or there is no description by which it could be taken from one guest to
    /// another.
    pub fn open(
        address: PciAddress,
        notices: &Notices,
    ) -> Result<(Self, Box<dyn Hardware>), PassedError> {
        let mut hardware = VfioHardware::open(address)?;
        hardware.have_told(notices);
        hardware.try_memory(LEAST_MEMORY)?;
        let (bytes, bars) = hardware.space()?;
        let shape = Shape {
            address,
            bytes,
            bars,
            has_pin: hardware.has_pin(),
        };
        let id = |at: u16| u16::from_le_bytes([bytes[usize::from(at)], bytes[usize::from(at) + 1]]);
        let (vendor, device) = (id(offset::VENDOR_ID), id(offset::DEVICE_ID));
        let description = Description::of_function(vendor, device)?;
        let description = description.ok_or(PassedError::NoDescription {
            address,
            vendor,
            device,
        })?;
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
            address: shape.address,
            bytes: shape.bytes,
            bars: shape.bars,
            has_pin: shape.has_pin,
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
        self.address
    }

    /// What a guest is shown.
    pub(super) fn view(&self) -> Result<GuestView, PassedError> {
        let view = HostView {
            bytes: &self.bytes,
            bars: self.bars,
        };
        let mut view = view.for_guest(self.address)?;
        view.has_pin &= self.has_pin;
        Ok(view)
    }
}
