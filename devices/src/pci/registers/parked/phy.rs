//! The PHY of an image, behind a register of the form of MDIC (8254x manual, 13.4.7). Accesses are
//! done at once.

use super::super::RegisterCheckpoint;
use super::super::description::answers::Phy;
use super::super::description::{Description, PHY_REGISTERS};
use super::super::mdio::mdic;
use super::{FromImage, ParkedLink, Shown};

/// Number of a register or of a PHY in a command.
const NUMBER: u32 = 0x1f;

/// Registers of a PHY by their number; it has not all.
type Registers = [Option<u16>; PHY_REGISTERS as usize];

/// A PHY.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PhyImage {
    registers: Registers,
    /// What the command register shows.
    answer: u32,
    /// Registers that a guest has stored to, a bit for each.
    stored: u32,
}

impl PhyImage {
    /// A PHY as after a reset, that shows the link as it was shown or none.
    pub fn new(
        description: &Description,
        fresh: &Registers,
        shown: &Shown,
        link: ParkedLink,
    ) -> Self {
        let asked = description.mdio.as_ref();
        let asked = asked.and_then(|mdio| shown.asked.get(&mdio.register));
        let mut phy = Self {
            registers: *fresh,
            answer: asked.copied().unwrap_or(0) | mdic::READY,
            stored: 0,
        };
        for (number, value) in &shown.phy {
            phy.put_one(*number, *value);
        }
        if link == ParkedLink::Down {
            phy.lose_link(description);
        }
        phy
    }

    /// Takes over what is saved of a PHY.
    pub fn put(&mut self, description: &Description, saved: &RegisterCheckpoint) {
        let places = description.mdio.iter().flat_map(|mdio| &mdio.saved);
        for (place, (_, value)) in places.zip(&saved.phy) {
            self.put_one(place.number, *value);
        }
    }

    fn put_one(&mut self, number: u8, value: u16) {
        if let Some(place) = self.registers.get_mut(usize::from(number)) {
            *place = Some(value);
        }
    }

    /// What is to be written back, and what of it a guest has stored.
    pub fn save(
        &self,
        description: &Description,
        saved: &mut RegisterCheckpoint,
        since: &mut FromImage,
    ) {
        let Some(mdio) = &description.mdio else {
            return;
        };
        for (place, (_, value)) in mdio.saved.iter().zip(&mut saved.phy) {
            let register = self.registers.get(usize::from(place.number));
            if let Some(Some(register)) = register {
                *value = register & place.keep;
            }
        }
        since.stored_phy |= self.stored;
        if self.answer >> mdic::PHY_SHIFT & NUMBER == u32::from(mdio.phy) {
            let command = mdic::READ | self.answer & mdic::PLACE;
            since.asked.insert(mdio.register, command);
        }
    }

    pub fn lose_link(&mut self, description: &Description) {
        let links = description.parked.iter().flat_map(|one| &one.phy);
        for link in links.flat_map(|phy| &phy.link) {
            let register = self.registers.get_mut(usize::from(link.number));
            if let Some(Some(register)) = register {
                *register &= !link.up;
            }
        }
    }

    /// As after a reset, but for the link.
    pub fn reset(&mut self, description: &Description, fresh: &Registers) {
        let phy = description.parked.as_ref().and_then(|one| one.phy.as_ref());
        for (number, (value, fresh)) in (0..).zip(self.registers.iter_mut().zip(fresh)) {
            if !phy.is_some_and(|phy| phy.is_read_only(number)) {
                *value = *fresh;
            }
        }
        self.stored = 0;
    }

    pub fn answer(&self) -> u32 {
        self.answer
    }

    /// Does a command.
    pub fn command(&mut self, description: &Description, command: u32) {
        let done = match self.access(description, command) {
            Some(value) => mdic::READY | u32::from(value),
            None => mdic::READY | mdic::ERROR,
        };
        self.answer = command & (mdic::OPERATION | mdic::PLACE) | done;
    }

    fn access(&mut self, description: &Description, command: u32) -> Option<u16> {
        let mdio = description.mdio.as_ref()?;
        if command >> mdic::PHY_SHIFT & NUMBER != u32::from(mdio.phy) {
            return None;
        }
        let number = (command >> mdic::REGISTER_SHIFT & NUMBER) as u8;
        let phy = description.parked.as_ref()?.phy.as_ref()?;
        let elsewhere = number != phy.page && number >= phy.paged_from && self.page(phy) != 0;
        match command & mdic::OPERATION {
            mdic::READ if elsewhere => Some(0),
            mdic::WRITE if elsewhere => Some(command as u16),
            mdic::READ => *self.registers.get(usize::from(number))?,
            mdic::WRITE => {
                let value = command as u16;
                let place = self.registers.get_mut(usize::from(number))?.as_mut()?;
                if !phy.is_read_only(number) {
                    let mut saved = mdio.saved.iter();
                    let saved = saved.find(|one| one.number == number);
                    *place = value & saved.map_or(u16::MAX, |one| one.keep);
                    self.stored |= 1 << number;
                }
                Some(value)
            }
            _ => None,
        }
    }

    fn page(&self, phy: &Phy) -> u16 {
        let register = self.registers.get(usize::from(phy.page));
        register.copied().flatten().unwrap_or(0)
    }
}

impl Phy {
    fn is_read_only(&self, number: u8) -> bool {
        self.read_only.contains(&number) || self.link.iter().any(|link| link.number == number)
    }
}
