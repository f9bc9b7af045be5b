//! The state in a checkpoint, register by register, and what of it a guest stored to an image.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::super::description::Description;
use super::super::{Access, CheckpointError, RegisterCheckpoint};
use super::Shown;

/// What a guest did with an image of a device, and not yet with the device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
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

/// The state of a user of a device as a value that can be stored. Whoever reads one checks it by
/// [`StoredState::open`]: it may be anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredState {
    registers: RegisterCheckpoint,
    image: FromImage,
    shown: Shown,
}

impl StoredState {
    /// A user's state, and what the device showed when it was taken.
    pub fn new(registers: &RegisterCheckpoint, shown: &Shown) -> Self {
        Self {
            registers: registers.clone(),
            image: registers.image.clone(),
            shown: shown.clone(),
        }
    }

    /// The state, of which nothing is left that could not have been taken of such a device: bits
    /// that are not kept, resets, and other accesses than a driver's last question.
    ///
    /// # Errors
    /// It is another device's.
    pub fn open(
        self,
        description: &Description,
    ) -> Result<(RegisterCheckpoint, Shown), CheckpointError> {
        let Self {
            mut registers,
            mut image,
            mut shown,
        } = self;
        description.fits(&registers)?;
        registers.rings.clear();
        for (field, (_, value)) in description.config.iter().zip(&mut registers.config) {
            *value &= field.keep;
        }
        for (place, (_, values)) in description.register.iter().zip(&mut registers.registers) {
            for (at, value) in place.offsets().zip(values) {
                let resets = description.reset.iter().filter(|one| one.offset == at);
                *value &= place.keep & resets.fold(!0, |kept, reset| kept & !reset.bits);
            }
        }
        let phy = description.mdio.iter().flat_map(|mdio| &mdio.saved);
        for (place, (_, value)) in phy.zip(&mut registers.phy) {
            *value &= place.keep;
        }
        let answers = description.answers()?;
        let nvm = answers.nvm.as_ref().map(|nvm| nvm.offset);
        let asks = |at: u32| description.has_phy_at(at) || nvm == Some(at);
        image.stored.retain(|at| description.saves(*at));
        image.asked.retain(|at, _| asks(*at));
        shown.asked.retain(|at, _| asks(*at));
        let links = answers.phy.iter().flat_map(|phy| &phy.link);
        let links: BTreeSet<_> = links.map(|link| link.number).collect();
        shown.phy.retain(|number, _| links.contains(number));
        registers.image = image;
        Ok((registers, shown))
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
