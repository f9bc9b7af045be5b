//! What is read once of a device, just after it was reset: what an image of it begins with, and
//! what no guest changes.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::description::answers::{Answers, Nvm, Phy, PhyLink};
use super::super::description::entries::Mdio;
use super::super::description::{Description, PHY_REGISTERS};
use super::super::{Access, CheckpointError, RegisterAccess, RegisterCheckpoint};
use super::ParkedLink;

/// Reads of a word of non-volatile memory before it is given up, and between two of them. Linux
/// waits for half a second.
const NVM_TRIES: u32 = 1000;
const NVM_WAIT: Duration = Duration::from_micros(20);

/// A device as it is after a reset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    pub(super) fresh: RegisterCheckpoint,
    shown: Shown,
    /// Registers that are not part of the state, by offset.
    pub(super) others: BTreeMap<u32, u32>,
    /// Both halves together, of registers where one shows what the other leaves; by offset.
    pub(super) totals: BTreeMap<u32, u32>,
    /// Registers of the PHY, page 0. It has not all.
    pub(super) phy: [Option<u16>; PHY_REGISTERS as usize],
    /// Words of non-volatile memory.
    pub(super) nvm: Vec<u16>,
}

/// How a device shows its link just now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    pub(super) register: u32,
    /// What registers show that something is reached through: the answer to the driver's last
    /// question.
    pub(super) asked: BTreeMap<u32, u32>,
    /// Registers that show the link, by number; none if it is not to be shown.
    pub(super) phy: BTreeMap<u8, u16>,
}

impl Description {
    pub(super) fn answers(&self) -> Result<&Answers, CheckpointError> {
        let none = || CheckpointError::NoImage(self.device.name.clone());
        self.parked.as_ref().ok_or_else(none)
    }

    /// Reads all that an image needs of a device that was reset and that nobody uses.
    ///
    /// # Errors
    /// It does not answer, or its description does not say how an image does.
    pub fn survey(&self, registers: &mut dyn RegisterAccess) -> Result<Survey, CheckpointError> {
        let answers = self.answers()?;
        let shown = self.shown(registers, ParkedLink::Down)?;
        let fresh = self.read_state(registers, None)?;
        let mut access = Access(registers);
        let mut others = BTreeMap::new();
        for other in &answers.register {
            for at in other.offsets() {
                let value = other.value.unwrap_or_else(|| access.read(at));
                others.insert(at, value & !other.taken);
            }
        }
        let mut totals = BTreeMap::new();
        for remainder in &answers.remainder {
            let value = access.read(remainder.offset);
            totals.insert(remainder.offset, (value & 0xffff) + (value >> 16));
        }
        let mut phy = [None; PHY_REGISTERS as usize];
        if let (Some(mdio), Some(_)) = (&self.mdio, &answers.phy) {
            for (number, value) in (0..PHY_REGISTERS).zip(&mut phy) {
                // One that it does not have is answered with an error.
                *value = mdio.read(&mut access, number).ok();
            }
        }
        let nvm = match &answers.nvm {
            Some(nvm) => nvm.read_all(&mut access)?,
            None => Vec::new(),
        };
        Ok(Survey {
            fresh,
            shown,
            others,
            totals,
            phy,
            nvm,
        })
    }

    /// What a device that stands still shows its driver just now. To be called before
    /// [`Description::save`], which asks the PHY for something else.
    ///
    /// # Errors
    /// Its PHY does not answer, or its description does not say how an image answers.
    pub fn shown(
        &self,
        registers: &mut dyn RegisterAccess,
        link: ParkedLink,
    ) -> Result<Shown, CheckpointError> {
        let answers = self.answers()?;
        let mut access = Access(registers);
        let mut asked = BTreeMap::new();
        if let Some(nvm) = &answers.nvm {
            asked.insert(nvm.offset, access.read(nvm.offset));
        }
        if let Some(mdio) = &self.mdio {
            asked.insert(mdio.register, mdio.last_answer(&mut access));
        }
        let register = access.read(answers.link.offset);
        let phy = match (&self.mdio, &answers.phy, link) {
            (Some(mdio), Some(phy), ParkedLink::Stays) => phy.shown(mdio, &mut access)?,
            _ => BTreeMap::new(),
        };
        Ok(Shown {
            register,
            asked,
            phy,
        })
    }
}

impl Phy {
    fn shown(
        &self,
        mdio: &Mdio,
        access: &mut Access<'_>,
    ) -> Result<BTreeMap<u8, u16>, CheckpointError> {
        let page = mdio.read(access, self.page)?;
        if page != 0 {
            mdio.write(access, self.page, 0)?;
        }
        let mut read = |link: &PhyLink| {
            let value = mdio.read(access, link.number).ok()?;
            Some((link.number, value))
        };
        let shown = self.link.iter().filter_map(&mut read).collect();
        if page != 0 {
            mdio.write(access, self.page, page)?;
        }
        Ok(shown)
    }
}

impl Nvm {
    fn read_all(&self, access: &mut Access<'_>) -> Result<Vec<u16>, CheckpointError> {
        let mut words = Vec::new();
        for number in 0..self.words {
            match self.read(access, number) {
                Some(word) => words.push(word),
                None if number >= self.summed => break,
                None => return Err(CheckpointError::NoNvm(number)),
            }
        }
        Ok(words)
    }

    fn read(&self, access: &mut Access<'_>, number: u32) -> Option<u16> {
        access.write(self.offset, self.start | number << self.number_shift);
        for _ in 0..NVM_TRIES {
            let answer = access.read(self.offset);
            if answer & self.done != 0 {
                return Some((answer >> self.word_shift) as u16);
            }
            std::thread::sleep(NVM_WAIT);
        }
        None
    }
}

impl Survey {
    /// The state after a reset: what a guest begins with that has not had the device yet.
    pub fn fresh(&self) -> &RegisterCheckpoint {
        &self.fresh
    }

    /// What it shows then.
    pub fn shown(&self) -> &Shown {
        &self.shown
    }

    /// The same device with another station address, as if it had been made with it: after a reset,
    /// and in non-volatile memory, whose sum stays right.
    #[must_use]
    pub fn with_address(mut self, description: &Description, address: [u8; 6]) -> Self {
        let Some(answers) = &description.parked else {
            return self;
        };
        let [a, b, c, d, e, f] = address;
        if let Some(station) = &description.station {
            let (low, high) = station.values(address);
            self.fresh.set(description, station.low, low);
            self.fresh.set(description, station.high, high);
        }
        if let Some(nvm) = &answers.nvm {
            let pairs = [[a, b], [c, d], [e, f]].map(u16::from_le_bytes);
            let places = self.nvm.iter_mut().skip(nvm.address as usize);
            for (place, word) in places.zip(pairs) {
                *place = word;
            }
            let summed = self.nvm.iter_mut().take(nvm.summed as usize);
            let mut sum = 0u16;
            let mut last = None;
            for word in summed {
                sum = sum.wrapping_add(*word);
                last = Some(word);
            }
            if let Some(last) = last {
                *last = last.wrapping_add(nvm.sum.wrapping_sub(sum));
            }
        }
        self
    }
}
