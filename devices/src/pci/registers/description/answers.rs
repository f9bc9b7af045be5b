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

impl Other {
    pub fn offsets(&self) -> impl Iterator<Item = u32> + use<> {
        (self.offset..).step_by(4).take(self.count as usize)
    }

    pub fn has(&self, offset: u32) -> bool {
        self.offsets().any(|at| at == offset)
    }
}
