//! A function of the host that a guest has for itself, as a device that can be held: its driver's calls are isolated.
//!
//! Holding it keeps the guest and this process away from it. The function itself goes on: it reads and writes guest memory
//! and interrupts the guest whenever it likes. Whoever isolates its driver has to reckon with that; interrupts cannot be
//! frozen, so the guest may get some for what a call has taken back, and finds nothing to do.
//!
//! ```text
//!   checkpoint ─► its registers and rings, while it runs          (only of a function with a description)
//!   restore    ─► it stands still ─► rings, registers ─► it runs, and its driver is told to look
//!   without a description: a call that has reached it and fails loses it; its driver has to begin anew
//! ```
//!
//! What came in between is lost with the checkpoint, as on a link flap: the rings are those of the checkpoint, too.

use std::sync::{Arc, Mutex, PoisonError};

use super::device::VfioRegisters;
use super::function::VfioFunction;
use crate::hold::{
    Access, DeviceAddress, DeviceLost, DeviceState, HeldDevice, Holdable, OutsideChanges,
};
use crate::pci::registers::{CheckpointError, Description, RegisterCheckpoint};
use crate::pci::{BarIndex, BarRange, BarSpace, PciFunction};

/// See the module.
pub struct HoldableFunction {
    function: Arc<Mutex<VfioFunction>>,
    description: Option<Arc<Description>>,
}

impl HoldableFunction {
    /// `function`, whose registers are described there, if they are.
    pub fn new(function: Arc<Mutex<VfioFunction>>, description: Option<Arc<Description>>) -> Self {
        Self {
            function,
            description,
        }
    }
}

impl Holdable for HoldableFunction {
    fn hold(&self, with: &mut dyn FnMut(&mut dyn HeldDevice)) -> Result<(), DeviceLost> {
        let mut function = self.function.lock().unwrap_or_else(PoisonError::into_inner);
        let ranges = function.decoded();
        with(&mut Held {
            function: &mut function,
            description: self.description.as_deref(),
            ranges,
            saved: Saved::Nothing,
        });
        Ok(())
    }
}

/// A checkpoint.
enum Saved {
    Nothing,
    Registers(Box<RegisterCheckpoint>),
    Failed(DeviceLost),
}

struct Held<'a> {
    function: &'a mut VfioFunction,
    description: Option<&'a Description>,
    /// Where the BARs are. Only configuration space moves them, which an isolated call does not reach.
    ranges: Vec<BarRange>,
    saved: Saved,
}

impl Held<'_> {
    fn find(&self, at: DeviceAddress) -> Option<(BarIndex, u64)> {
        let (is_port, address) = match at {
            DeviceAddress::Memory(gpa) => (false, gpa),
            DeviceAddress::Port(port) => (true, port.into()),
        };
        let mut ranges = self.ranges.iter();
        ranges.find_map(|range| {
            let offset = address.checked_sub(range.address)?;
            let is_in = offset < range.size_bytes && (range.space == BarSpace::Io) == is_port;
            is_in.then_some((range.bar, offset))
        })
    }

    fn take(&mut self) -> Result<RegisterCheckpoint, DeviceLost> {
        let Some(description) = self.description else {
            let device = self.function.device().address();
            return Err(DeviceLost(format!(
                "there is no description of the registers of {device}, by which it could be put back"
            )));
        };
        let memory = self.function.dma().clone();
        let taken = description.take(self.function, &memory);
        taken.map_err(|error| DeviceLost(error.to_string()))
    }
}

impl VfioFunction {
    /// Puts a state back that the function had.
    fn put_back(
        &mut self,
        description: &Description,
        saved: &RegisterCheckpoint,
    ) -> Result<(), CheckpointError> {
        let (device, bar) = (self.device().clone(), description.device.bar);
        let registers = &mut VfioRegisters::new(&device, bar);
        // Its rings are written behind it.
        description.quiesce(registers)?;
        let memory = self.dma().clone();
        description.put_back(self, &memory, saved)?;
        // Causes that have masked themselves are not raised anew; their message may be of what has just been taken back.
        let told = description.told(registers);
        let vectors = (0..u32::BITS as u16).filter(|vector| told >> vector & 1 != 0);
        self.interrupt(vectors.collect());
        Ok(())
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
            self.function.bar_read(bar, offset, data);
        }
    }

    fn read_past(
        &mut self,
        at: DeviceAddress,
        bytes: usize,
        waiting: &mut dyn Iterator<Item = DeviceAddress>,
    ) -> Option<u64> {
        let description = self.description?;
        let registers = description.device.bar;
        let (bar, offset) = self.find(at).filter(|(bar, _)| *bar == registers)?;
        // A store elsewhere may be to any register.
        let waiting = waiting.map(|at| match self.find(at) {
            Some((bar, offset)) if bar == registers => offset,
            _ => u64::MAX,
        });
        if !description.may_overtake(offset, bytes, waiting) {
            return None;
        }
        let mut value = [0; 8];
        self.function.bar_read(bar, offset, value.get_mut(..bytes)?);
        Some(u64::from_le_bytes(value))
    }

    fn write(&mut self, at: DeviceAddress, data: &[u8]) {
        if let Some((bar, offset)) = self.find(at) {
            self.function.bar_write(bar, offset, data);
        }
    }

    // A store may be a doorbell. A load has a device do nothing that its own accesses of memory would have to wait for.
    fn uses_memory(&self, at: DeviceAddress, _bytes: usize, access: Access) -> bool {
        access == Access::Store && self.find(at).is_some()
    }

    fn checkpoint(&mut self) {
        self.saved = match self.take() {
            Ok(saved) => Saved::Registers(Box::new(saved)),
            Err(lost) => Saved::Failed(lost),
        };
    }

    fn restore(&mut self) -> Result<(), DeviceLost> {
        match (
            std::mem::replace(&mut self.saved, Saved::Nothing),
            self.description,
        ) {
            (Saved::Registers(saved), Some(description)) => {
                let result = self.function.put_back(description, &saved);
                result.map_err(|error| DeviceLost(error.to_string()))
            }
            (Saved::Failed(lost), _) => Err(lost),
            _ => Ok(()),
        }
    }

    // What registers show is not enough to tell who changed what in between.
    fn state(&self) -> Option<DeviceState> {
        None
    }

    fn undo(&mut self, _parts: &[(DeviceState, DeviceState)]) -> Result<(), String> {
        Err("the host's device does not give its state away".to_owned())
    }

    fn put_back(&mut self, _state: &DeviceState) -> Result<(), DeviceLost> {
        Err(DeviceLost(
            "the host's device does not take a state".to_owned(),
        ))
    }

    fn requests_changed(&self, _before: &DeviceState, _after: &DeviceState) -> bool {
        true
    }

    fn memory(&self) -> Vec<(u64, u64)> {
        let device = self.function.device();
        self.description.map_or_else(Vec::new, |description| {
            description.rings(&mut VfioRegisters::new(device, description.device.bar))
        })
    }

    // It interrupts by itself; see the module.
    fn freeze_interrupts(&mut self) {}

    fn withhold_interrupts(&mut self, withhold: bool) {
        self.function.withhold_interrupts(withhold);
    }

    fn call_ended(&mut self, failed: bool) {
        self.function.call_ended(failed);
    }

    fn show_outside(&mut self, _changes: OutsideChanges) {}

    fn silence(&mut self) {
        let device = self.function.device().clone();
        if let Some(description) = self.description {
            let registers = &mut VfioRegisters::new(&device, description.device.bar);
            description.silence(registers);
        } else {
            self.function.silence();
        }
    }
}
