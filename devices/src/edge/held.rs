//! The edge of a device that is held: what a driver's isolated calls load and store passes it as
//! well.
//!
//! Checkpoints, states and what silences the device are the host's business, and go past. A
//! checkpoint that is put back takes along what was on its way: the call whose stores these were
//! has never been.

use std::sync::{Arc, PoisonError};

use super::Edge;
use super::function::Registers;
use crate::hold::{
    DeviceAddress, DeviceLost, DeviceState, HeldDevice, Holdable, OutsideChanges, place,
};
use crate::pci::bus::SharedFunction;
use crate::pci::{BarIndex, BarRange, BarSpace};

/// A device that can be held, behind its edge.
struct HoldableAtEdge {
    edge: Arc<Edge>,
    function: SharedFunction,
    device: Arc<dyn Holdable>,
}

impl Edge {
    /// `device`, which is `function`, behind this edge.
    pub fn holdable(
        self: &Arc<Self>,
        device: Arc<dyn Holdable>,
        function: SharedFunction,
    ) -> Arc<dyn Holdable> {
        let edge = self.clone();
        Arc::new(HoldableAtEdge {
            edge,
            function,
            device,
        })
    }
}

impl Holdable for HoldableAtEdge {
    fn hold(&self, with: &mut dyn FnMut(&mut dyn HeldDevice)) -> Result<(), DeviceLost> {
        if !self.edge.is_armed() {
            return self.device.hold(with);
        }
        let ranges = {
            let function = self.function.lock();
            function.unwrap_or_else(PoisonError::into_inner).decoded()
        };
        let held = self.device.hold(&mut |device| {
            with(&mut HeldAtEdge {
                edge: &self.edge,
                device,
                ranges: &ranges,
            });
        });
        self.edge.tell_link();
        held
    }
}

struct HeldAtEdge<'a> {
    edge: &'a Edge,
    device: &'a mut dyn HeldDevice,
    ranges: &'a [BarRange],
}

/// The registers of a device that is held.
struct HeldRegisters<'a, 'b> {
    device: &'a mut dyn HeldDevice,
    ranges: &'b [BarRange],
}

impl HeldRegisters<'_, '_> {
    fn address(&self, bar: BarIndex, offset: u64) -> Option<DeviceAddress> {
        let range = self.ranges.iter().find(|range| range.bar == bar)?;
        let address = range.address.checked_add(offset)?;
        match range.space {
            BarSpace::Io => Some(DeviceAddress::Port(address.try_into().ok()?)),
            BarSpace::Memory32 | BarSpace::Memory64 => Some(DeviceAddress::Memory(address)),
        }
    }
}

impl Registers for HeldRegisters<'_, '_> {
    fn load(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        match self.address(bar, offset) {
            Some(at) => self.device.read(at, data),
            None => data.fill(0xff),
        }
    }

    fn store(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        if let Some(at) = self.address(bar, offset) {
            self.device.write(at, data);
        }
    }
}

impl<'b> HeldAtEdge<'b> {
    fn place(&self, at: DeviceAddress) -> Option<(BarIndex, u64)> {
        place(self.ranges, at)
    }

    fn registers(&mut self) -> HeldRegisters<'_, 'b> {
        HeldRegisters {
            device: &mut *self.device,
            ranges: self.ranges,
        }
    }
}

impl HeldDevice for HeldAtEdge<'_> {
    fn owns(&self, gpa: u64) -> bool {
        self.device.owns(gpa)
    }

    fn owns_port(&self, port: u16) -> bool {
        self.device.owns_port(port)
    }

    fn sleeps_at(&self, gpa: u64) -> bool {
        self.device.sleeps_at(gpa)
    }

    fn read(&mut self, at: DeviceAddress, data: &mut [u8]) {
        let edge = self.edge;
        match self.place(at) {
            Some(place) => edge.load(&mut self.registers(), place, data),
            None => self.device.read(at, data),
        }
    }

    // A load that overtakes stores would not be counted in its turn.
    fn read_past(
        &mut self,
        _at: DeviceAddress,
        _bytes: usize,
        _waiting: &mut dyn Iterator<Item = DeviceAddress>,
    ) -> Option<u64> {
        None
    }

    fn write(&mut self, at: DeviceAddress, data: &[u8]) {
        let edge = self.edge;
        match self.place(at) {
            Some(place) => edge.store(&mut self.registers(), place, data),
            None => self.device.write(at, data),
        }
    }

    fn checkpoint(&mut self) {
        self.device.checkpoint();
    }

    fn stand_still(&mut self) {
        self.device.stand_still();
    }

    fn restore(&mut self) -> Result<(), DeviceLost> {
        self.edge.state().forget_on_the_way();
        self.device.restore()
    }

    fn state(&self) -> Option<DeviceState> {
        self.device.state()
    }

    fn undo(&mut self, parts: &[(DeviceState, DeviceState)]) -> Result<(), String> {
        self.device.undo(parts)
    }

    fn put_back(&mut self, state: &DeviceState) -> Result<(), DeviceLost> {
        self.edge.state().forget_on_the_way();
        self.device.put_back(state)
    }

    fn requests_changed(&self, before: &DeviceState, after: &DeviceState) -> bool {
        self.device.requests_changed(before, after)
    }

    fn memory(&mut self) -> Vec<(u64, u64)> {
        self.device.memory()
    }

    fn freeze_interrupts(&mut self) {
        self.device.freeze_interrupts();
    }

    fn withhold_interrupts(&mut self, withhold: bool) {
        self.device.withhold_interrupts(withhold);
    }

    fn call_ended(&mut self, failed: bool) {
        self.device.call_ended(failed);
    }

    fn keep_outside(&mut self) {
        self.device.keep_outside();
    }

    fn show_outside(&mut self, changes: OutsideChanges) {
        self.device.show_outside(changes);
    }

    fn silence(&mut self) {
        self.device.silence();
    }
}
