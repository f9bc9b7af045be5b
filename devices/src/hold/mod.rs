//! Devices that can be held: nobody else touches them meanwhile, their state can be taken and put
//! back.
//!
//! ```text
//!   Holdable::hold ──► the device stands still ──► HeldDevice: accesses, state, what others see ──► it goes on
//! ```
//!
//! Holding is asking: the device may be a lock away in this process, or a message away in another
//! one, which may be gone. Nothing here says what kind of device it is: what a network card calls
//! transmitter and link is *requests of others* and *what the outside sees*.

pub mod goes_on;
mod place;
mod set;

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub(crate) use self::place::{overtaking, place};
pub use self::set::HoldableSet;

/// Where a device is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceAddress {
    /// A guest physical address in a memory BAR.
    Memory(u64),
    /// A port in an I/O BAR.
    Port(u16),
}

/// What is done at a place of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It is read.
    Load,
    /// It is written.
    Store,
}

/// A device's state at one moment, which only the device understands.
#[derive(Clone)]
pub struct DeviceState(pub Arc<dyn Any + Send + Sync>);

impl fmt::Debug for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeviceState")
    }
}

/// How a device's state is taken at the beginning of a call that reaches it, and put back if the
/// call fails.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointBy {
    /// All of it as one value: only a model can give it away.
    #[default]
    Exact,
    /// What its registers show ([`crate::pci::registers`]), as of a piece of hardware.
    Registers,
}

impl CheckpointBy {
    /// All ways.
    pub const ALL: [Self; 2] = [Self::Exact, Self::Registers];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Registers => "registers",
        }
    }

    /// The way with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|by| by.name() == name)
    }
}

/// The state of a device could not be taken or put back: what it does from now on is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceLost(pub String);

/// Access to a device while nobody else has it.
pub trait HeldDevice {
    /// Whether guest physical address `gpa` is in one of the device's memory BARs, as they are
    /// placed now.
    fn owns(&self, gpa: u64) -> bool;

    /// Whether I/O port `port` is in one of the device's I/O BARs.
    fn owns_port(&self, port: u16) -> bool;

    /// Whether the device would own guest physical address `gpa` if it were not in a sleep state:
    /// its driver does not know that it is.
    fn sleeps_at(&self, _gpa: u64) -> bool {
        false
    }

    /// Loads `data.len()` bytes (1 to 8) from a place that the device owns.
    fn read(&mut self, at: DeviceAddress, data: &mut [u8]);

    /// What a load of `bytes` bytes shows, if it has no effect and the stores to `waiting`, which
    /// come before it, change nothing of that: it need not wait for them.
    fn read_past(
        &mut self,
        _at: DeviceAddress,
        _bytes: usize,
        _waiting: &mut dyn Iterator<Item = DeviceAddress>,
    ) -> Option<u64> {
        None
    }

    /// Stores `data` (1 to 8 bytes) to a place that the device owns.
    fn write(&mut self, at: DeviceAddress, data: &[u8]);

    /// Whether an access of `bytes` bytes at `at` may have the device look at guest memory, or
    /// write to it, before it is over. Where it does not, memory need not be as the device is to
    /// see it.
    fn uses_memory(&self, _at: DeviceAddress, _bytes: usize, _access: Access) -> bool {
        true
    }

    /// Takes the device's state.
    fn checkpoint(&mut self);

    /// Makes a device that goes on by itself stand still, before memory that it uses is put back,
    /// where that can be done. Puts nothing back by itself; [`HeldDevice::restore`] follows.
    fn stand_still(&mut self) {}

    /// Puts back the state that was taken last; the error is also that it could not be taken.
    fn restore(&mut self) -> Result<(), DeviceLost>;

    /// The device's state now, for [`HeldDevice::undo`]; `None` if it does not give it away.
    fn state(&self) -> Option<DeviceState>;

    /// Takes back what was done to the device in parts, between which others may have used it: its
    /// state before and after each part, oldest first. All or nothing; the error says what is in
    /// the way.
    fn undo(&mut self, parts: &[(DeviceState, DeviceState)]) -> Result<(), String>;

    /// Becomes what it was at `state`, one of its own; the error is also that it cannot.
    fn put_back(&mut self, state: &DeviceState) -> Result<(), DeviceLost>;

    /// Whether its driver switched on or off, or moved, the place that the device takes requests of
    /// others from between these two states: of a network card, whether it transmits and from which
    /// ring. What others ask for from then on is in the way of taking back what was done between
    /// the two.
    fn requests_changed(&self, before: &DeviceState, after: &DeviceState) -> bool;

    /// Guest memory that the device uses as a part of its state: address and length of descriptor
    /// rings.
    fn memory(&mut self) -> Vec<(u64, u64)>;

    /// Lets whether the device interrupts stay as it is until it is let go: the guest never learns
    /// of interrupts that a call takes back.
    fn freeze_interrupts(&mut self);

    /// Keeps the device from interrupting until it is told otherwise; what it wants to interrupt
    /// for waits.
    fn withhold_interrupts(&mut self, withhold: bool);

    /// A call of its driver has ended, or goes on in the guest; `failed` if it was taken back. What
    /// the device has interrupted for may not have been done then: a line that is asserted still
    /// interrupts again by itself, a message does not.
    fn call_ended(&mut self, _failed: bool) {}

    /// Keeps what the outside sees of it as it is until [`HeldDevice::show_outside`], whatever the
    /// guest sees of it: of a network card, the link that a port at the other end of the cable
    /// sees. A call that resets the device may still be taken back. Nothing for a device of which
    /// the outside sees no state.
    fn keep_outside(&mut self) {}

    /// Lets the outside see it as it is.
    fn show_outside(&mut self, _changes: OutsideChanges) {}

    /// Keeps the device from interrupting and from moving data: its driver does not run any more.
    fn silence(&mut self);
}

/// What the outside is to see of changes that came and were over again while it was kept from
/// seeing them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutsideChanges {
    /// They have happened: it sees them, late.
    Shown,
    /// They were taken back: it never sees them.
    Forgotten,
}

/// A device that can be held: neither the guest nor its own event handling touches it or guest
/// memory through it meanwhile.
pub trait Holdable: Send + Sync {
    /// Asks the device to hold, calls `with` with the device in hand, and lets it go on.
    ///
    /// # Errors
    /// The device does not answer, or did not hold: `with` was not called.
    fn hold(&self, with: &mut dyn FnMut(&mut dyn HeldDevice)) -> Result<(), DeviceLost>;
}
