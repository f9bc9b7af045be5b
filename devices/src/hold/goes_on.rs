//! Devices that cannot be held: they go on by themselves while a call of their driver is in its
//! domain. A function of the host is one, and one that another process has.
//!
//! Holding such a device keeps the guest and this process away from it. It reads and writes guest
//! memory and interrupts the guest whenever it likes; whoever isolates its driver has to reckon
//! with that. Interrupts cannot be frozen, so the guest may get some for what a call has taken
//! back, and finds nothing to do.
//!
//! ```text
//!   checkpoint ─► its state, while it runs           (where it can be taken)
//!   restore    ─► the state of then ─► it runs, and its driver is told to look
//!   without    ─► a call that has reached it and fails loses it; its driver has to begin anew
//! ```
//!
//! What came in between is lost with the checkpoint, as on a link flap.

use std::sync::{Arc, Mutex, PoisonError};

use super::{
    Access, DeviceAddress, DeviceLost, DeviceState, HeldDevice, Holdable, OutsideChanges,
    overtaking, place,
};
use crate::pci::registers::{Description, FunctionRegisters};
use crate::pci::{BarIndex, BarRange, PciFunction};

/// A function of a device that goes on by itself.
pub trait GoesOn: PciFunction + Send {
    /// Its state at one moment.
    type Checkpoint;

    /// Its state; it goes on unchanged. `description` is of its registers, if there is one.
    ///
    /// # Errors
    /// It cannot be taken.
    fn take(&mut self, description: Option<&Description>) -> Result<Self::Checkpoint, DeviceLost>;

    /// Puts a state back that it had, and has its driver look at everything.
    ///
    /// # Errors
    /// It does not take it: nobody can rely on it then.
    fn put_back(
        &mut self,
        description: Option<&Description>,
        saved: &Self::Checkpoint,
    ) -> Result<(), DeviceLost>;

    /// See [`HeldDevice::call_ended`].
    fn call_ended(&mut self, _failed: bool) {}

    /// See [`HeldDevice::withhold_interrupts`].
    fn withhold_interrupts(&mut self, withhold: bool);

    /// Keeps it from interrupting and from moving data until its driver configures it anew, without
    /// a description.
    fn silence(&mut self);
}

/// See the module.
pub struct HoldableFunction<F> {
    function: Arc<Mutex<F>>,
    description: Option<Arc<Description>>,
}

impl<F> HoldableFunction<F> {
    /// `function`, whose registers are described there, if they are.
    pub fn new(function: Arc<Mutex<F>>, description: Option<Arc<Description>>) -> Self {
        Self {
            function,
            description,
        }
    }
}

impl<F: GoesOn> Holdable for HoldableFunction<F> {
    fn hold(&self, with: &mut dyn FnMut(&mut dyn HeldDevice)) -> Result<(), DeviceLost> {
        let mut function = self.function.lock().unwrap_or_else(PoisonError::into_inner);
        let ranges = function.decoded();
        with(&mut Held {
            function: &mut *function,
            description: self.description.as_deref(),
            ranges,
            saved: None,
        });
        Ok(())
    }
}

struct Held<'a, F: GoesOn> {
    function: &'a mut F,
    description: Option<&'a Description>,
    /// Where the BARs are. Only configuration space moves them, which an isolated call does not
    /// reach.
    ranges: Vec<BarRange>,
    /// What was taken last, or why it could not be.
    saved: Option<Result<F::Checkpoint, DeviceLost>>,
}

impl<F: GoesOn> Held<'_, F> {
    fn find(&self, at: DeviceAddress) -> Option<(BarIndex, u64)> {
        place(&self.ranges, at)
    }
}

impl<F: GoesOn> HeldDevice for Held<'_, F> {
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
        let load = (at, bytes);
        let (bar, offset) = overtaking(self.description?, &self.ranges, load, waiting)?;
        let mut value = [0; 8];
        self.function.bar_read(bar, offset, value.get_mut(..bytes)?);
        Some(u64::from_le_bytes(value))
    }

    fn write(&mut self, at: DeviceAddress, data: &[u8]) {
        if let Some((bar, offset)) = self.find(at) {
            self.function.bar_write(bar, offset, data);
        }
    }

    // A store may be a doorbell. A load has a device do nothing that its own accesses of memory
    // would have to wait for.
    fn uses_memory(&self, at: DeviceAddress, _bytes: usize, access: Access) -> bool {
        access == Access::Store && self.find(at).is_some()
    }

    fn checkpoint(&mut self) {
        self.saved = Some(self.function.take(self.description));
    }

    fn stand_still(&mut self) {
        // Only what is put back afterwards.
        if let (Some(Ok(_)), Some(description)) = (&self.saved, self.description) {
            let registers = &mut FunctionRegisters::new(self.function, description);
            if let Err(error) = description.quiesce(registers) {
                tracing::warn!(%error, "a device whose driver's call failed");
            }
        }
    }

    fn restore(&mut self) -> Result<(), DeviceLost> {
        match self.saved.take() {
            Some(Ok(saved)) => self.function.put_back(self.description, &saved),
            Some(Err(lost)) => Err(lost),
            None => Ok(()),
        }
    }

    // Others may have used it in between, of whom nothing is known.
    fn state(&self) -> Option<DeviceState> {
        None
    }

    fn undo(&mut self, _parts: &[(DeviceState, DeviceState)]) -> Result<(), String> {
        Err("what a device that goes on by itself has done in between is not known".to_owned())
    }

    fn put_back(&mut self, _state: &DeviceState) -> Result<(), DeviceLost> {
        Err(DeviceLost(
            "a device that goes on by itself gives no state away".to_owned(),
        ))
    }

    fn requests_changed(&self, _before: &DeviceState, _after: &DeviceState) -> bool {
        true
    }

    fn memory(&mut self) -> Vec<(u64, u64)> {
        let Some(description) = self.description else {
            return Vec::new();
        };
        description.rings(&mut FunctionRegisters::new(self.function, description))
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
        match self.description {
            Some(description) => {
                let registers = &mut FunctionRegisters::new(self.function, description);
                description.silence(registers);
            }
            None => self.function.silence(),
        }
    }
}
