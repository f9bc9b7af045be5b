//! The isolated driver's device, as the domain reaches it.

use crate::domain::supervisor::DeviceAddress;

/// Access to a device while nobody else has it.
pub trait HeldDevice {
    /// Whether guest physical address `gpa` is in one of the device's memory BARs, as they are
    /// placed now.
    fn owns(&self, gpa: u64) -> bool;

    /// Whether I/O port `port` is in one of the device's I/O BARs.
    fn owns_port(&self, port: u16) -> bool;

    /// Loads `data.len()` bytes (1 to 8) from a place that the device owns.
    fn read(&mut self, at: DeviceAddress, data: &mut [u8]);

    /// Stores `data` (1 to 8 bytes) to a place that the device owns.
    fn write(&mut self, at: DeviceAddress, data: &[u8]);

    /// Takes the device's whole state.
    fn checkpoint(&mut self);

    /// Puts back the state that was taken last.
    fn restore(&mut self);

    /// Keeps the device from interrupting and from moving data: its driver does not run any more.
    fn silence(&mut self);
}

/// A device that can be held: neither the guest nor its own event handling touches it or guest
/// memory through it meanwhile.
pub trait IsolatedDevice: Send + Sync {
    /// Calls `with` with the device in hand.
    fn hold(&self, with: &mut dyn FnMut(&mut dyn HeldDevice));
}
