//! Why a domain could not be made or a call not be carried out.

use devices::hold::DeviceLost;

use super::monitor::MonitorError;
use super::private_vm::PrivateVmError;
use super::roots::RootError;
use super::view::ViewError;

/// Why a domain could not be made or a call not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// The private view.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The monitor area.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The private VM.
    #[error(transparent)]
    PrivateVm(#[from] PrivateVmError),
    /// The page-table roots.
    #[error(transparent)]
    Roots(#[from] RootError),
    /// No room in the guest's address space.
    #[error(
        "the guest has no free 2 MiB between its modules and its fixed mappings for the monitor area"
    )]
    NoRoom,
    /// Something is where the monitor area should be.
    #[error("there is guest memory at {0:#x}, where the monitor area should be")]
    MonitorPlace(u64),
    /// The watchdog thread could not be started.
    #[error("cannot start the domain's watchdog thread: {0}")]
    Watchdog(#[source] std::io::Error),
    /// A page that should hold driver text is not mapped.
    #[error("driver text at {0:#x} is not mapped in the guest")]
    TextNotMapped(u64),
    /// The device does not hold.
    #[error("the device cannot be held: {0}")]
    Device(#[from] DeviceLost),
    /// A rule of this crate was broken.
    #[error("internal error: {0}")]
    Internal(&'static str),
}
