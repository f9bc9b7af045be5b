//! An image of a device, which answers a guest's driver while another guest has the device.
//!
//! ```text
//!   look ─► quiesce ─► shown ─► save ─► Parked::new ──► reads, writes ──► into_checkpoint ─► load ─► resume
//!                                        ▲ survey (once, after a reset)
//! ```
//!
//! How it answers is data: the description's part `[parked]` (`data`). Registers of the state hold
//! what is stored to them, and the device is given that when its turn comes. What a driver waits
//! for is done at once: resets, accesses of the PHY, reads of non-volatile memory. Nothing is sent,
//! received or counted.
//!
//! A guest may access whatever it likes. An image has a fixed size, and its checkpoint has nothing
//! but what is described.

#[cfg(any(test, feature = "fuzzing"))]
mod bench;
mod checkpoint;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod interrupts;
mod phy;
mod survey;

use std::collections::BTreeMap;
use std::sync::Arc;

pub(super) use self::checkpoint::FromImage;
pub use self::checkpoint::StoredState;
use self::interrupts::Interrupts;
use self::phy::PhyImage;
pub use self::survey::{Shown, Survey};
use super::description::Description;
use super::description::answers::{Answers, Nvm, Part};
use super::{CheckpointError, RegisterCheckpoint};

/// Bytes of a register.
const WIDTH: u64 = 4;

/// What the driver sees of its link meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParkedLink {
    /// No link, and an interrupt for the change.
    Down,
    /// The link as it was, on which nothing moves.
    Stays,
}

/// An image of a device.
#[derive(Debug, Clone)]
pub struct Parked {
    description: Arc<Description>,
    survey: Arc<Survey>,
    link: ParkedLink,
    /// The register that shows the link, when the device was left.
    shown: u32,
    /// Registers of the state.
    state: BTreeMap<u32, u32>,
    /// Registers that are not part of the state.
    others: BTreeMap<u32, u32>,
    /// The register that non-volatile memory is read through.
    nvm: u32,
    phy: PhyImage,
    interrupts: Interrupts,
    saved: RegisterCheckpoint,
    since: FromImage,
}

impl Parked {
    /// An image of a device with the state `saved`, which showed `shown` when it was left.
    ///
    /// A guest that has not had the device yet has [`Survey::fresh`] and [`Survey::shown`].
    ///
    /// # Errors
    /// The state is another device's, or the description does not say how an image answers.
    pub fn new(
        description: Arc<Description>,
        survey: Arc<Survey>,
        mut saved: RegisterCheckpoint,
        shown: &Shown,
        link: ParkedLink,
    ) -> Result<Self, CheckpointError> {
        let answers = description.answers()?;
        description.fits(&saved)?;
        description.fits(&survey.fresh)?;
        let state = saved.by_offset(&description);
        let mut phy = PhyImage::new(&description, &survey.phy, shown, link);
        phy.put(&description, &saved);
        let asked = |offset: u32| shown.asked.get(&offset).copied();
        let nvm = answers.nvm.as_ref().and_then(|nvm| asked(nvm.offset));
        // Of an image before, if the device was not had in between.
        let since = std::mem::take(&mut saved.image);
        let mut parked = Self {
            link,
            shown: shown.register,
            state,
            others: survey.others.clone(),
            nvm: nvm.unwrap_or(0),
            phy,
            interrupts: Interrupts::default(),
            saved,
            since,
            description,
            survey,
        };
        if link == ParkedLink::Down {
            parked.link_changes();
        }
        Ok(parked)
    }

    /// The link goes, if it has not gone.
    pub fn lose_link(&mut self) {
        if self.link == ParkedLink::Stays {
            self.link = ParkedLink::Down;
            self.phy.lose_link(&self.description);
            self.link_changes();
        }
    }

    fn link_changes(&mut self) {
        if let Some(answers) = &self.description.parked {
            self.interrupts.raise(answers.interrupts.link_change);
        }
    }

    /// Whether an interrupt is due: the level of the function's line.
    pub fn interrupt_due(&self) -> bool {
        self.description
            .parked
            .as_ref()
            .is_some_and(|answers| self.interrupts.are_due(&answers.interrupts, &self.state))
    }

    /// The MSI-X vectors with a message due, a bit for each. They are taken: each cause is told
    /// once.
    pub fn take_messages(&mut self) -> u32 {
        match &self.description.parked {
            Some(answers) => self
                .interrupts
                .take_messages(&answers.interrupts, &self.state),
            None => 0,
        }
    }

