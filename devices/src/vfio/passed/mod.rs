//! A function of the host that several users have by turns.
//!
//! ```text
//!   user A: PassedFunction ── Seat::Here ──► Hardware ──► VFIO: registers, IOMMU's map, interrupts
//!   user B: PassedFunction ── Seat::Parked ──► image of the device, in this process
//! ```
//!
//! The hardware is a value that one function at a time has: who has it has the turn. It is taken
//! from a function only when it stands still, its state is saved and it reaches no memory
//! ([`steps`]); what the driver of its user does then is done to an image of it
//! ([`crate::pci::registers::parked`]), from which it is loaded when it comes back. Whoever
//! switches has the tests of all this. Where nobody has described the device its users' drivers keep
//! its state themselves ([`driven`]).

pub mod driven;
mod function;
pub mod hardware;
pub mod kind;
pub mod opened;
mod state;
mod steps;
mod user_interrupts;
mod vectors;

pub use self::function::{Counters, PassedFunction};
pub use self::steps::silence;
use super::address::PciAddress;
use super::error::VfioError;
use crate::pci::registers::{CheckpointError, DescriptionError};

/// Why a function cannot be given to several users.
#[derive(Debug, thiserror::Error)]
pub enum PassedError {
    /// It cannot be had.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// A description is wrong.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// Its registers.
    #[error(transparent)]
    Registers(#[from] CheckpointError),
    /// Nobody has said how it is saved.
    #[error(
        "{address} is a {vendor:04x}:{device:04x}, of which there is no description: let its drivers keep its state, \
         with --state driver, or give it to one guest by `cofferdam run --nic vfio={address}`"
    )]
    NoDescription {
        /// The function.
        address: PciAddress,
        /// Its vendor identifier.
        vendor: u16,
        /// Its device identifier.
        device: u16,
    },
    /// There are no descriptors.
    #[error("no eventfd for the device: {0}")]
    Events(std::io::Error),
    /// What one user's driver leaves in it would be there in the next one's turn.
    #[error(
        "the host cannot reset {address} alone, so its state cannot be its drivers': give it to one guest by \
         `cofferdam run --nic vfio={address}`"
    )]
    NoReset {
        /// The function.
        address: PciAddress,
    },
    /// It cannot be reset.
    #[error("the device cannot be reset: {0}")]
    Reset(std::io::Error),
    /// Interrupts cannot be set.
    #[error("the device gets no interrupts: {0}")]
    Interrupts(std::io::Error),
    /// It is somebody else's now.
    #[error("the device is another guest's")]
    NotHere,
}
