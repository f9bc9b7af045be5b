//! The 82540EM model as a device that can be held. Its whole state is one value, which a checkpoint
//! may hold; or it is taken by its registers as that of a piece of hardware would be. The
//! descriptor rings, which it writes behind the processor's back, belong to either.

use std::sync::{Arc, Mutex, PoisonError};

use super::mmio::store_uses_memory;
use super::{E1000, Moment};
use crate::pci::registers::{Description, DescriptionError, RegisterCheckpoint};
use crate::pci::{BarRange, PciFunction};

use crate::hold::{
    Access, CheckpointBy, DeviceAddress, DeviceLost, DeviceState, HeldDevice, Holdable,
    OutsideChanges, overtaking, place,
};

/// The BAR with the registers (82540EM, PCI/PCI-X Family of Gigabit Ethernet Controllers Software
/// Developer's Manual, 4.1.1).
const REGISTERS_BAR: u8 = 0;
/// Interrupt Mask Clear (13.4.21).
const IMC: u64 = 0xd8;
/// Receive Control; zero switches reception off (13.4.22).
const RCTL: u64 = 0x100;
/// Transmit Control; zero switches transmission off (13.4.33).
const TCTL: u64 = 0x400;

/// A controller shared with the bus and the event loop.
pub struct HoldableE1000 {
    nic: Arc<Mutex<E1000>>,
    registers: Description,
    by: CheckpointBy,
}

impl HoldableE1000 {
    /// The controller, whose state is taken in this way.
    pub fn new(nic: Arc<Mutex<E1000>>, by: CheckpointBy) -> Result<Self, DescriptionError> {
        let registers = Description::intel_82540em()?;
        Ok(Self { nic, registers, by })
    }
}

impl Holdable for HoldableE1000 {
    fn hold(&self, with: &mut dyn FnMut(&mut dyn HeldDevice)) -> Result<(), DeviceLost> {
        let mut nic = self.nic.lock().unwrap_or_else(PoisonError::into_inner);
        let ranges = nic.decoded().into_iter().collect();
        with(&mut Held {
            nic: &mut nic,
            registers: &self.registers,
            by: self.by,
            ranges,
            saved: Saved::Nothing,
        });
        nic.freeze_interrupts(false);
        Ok(())
    }
}

/// A checkpoint.
enum Saved {
    Nothing,
    Exact(Box<Moment>),
    Registers(Box<RegisterCheckpoint>),
    Failed(DeviceLost),
}

struct Held<'a> {
    nic: &'a mut E1000,
    registers: &'a Description,
    by: CheckpointBy,
    /// Where the BARs are. Only configuration space moves them, which an isolated call does
    /// not reach.
    ranges: Vec<BarRange>,
    saved: Saved,
}

impl Held<'_> {
    fn find(&self, at: DeviceAddress) -> Option<(u8, u64)> {
        place(&self.ranges, at)
    }
}

