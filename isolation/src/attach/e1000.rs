//! The 82540EM model as an isolated device: its whole state is one value, so a checkpoint is exact. The descriptor
//! rings, which it writes behind the processor's back, belong to the checkpoint.

use std::sync::{Arc, Mutex, PoisonError};

use devices::e1000::{E1000, E1000State, RingMemory};
use devices::pci::{BarRange, BarSpace, PciFunction};

use crate::domain::supervisor::DeviceAddress;

use super::device::{HeldDevice, IsolatedDevice};

/// The BAR with the registers (82540EM, PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's
/// Manual, 4.1.1).
const REGISTERS_BAR: u8 = 0;
/// Interrupt Mask Clear (13.4.21).
const IMC: u64 = 0xd8;
/// Receive Control; zero switches reception off (13.4.22).
const RCTL: u64 = 0x100;
/// Transmit Control; zero switches transmission off (13.4.33).
const TCTL: u64 = 0x400;

/// A controller shared with the bus and the event loop.
pub struct E1000Device(pub Arc<Mutex<E1000>>);

impl IsolatedDevice for E1000Device {
    fn hold(&self, with: &mut dyn FnMut(&mut dyn HeldDevice)) {
        let mut nic = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ranges = nic.decoded().into_iter().collect();
        with(&mut Held {
            nic: &mut nic,
            ranges,
            saved: None,
        });
    }
}

struct Held<'a> {
    nic: &'a mut E1000,
    /// Where the BARs are. Only configuration space moves them, which an isolated call does
    /// not reach.
    ranges: Vec<BarRange>,
    saved: Option<(E1000State, RingMemory)>,
}

impl Held<'_> {
    fn find(&self, at: DeviceAddress) -> Option<(u8, u64)> {
        let (is_port, address) = match at {
            DeviceAddress::Memory(gpa) => (false, gpa),
            DeviceAddress::Port(port) => (true, port.into()),
        };
        let ranges = self.ranges.iter();
        let mut ranges = ranges.filter(|range| (range.space == BarSpace::Io) == is_port);
        ranges.find_map(|range| {
            let offset = address.checked_sub(range.address)?;
            (offset < range.size_bytes).then_some((range.bar, offset))
        })
    }
}

impl HeldDevice for Held<'_> {
    fn owns(&self, gpa: u64) -> bool {
        self.find(DeviceAddress::Memory(gpa)).is_some()
    }

    fn owns_port(&self, port: u16) -> bool {
        self.find(DeviceAddress::Port(port)).is_some()
    }

    fn read(&mut self, at: DeviceAddress, data: &mut [u8]) {
        if let Some((bar, offset)) = self.find(at) {
            self.nic.bar_read(bar, offset, data);
        }
    }

    fn write(&mut self, at: DeviceAddress, data: &[u8]) {
        if let Some((bar, offset)) = self.find(at) {
            self.nic.bar_write(bar, offset, data);
        }
    }

    fn checkpoint(&mut self) {
        self.saved = Some((self.nic.save(), self.nic.save_rings()));
    }

    fn restore(&mut self) {
        let Some((state, rings)) = self.saved.take() else {
            return;
        };
        if let Err(error) = self.nic.restore(state) {
            tracing::error!("the NIC does not take back its own checkpoint: {error}");
        }
        self.nic.restore_rings(&rings);
    }

    fn silence(&mut self) {
        for (register, value) in [(IMC, u32::MAX), (RCTL, 0), (TCTL, 0)] {
            self.nic
                .bar_write(REGISTERS_BAR, register, &value.to_le_bytes());
        }
    }
}