    /// Reads of the registers. What is read of one with less than its four bytes is a part of it.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let within = (at % WIDTH) as usize;
            let count = rest.len().min(WIDTH as usize - within);
            let value = u32::try_from(at - at % WIDTH).map_or(0, |register| self.load(register));
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&value.to_le_bytes()[within..within + count]);
            rest = later;
            at = at.saturating_add(count as u64);
        }
    }

    /// Writes of the registers. Those that do not write all four bytes of one are lost, as the
    /// device may lose them.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(WIDTH) {
            return;
        }
        let (registers, _) = data.as_chunks::<{ WIDTH as usize }>();
        for (index, bytes) in (0u64..).zip(registers) {
            let at = offset.saturating_add(index.saturating_mul(WIDTH));
            if let Ok(at) = u32::try_from(at) {
                self.store(at, u32::from_le_bytes(*bytes));
            }
        }
    }

    /// The state that the device is to be given when its turn comes.
    pub fn into_checkpoint(self) -> RegisterCheckpoint {
        let Self {
            description,
            state,
            phy,
            mut saved,
            mut since,
            nvm,
            ..
        } = self;
        saved.set_all(&description, &state);
        phy.save(&description, &mut saved, &mut since);
        let place = description.parked.as_ref().and_then(|one| one.nvm.as_ref());
        if let Some(place) = place.filter(|place| nvm & place.done != 0) {
            since.asked.insert(place.offset, place.ask_again(nvm));
        }
        saved.image = since;
        saved
    }

    fn load(&mut self, offset: u32) -> u32 {
        let description = self.description.clone();
        let Some(answers) = &description.parked else {
            return 0;
        };
        let value = if offset == answers.interrupts.causes {
            self.interrupts.take(&answers.interrupts, &self.state)
        } else if description.has_phy_at(offset) {
            self.phy.answer()
        } else if answers.nvm.as_ref().is_some_and(|nvm| nvm.offset == offset) {
            self.nvm
        } else if let Some(value) = self.others.get_mut(&offset) {
            let shown = *value;
            let other = answers.register.iter().find(|one| one.has(offset));
            *value |= other.map_or(0, |other| other.taken);
            match offset == answers.link.offset {
                true => self.shown_link(answers),
                false => shown,
            }
        } else {
            self.load_state(offset)
        };
        self.at_rest_or_not(offset, value)
    }

    fn load_state(&self, offset: u32) -> u32 {
        let value = self.state.get(&offset).copied().unwrap_or(0);
        match self.survey.totals.get(&offset) {
            Some(total) => value & 0xffff | total.saturating_sub(value & 0xffff) << 16,
            None => value,
        }
    }

    fn shown_link(&self, answers: &Answers) -> u32 {
        let link = &answers.link;
        match self.link {
            ParkedLink::Down => self.shown & !(link.up | link.waits),
            ParkedLink::Stays => self.shown | link.waits,
        }
    }

    /// Whether the device stands still, where it shows that: as soon as it is told to.
    fn at_rest_or_not(&self, offset: u32, value: u32) -> u32 {
        let Some(idle) = self.description.idle.as_ref() else {
            return value;
        };
        if idle.offset != offset {
            return value;
        }
        let stops = |offset: u32, set: u32| self.load_state(offset) & set == set;
        let mut quiets = self.description.quiet.iter().filter(|one| one.set != 0);
        match quiets.all(|quiet| stops(quiet.offset, quiet.set)) {
            true => value & !idle.busy,
            false => value | idle.busy,
        }
    }

    fn store(&mut self, offset: u32, value: u32) {
        let description = self.description.clone();
        let Some(answers) = &description.parked else {
            return;
        };
        let interrupts = &answers.interrupts;
        if offset == interrupts.causes {
            self.interrupts.clear(value);
        } else if offset == interrupts.raise {
            self.interrupts.raise(value);
        } else if offset == interrupts.mask {
            let old = self.state.get(&offset).copied().unwrap_or(0);
            self.store_state(offset, old | value);
        } else if offset == interrupts.block {
            let old = self.state.get(&interrupts.mask).copied().unwrap_or(0);
            self.store_state(interrupts.mask, old & !value);
        } else if description.has_phy_at(offset) {
            self.phy.command(&description, value);
        } else if let Some(nvm) = answers.nvm.as_ref().filter(|nvm| nvm.offset == offset) {
            self.nvm = nvm.command(&self.survey.nvm, value);
        } else if let Some(old) = self.others.get_mut(&offset) {
            let other = answers.register.iter().find(|one| one.has(offset));
            let holds = other.map_or(0, |other| other.holds);
            *old = *old & !holds | value & holds;
        } else if self.state.contains_key(&offset) {
            self.store_or_reset(answers, offset, value);
        }
    }

    fn store_or_reset(&mut self, answers: &Answers, offset: u32, value: u32) {
        let mut held = value;
        for reset in answers.reset.iter().filter(|one| one.offset == offset) {
            held &= !reset.bits;
        }
        self.store_state(offset, held);
        let resets = answers.reset.iter();
        for reset in resets.filter(|one| one.offset == offset && value & one.bits != 0) {
            match reset.of {
                Part::Device => self.reset(),
                Part::Phy => self.phy.reset(&self.description, &self.survey.phy),
            }
        }
    }

    fn store_state(&mut self, offset: u32, value: u32) {
        let keep = self.description.kept_at(offset);
        if let Some(old) = self.state.get_mut(&offset) {
            *old = value & keep;
            self.since.stored.insert(offset);
        }
    }

    /// As the device's reset: all but the PHY.
    fn reset(&mut self) {
        self.state = self.survey.fresh.by_offset(&self.description);
        self.others = self.survey.others.clone();
        self.nvm = 0;
        self.interrupts = Interrupts::default();
        self.since.stored.clear();
    }
}

impl Nvm {
    /// What the register shows after `value` was stored to it. A word that is not there reads as
    /// erased.
    fn command(&self, words: &[u16], value: u32) -> u32 {
        if value & self.start == 0 {
            return value & !self.done;
        }
        let number = self.number_of(value);
        let word = words.get(number as usize).copied().unwrap_or(u16::MAX);
        number << self.number_shift | u32::from(word) << self.word_shift | self.done
    }

    fn number_of(&self, value: u32) -> u32 {
        let below_word = (1u32 << self.word_shift).wrapping_sub(1);
        match self.number_shift < self.word_shift {
            true => (value & below_word) >> self.number_shift,
            false => value >> self.number_shift,
        }
    }

    /// The command whose answer is `value`.
    fn ask_again(&self, value: u32) -> u32 {
        self.start | self.number_of(value) << self.number_shift
    }
}

#[cfg(test)]
mod tests;