impl HeldDevice for Held<'_> {
    fn owns(&self, gpa: u64) -> bool {
        self.find(DeviceAddress::Memory(gpa)).is_some()
    }

    fn owns_port(&self, port: u16) -> bool {
        self.find(DeviceAddress::Port(port)).is_some()
    }

    fn sleeps_at(&self, gpa: u64) -> bool {
        self.nic.sleeps_at(gpa)
    }

    fn read(&mut self, at: DeviceAddress, data: &mut [u8]) {
        if let Some((bar, offset)) = self.find(at) {
            self.nic.bar_read(bar, offset, data);
        }
    }

    fn read_past(
        &mut self,
        at: DeviceAddress,
        bytes: usize,
        waiting: &mut dyn Iterator<Item = DeviceAddress>,
    ) -> Option<u64> {
        let load = (at, bytes);
        let (bar, offset) = overtaking(self.registers, &self.ranges, load, waiting)?;
        let mut value = [0; 8];
        self.nic.bar_read(bar, offset, value.get_mut(..bytes)?);
        Some(u64::from_le_bytes(value))
    }

    fn write(&mut self, at: DeviceAddress, data: &[u8]) {
        if let Some((bar, offset)) = self.find(at) {
            self.nic.bar_write(bar, offset, data);
        }
    }

    fn uses_memory(&self, at: DeviceAddress, bytes: usize, access: Access) -> bool {
        match (access, self.find(at)) {
            (Access::Load, _) | (_, None) => false,
            (Access::Store, Some((REGISTERS_BAR, offset))) => store_uses_memory(offset, bytes),
            // By the window of I/O ports to any register.
            (Access::Store, Some(_)) => true,
        }
    }

    fn checkpoint(&mut self) {
        if self.by == CheckpointBy::Exact {
            let exact = (self.nic.save(), self.nic.save_rings());
            self.saved = Saved::Exact(Box::new(exact));
            return;
        }
        let memory = self.nic.memory().clone();
        self.saved = match self.registers.take(self.nic, &memory) {
            Ok(saved) => Saved::Registers(Box::new(saved)),
            Err(error) => Saved::Failed(DeviceLost(error.to_string())),
        };
    }

    fn restore(&mut self) -> Result<(), DeviceLost> {
        let lost = |error: &dyn std::fmt::Display| DeviceLost(error.to_string());
        match std::mem::replace(&mut self.saved, Saved::Nothing) {
            Saved::Exact(exact) => {
                let (state, rings) = *exact;
                self.nic.restore(state).map_err(|error| lost(&error))?;
                self.nic.restore_rings(&rings);
                Ok(())
            }
            Saved::Registers(saved) => {
                let memory = self.nic.memory().clone();
                let result = self.registers.put_back(self.nic, &memory, &saved);
                result.map_err(|error| lost(&error))
            }
            Saved::Failed(error) => Err(error),
            Saved::Nothing => Ok(()),
        }
    }

    fn state(&self) -> Option<DeviceState> {
        // What registers show is not enough to tell who changed what in between.
        let is_exact = self.by == CheckpointBy::Exact;
        is_exact.then(|| DeviceState(Arc::new((self.nic.save(), self.nic.save_rings()))))
    }

    fn undo(&mut self, parts: &[(DeviceState, DeviceState)]) -> Result<(), String> {
        let parts: Option<Vec<_>> = parts
            .iter()
            .map(|(before, after)| Some((saved(before)?, saved(after)?)))
            .collect();
        let parts = parts.ok_or("its checkpoints are another device's")?;
        self.nic.undo(&parts).map_err(|error| error.to_string())
    }

    fn put_back(&mut self, state: &DeviceState) -> Result<(), DeviceLost> {
        let foreign = || DeviceLost("its state is another device's".to_owned());
        let (state, rings) = saved(state).ok_or_else(foreign)?;
        let result = self.nic.restore(state.clone());
        result.map_err(|error| DeviceLost(error.to_string()))?;
        self.nic.restore_rings(rings);
        Ok(())
    }

    fn requests_changed(&self, before: &DeviceState, after: &DeviceState) -> bool {
        let states = saved(before).zip(saved(after));
        states.is_some_and(|((before, _), (after, _))| before.transmits_otherwise(after))
    }

    fn memory(&mut self) -> Vec<(u64, u64)> {
        self.nic.ring_ranges()
    }

    fn freeze_interrupts(&mut self) {
        self.nic.freeze_interrupts(true);
    }

    fn withhold_interrupts(&mut self, withhold: bool) {
        self.nic.withhold_interrupts(withhold);
    }

    fn keep_outside(&mut self) {
        self.nic.hold_link();
    }

    fn show_outside(&mut self, changes: OutsideChanges) {
        self.nic.let_link_go(changes == OutsideChanges::Shown);
    }

    fn silence(&mut self) {
        for (register, value) in [(IMC, u32::MAX), (RCTL, 0), (TCTL, 0)] {
            self.nic
                .bar_write(REGISTERS_BAR, register, &value.to_le_bytes());
        }
    }
}

fn saved(state: &DeviceState) -> Option<&Moment> {
    state.0.downcast_ref()
}
