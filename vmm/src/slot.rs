//! Slots of the PCI bus, for those who make devices.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::irq::IrqLine;
use devices::pci::bus::SharedFunction;
use devices::pci::config::InterruptPin;

use crate::error::Error;
use crate::layout;
use crate::machine::Machine;

/// A place for a PCI device, see [`crate::Vm::reserve_pci_slot`]. Free again when it is dropped with nothing in it.
pub struct PciSlot {
    number: u8,
    machine: Arc<Machine>,
    filled: AtomicBool,
}

impl PciSlot {
    /// Device number on bus 0.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The slot's interrupt pin, for the device that will be put there.
    pub fn intx_line(&self, pin: InterruptPin) -> Arc<dyn IrqLine> {
        let gsi = layout::pci_gsi(self.number, pin as u8);
        self.machine.line(gsi)
    }

    pub(crate) fn reserve(machine: &Arc<Machine>) -> Result<Self, Error> {
        Ok(Self {
            number: machine.hotplug.reserve().ok_or(Error::NoFreeSlot)?,
            machine: machine.clone(),
            filled: AtomicBool::new(false),
        })
    }

    pub(crate) fn insert(&self, function: SharedFunction) -> Result<(), Error> {
        self.machine.pci.insert(self.number, function)?;
        self.filled.store(true, Ordering::Release);
        Ok(())
    }
}

impl Drop for PciSlot {
    fn drop(&mut self) {
        if !self.filled.load(Ordering::Acquire) {
            self.machine.hotplug.release(self.number);
        }
    }
}
