//! The part of a description that says how an image answers: `[parked]`.
//!
//! ```toml
//! [parked.link]             # where the device shows whether it has a link
//! [parked.interrupts]       # causes, masks and vectors
//! [[parked.reset]]          # bits that reset the device or its PHY when they are written
//! [[parked.remainder]]      # registers whose upper half shows what the lower one leaves of a total
//! [[parked.register]]       # registers that are not part of the state and yet answer with something else than 0
//! [parked.phy]              # the PHY behind [mdio]
//! [parked.nvm]              # its non-volatile memory, read through a register
//! ```
//!
//! Registers of the state hold what is stored to them, as far as `keep` goes. All others read as 0
//! and hold nothing.

use serde::Deserialize;

use super::super::description::{Description, DescriptionError, PHY_REGISTERS};

/// Most words of non-volatile memory.
const MAX_NVM_WORDS: u32 = 1 << 14;
/// Most entries of one kind.
const MAX_ENTRIES: usize = 64;
/// Bits of a register.
const BITS: u32 = 32;

/// How an image answers.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Answers {
    pub link: Link,
    pub interrupts: Interrupts,
    #[serde(default)]
    pub reset: Vec<Reset>,
    #[serde(default)]
    pub remainder: Vec<Remainder>,
    #[serde(default)]
    pub register: Vec<Other>,
    pub phy: Option<Phy>,
    pub nvm: Option<Nvm>,
}

/// A register, not part of the state, that shows whether there is a link.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Link {
    pub offset: u32,
    /// Bits that are set with a link.
    pub up: u32,
    /// Bits that say that transmission waits and no driver need worry; shown while a link stays
    /// that nothing is sent on.
    #[serde(default)]
    pub waits: u32,
}

/// Registers of causes of interrupts, a bit for each.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Interrupts {
    /// Shows the causes; reading it clears them.
    pub causes: u32,
    /// Causes are set by writing ones here.
    pub raise: u32,
    /// Shows which interrupt; more of them by writing ones. Part of the state.
    pub mask: u32,
    /// Fewer of them by writing ones here.
    pub block: u32,
    /// Those that are cleared when their message is sent. Part of the state.
    pub auto_clear: Option<u32>,
    /// Set among the causes while one of them interrupts.
    #[serde(default)]
    pub asserted: u32,
    /// The causes of a change of the link.
    pub link_change: u32,
    /// Has, for each message, which MSI-X vector it goes to. Part of the state.
    pub vectors: Option<u32>,
    #[serde(default)]
    pub message: Vec<Message>,
}

/// A message by MSI-X.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Message {
    pub causes: u32,
    /// Where its field of `vectors` begins.
    pub shift: u32,
    /// The vector, in the field.
    pub vector: u32,
    /// Set in the field if the message is sent.
    pub valid: u32,
}

/// Bits that reset something when they are written. They read as 0.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Reset {
    pub register: String,
    pub offset: u32,
    pub bits: u32,
    pub of: Part,
}

/// What is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::pci::registers) enum Part {
    /// All registers, not the PHY.
    Device,
    /// The PHY.
    Phy,
}

/// A register of the state whose upper half shows what its lower one leaves of a total, as both are
/// after a reset.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Remainder {
    pub register: String,
    pub offset: u32,
}

/// Registers that are not part of the state.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Other {
    pub name: String,
    pub offset: u32,
    #[serde(default = "one")]
    pub count: u32,
    /// What it shows; that of the device after a reset if it is left out. It is read for that.
    pub value: Option<u32>,
    /// Bits that hold what is stored.
    #[serde(default)]
    pub holds: u32,
    /// Bits that a load sets, as a semaphore's.
    #[serde(default)]
    pub taken: u32,
}

/// A PHY.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Phy {
    /// Register that chooses a page.
    pub page: u8,
    /// Registers from this one on are others on other pages than 0: these read as 0 and hold
    /// nothing.
    pub paged_from: u8,
    /// Registers that stores do not change.
    pub read_only: Vec<u8>,
    /// Those that show the link.
    pub link: Vec<PhyLink>,
}

/// A register of a PHY that shows the link. Stores do not change it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct PhyLink {
    pub number: u8,
    /// Bits that are 0 without a link.
    pub up: u16,
}

/// Non-volatile memory of 16-bit words, read by the number of a word and a start bit written to a
/// register, which then shows the word and that it is done.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Nvm {
    pub offset: u32,
    pub start: u32,
    pub done: u32,
    pub number_shift: u32,
    pub word_shift: u32,
    /// As many words as there can be; fewer if the device does not answer for more.
    pub words: u32,
    /// First of the three words with the station address.
    pub address: u32,
    /// The words from 0 to before this one, whose last makes up for the sum.
    pub summed: u32,
    pub sum: u16,
}

