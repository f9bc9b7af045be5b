//! Slots of the PCI bus, for those who make devices.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::edge::Edge;
use devices::irq::{IrqLine, MsiVectors};
use devices::pci::bus::SharedFunction;
use devices::pci::config::InterruptPin;

use crate::error::Error;
use crate::layout;
use crate::machine::Machine;

/// A place for a PCI device, see [`crate::Vm::reserve_pci_slot`]. Free again when it is dropped
/// with nothing in it.
pub struct PciSlot {
    number: u8,
    machine: Arc<Machine>,
    edge: Arc<Edge>,
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
        self.edge.line(self.machine.line(gsi))
    }

    /// Message-signalled vectors for the device that will be put there.
    pub fn msi_vectors(&self, count: u16) -> Result<Arc<dyn MsiVectors>, Error> {
        let vectors = Arc::new(self.machine.routing.vectors(count)?);
        Ok(self.edge.vectors(vectors))
    }

    /// What stands between the guest and the device that will be put there.
    pub fn edge(&self) -> &Arc<Edge> {
        &self.edge
    }

    pub(crate) fn reserve(machine: &Arc<Machine>) -> Result<Self, Error> {
        Ok(Self {
            number: machine.hotplug.reserve().ok_or(Error::NoFreeSlot)?,
            machine: machine.clone(),
            edge: Arc::default(),
            filled: AtomicBool::new(false),
        })
    }

    pub(crate) fn insert(&self, function: SharedFunction) -> Result<(), Error> {
        let pci = &self.machine.pci;
        pci.insert_at_edge(self.number, function, self.edge.clone())?;
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
