//! The state in a checkpoint, register by register, and what of it a guest stored to an image.

use std::collections::{BTreeMap, BTreeSet};

use super::super::description::Description;
use super::super::{Access, RegisterCheckpoint};

/// What a guest did with an image of a device, and not yet with the device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in super::super) struct FromImage {
    /// Registers that it stored to, by offset. The device may hold less of that, as it would have
    /// of the store itself.
    pub stored: BTreeSet<u32>,
    /// Registers of the PHY, a bit for each.
    pub stored_phy: u32,
    /// Reads of what is behind a register whose answer the driver may still want to see: the
    /// register and the command.
    pub asked: BTreeMap<u32, u32>,
}

impl FromImage {
    /// Has the registers that something is reached through show again what the driver asked for
    /// last.
    pub fn ask_again(&self, access: &mut Access<'_>) {
        for (register, command) in &self.asked {
            access.write(*register, *command);
        }
    }
}

impl RegisterCheckpoint {
    /// The registers, by offset.
    pub(super) fn by_offset(&self, description: &Description) -> BTreeMap<u32, u32> {
        let pairs = description.register.iter().zip(&self.registers);
        let each = pairs.flat_map(|(place, (_, values))| {
            let offsets = place.offsets();
            offsets.zip(values.iter().copied())
        });
        each.collect()
    }

    /// Gives the registers these values.
    pub(super) fn set_all(&mut self, description: &Description, values: &BTreeMap<u32, u32>) {
        for (place, (_, saved)) in description.register.iter().zip(&mut self.registers) {
            for (at, saved) in place.offsets().zip(saved) {
                if let Some(value) = values.get(&at) {
                    *saved = value & place.keep;
                }
            }
        }
    }

    /// Gives the register at `offset` a value.
    pub(super) fn set(&mut self, description: &Description, offset: u32, value: u32) {
        let values = BTreeMap::from([(offset, value)]);
        self.set_all(description, &values);
    }
}
