//! PCI functions of the host, given to a guest by VFIO (Linux, Documentation/driver-api/vfio.rst).
//!
//! ```text
//!   sysfs ── bind ──► vfio-pci has the function ── /dev/vfio/GROUP ──► this process ──► guest
//! ```

pub mod address;
pub mod binding;
