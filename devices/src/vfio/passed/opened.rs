//! A function that was opened and looked at, before it is known how its state is taken.

use super::PassedError;
use super::hardware::VfioHardware;
use crate::pci::config::{BAR_COUNT, CONFIG_SPACE_BYTES, offset};
use crate::pci::registers::Description;
use crate::vfio::address::PciAddress;
use crate::vfio::layout::{GuestView, HostView};
use crate::vfio::notices::Notices;

/// The least memory that a function is tried with: no guest has less.
const LEAST_MEMORY: u64 = 16 << 20;

/// What a function shows of itself on its bus.
#[derive(Debug, Clone)]
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

impl Shape {
    /// Its vendor and device identifiers.
    pub fn identity(&self) -> (u16, u16) {
        let word = |at: u16| {
            let at = usize::from(at);
            u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
        };
        (word(offset::VENDOR_ID), word(offset::DEVICE_ID))
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

/// See the module.
pub struct Opened {
    pub(super) hardware: VfioHardware,
    pub(super) shape: Shape,
    pub(super) description: Option<Description>,
}

impl Opened {
    /// The function at `address`, which `vfio-pci` has: it reaches no memory. What the host tells
    /// of it is told to `notices`.
    ///
    /// # Errors
    /// It cannot be had, or its description is wrong.
    pub fn open(address: PciAddress, notices: &Notices) -> Result<Self, PassedError> {
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
        let (vendor, device) = shape.identity();
        let description = Description::of_function(vendor, device)?;
        Ok(Self {
            hardware,
            shape,
            description,
        })
    }

    /// Whether its registers and rings are described.
    pub fn is_described(&self) -> bool {
        self.description.is_some()
    }

    /// The same with its description.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn described(self) -> Result<(VfioHardware, Shape, Description), PassedError> {
        let Self {
            hardware,
            shape,
            description,
        } = self;
        let (vendor, device) = shape.identity();
        let description = description.ok_or(PassedError::NoDescription {
            address: shape.address,
            vendor,
            device,
        })?;
        Ok((hardware, shape, description))
    }
}
