//! PCI functions of the host, given to a guest by VFIO (Linux, Documentation/driver-api/vfio.rst).
//!
//! ```text
//!   sysfs ── bind ──► vfio-pci has the function ── /dev/vfio/GROUP ──► VfioDevice ──► VfioFunction ──► guest
//!                                                        IOMMU's map ◄── DmaMap ◄── guest memory
//! ```
//!
//! `hold`: a function whose driver in the guest is isolated. [`passed`]: one function that several
//! users have by turns.

pub mod address;
mod areas;
pub mod binding;
pub mod device;
pub mod dma;
pub mod error;
pub mod function;
mod hold;
pub mod interrupts;
pub mod layout;
pub mod notices;
pub mod passed;
mod side;
mod sys;
