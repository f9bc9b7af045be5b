//! The controller as a device that can be held, for the driver of its mouse.

use std::sync::{Arc, Mutex, MutexGuard};

use super::{COMMAND_PORT, DATA_PORT, I8042, Registers, lock};
use crate::hold::{Access, DeviceAddress, DeviceLost, DeviceState, HeldDevice, Holdable};

/// A controller shared with the bus. Its whole state is one value, and no guest memory belongs to
/// it.
pub struct HoldableI8042(pub Arc<Mutex<I8042>>);

impl Holdable for HoldableI8042 {
    fn hold(&self, with: &mut dyn FnMut(&mut dyn HeldDevice)) -> Result<(), DeviceLost> {
        let mut held = Held {
            controller: lock(&self.0),
            saved: None,
        };
        with(&mut held);
        held.controller.freeze(false);
        Ok(())
    }
}

impl I8042 {
    /// Lets the lines stay as they are, or go on; what came meanwhile interrupts then.
    fn freeze(&mut self, frozen: bool) {
        self.frozen = frozen;
        if !frozen && std::mem::take(&mut self.came_frozen) {
            self.drive_anew();
        } else {
            self.drive();
        }
    }
}

struct Held<'a> {
    controller: MutexGuard<'a, I8042>,
    saved: Option<Registers>,
}

fn saved(state: &DeviceState) -> Option<&Registers> {
    state.0.downcast_ref()
}

impl HeldDevice for Held<'_> {
    fn owns(&self, _gpa: u64) -> bool {
        false
    }

    fn owns_port(&self, port: u16) -> bool {
        matches!(port, DATA_PORT | COMMAND_PORT)
    }

    fn read(&mut self, at: DeviceAddress, data: &mut [u8]) {
        let Some(byte) = data.first_mut() else { return };
        match at {
            DeviceAddress::Port(DATA_PORT) => *byte = self.controller.read_data(),
            DeviceAddress::Port(COMMAND_PORT) => *byte = self.controller.status(),
            _ => {}
        }
    }

    fn write(&mut self, at: DeviceAddress, data: &[u8]) {
        let Some(byte) = data.first() else { return };
        match at {
            DeviceAddress::Port(DATA_PORT) => self.controller.write_data(*byte),
            DeviceAddress::Port(COMMAND_PORT) => self.controller.command(*byte),
            _ => {}
        }
    }

    fn uses_memory(&self, _at: DeviceAddress, _bytes: usize, _access: Access) -> bool {
        false
    }

    fn checkpoint(&mut self) {
        self.saved = Some(self.controller.registers.clone());
    }

    fn restore(&mut self) -> Result<(), DeviceLost> {
        if let Some(registers) = self.saved.take() {
            self.controller.become_registers(registers);
        }
        Ok(())
    }

    fn state(&self) -> Option<DeviceState> {
        let registers = self.controller.registers.clone();
        Some(DeviceState(Arc::new(registers)))
    }

    /// How the mouse is set becomes what it was at first. Nobody but its driver sets it, and what it
    /// has sent meanwhile has been taken; who goes on in the guest in the middle of a command does
    /// so outside of all parts.
    fn undo(&mut self, parts: &[(DeviceState, DeviceState)]) -> Result<(), String> {
        let Some((before, _)) = parts.first() else {
            return Ok(());
        };
        let before = saved(before).ok_or("its checkpoints are another device's")?;
        self.controller.registers.mouse.be_set_as(&before.mouse);
        self.controller.fill();
        Ok(())
    }

    fn put_back(&mut self, state: &DeviceState) -> Result<(), DeviceLost> {
        let foreign = || DeviceLost("its state is another device's".to_owned());
        let registers = saved(state).ok_or_else(foreign)?.clone();
        self.controller.become_registers(registers);
        Ok(())
    }

    fn requests_changed(&self, _before: &DeviceState, _after: &DeviceState) -> bool {
        false
    }

    fn memory(&mut self) -> Vec<(u64, u64)> {
        Vec::new()
    }

    fn freeze_interrupts(&mut self) {
        self.controller.freeze(true);
    }

    fn withhold_interrupts(&mut self, withhold: bool) {
        self.controller.withheld = withhold;
        self.controller.drive();
    }

    fn silence(&mut self) {
        self.controller.registers.mouse.silence();
    }
}