fn one() -> u32 {
    1
}

impl Answers {
    /// Whether this goes with the rest of the description.
    pub fn check(&self, description: &Description) -> Result<(), DescriptionError> {
        let wrong = |name: &str, what| Err(DescriptionError::Entry(name.to_owned(), what));
        let many = [self.reset.len(), self.remainder.len(), self.register.len()];
        let more = self.interrupts.message.len();
        if many
            .into_iter()
            .chain([more])
            .any(|length| length > MAX_ENTRIES)
        {
            return wrong("parked", "too many entries");
        }
        let saved = |offset: u32| description.saves(offset);
        let interrupts = &self.interrupts;
        let state = [Some(interrupts.mask), interrupts.auto_clear];
        let mut state = state.into_iter().chain([interrupts.vectors]).flatten();
        if !state.all(saved) {
            return wrong("parked.interrupts", "a register is not saved");
        }
        for message in &interrupts.message {
            let field = message.vector | message.valid;
            let fits = message.shift < BITS && field.leading_zeros() >= message.shift;
            if !fits || interrupts.vectors.is_none() {
                return wrong("parked.interrupts", "no such field of vectors");
            }
        }
        for reset in &self.reset {
            if !saved(reset.offset) {
                return wrong(&reset.register, "it is not saved");
            }
        }
        for remainder in &self.remainder {
            if !saved(remainder.offset) {
                return wrong(&remainder.register, "it is not saved");
            }
        }
        self.check_others(description)?;
        self.check_behind(description)
    }

    /// Those that are not part of the state have one meaning each.
    fn check_others(&self, description: &Description) -> Result<(), DescriptionError> {
        let wrong = |name: &str, what| Err(DescriptionError::Entry(name.to_owned(), what));
        let interrupts = &self.interrupts;
        let mut single = vec![interrupts.causes, interrupts.raise, interrupts.block];
        single.extend(self.nvm.iter().map(|nvm| nvm.offset));
        single.extend(description.mdio.iter().map(|mdio| mdio.register));
        let single = single
            .into_iter()
            .map(|offset| ("parked, a register", offset, 1));
        let others = self.register.iter();
        let others = others.map(|one| (one.name.as_str(), one.offset, one.count));
        let mut taken: Vec<std::ops::Range<u32>> = Vec::new();
        for (name, offset, count) in single.chain(others) {
            if count == 0 || !description.has(offset, count) {
                return wrong(name, "no aligned registers of this device");
            }
            let range = offset..offset + 4 * count;
            let mut each = range.clone().step_by(4);
            if each.any(|offset| description.saves(offset)) {
                return wrong(name, "it is part of the state");
            }
            if taken
                .iter()
                .any(|other| range.start < other.end && other.start < range.end)
            {
                return wrong(name, "it has another meaning too");
            }
            taken.push(range);
        }
        if !self.register.iter().any(|one| one.has(self.link.offset)) {
            return wrong("parked.link", "it is none of the registers there");
        }
        Ok(())
    }

    /// What is reached through registers.
    fn check_behind(&self, description: &Description) -> Result<(), DescriptionError> {
        let wrong = |name: &str, what| Err(DescriptionError::Entry(name.to_owned(), what));
        if let Some(phy) = &self.phy {
            let links = phy.link.iter().map(|link| link.number);
            let mut numbers = links.chain(phy.read_only.iter().copied()).chain([phy.page]);
            if description.mdio.is_none() || numbers.any(|number| number >= PHY_REGISTERS) {
                return wrong("parked.phy", "there is none, or it has no such register");
            }
        }
        if let Some(nvm) = &self.nvm {
            let fits = nvm.words <= MAX_NVM_WORDS
                && nvm.summed <= nvm.words
                && nvm.address.saturating_add(3) < nvm.summed;
            let number = nvm.words.saturating_sub(1);
            let shifts = nvm.word_shift <= BITS / 2
                && nvm.number_shift < BITS
                && number.leading_zeros() >= nvm.number_shift;
            if !fits || !shifts || nvm.done == 0 || nvm.start == 0 {
                return wrong("parked.nvm", "words or bits lie outside");
            }
        }
        Ok(())
    }
}

impl Other {
    pub fn offsets(&self) -> impl Iterator<Item = u32> + use<> {
        (self.offset..).step_by(4).take(self.count as usize)
    }

    pub fn has(&self, offset: u32) -> bool {
        self.offsets().any(|at| at == offset)
    }
}
