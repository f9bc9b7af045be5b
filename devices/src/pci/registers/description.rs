//! What a function's state is made of, as a small file says it for each kind of device.
//!
//! ```toml
//! schema = 1
//!
//! [device]            # which functions the file is for, and where their registers are
//! [[config]]          # fields of configuration space, in the order in which they are written back
//! [[flush]]           # registers whose loads have no effect, and stores that change nothing of what they show
//! [[before]]          # stores that stop the device's units
//! [[quiet]]           # bits that make the device stand still, in order; undone in reverse order
//! [idle]              # where it shows that it does
//! [reset]             # the store that resets the device, and where it shows that it is over
//! [station]           # its user's Ethernet address, which a reset brings back as it was made
//! [[ring]]            # memory that the device writes by itself while a unit is enabled
//! [[register]]        # registers, in the order in which they are written back
//! [mdio]              # a PHY behind a register, and [[mdio.saved]]: which of its registers
//! [[after]]           # stores that make up for what is not known
//! [[untouched]]       # registers that are neither read nor written, and why
//! [[lost]]            # of those that reading clears, the ones that count frames for which it had no room
//! [[withheld]]        # parts of its base address registers that guests who have it by turns do not reach
//! [parked]            # how an image answers the driver of a guest that has not got the device now (`parked`)
//! ```
//!
//! `keep` is the bits that are saved, written back and compared; all if it is left out. Others are
//! written as 0. `moves` is those that are not compared after they were written: the device changes
//! them itself, and may have done so at once.

pub(super) mod answers;
mod check;
mod check_answers;
pub(super) mod entries;

use serde::Deserialize;

use self::answers::Answers;
use self::entries::{
    ConfigField, Flush, Idle, Lost, Mdio, Quieting, Register, Reset, RingPlace, Station, Store,
    Untouched, Withheld,
};

/// The form of files that this code reads.
const SCHEMA: u32 = 1;
/// Longest file, in bytes.
const MAX_TEXT: usize = 64 << 10;
/// Registers of a PHY (IEEE 802.3, clause 22).
pub(super) const PHY_REGISTERS: u8 = 32;

/// Why a description cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DescriptionError {
    /// It is no such file.
    #[error("a device description cannot be read: {0}")]
    Text(String),
    /// It is one of another form.
    #[error("a device description of schema {0}: this program reads schema {SCHEMA}")]
    Schema(u32),
    /// It contradicts itself or the specifications.
    #[error("device description, {0}: {1}")]
    Entry(String, &'static str),
}

/// Nothing is wrong, or something is.
type Checked = Result<(), DescriptionError>;

/// An entry is wrong.
fn wrong(name: &str, what: &'static str) -> Checked {
    Err(DescriptionError::Entry(name.to_owned(), what))
}

/// A description of a kind of device.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    schema: u32,
    /// Which functions it is for.
    pub device: Device,
    #[serde(default)]
    pub(super) config: Vec<ConfigField>,
    #[serde(default)]
    flush: Vec<Flush>,
    #[serde(default)]
    pub(super) before: Vec<Store>,
    #[serde(default)]
    pub(super) quiet: Vec<Quieting>,
    pub(super) idle: Option<Idle>,
    pub(super) reset: Option<Reset>,
    pub(super) station: Option<Station>,
    #[serde(default)]
    pub(super) ring: Vec<RingPlace>,
    pub(super) register: Vec<Register>,
    pub(super) mdio: Option<Mdio>,
    #[serde(default)]
    pub(super) after: Vec<Store>,
    #[serde(default)]
    pub(super) untouched: Vec<Untouched>,
    #[serde(default)]
    pub(super) lost: Vec<Lost>,
    #[serde(default)]
    withheld: Vec<Withheld>,
    pub(super) parked: Option<Answers>,
}

/// Which functions a description is for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Name of the device, as its manual has it.
    pub name: String,
    /// Of the description: checkpoints of another version are refused.
    pub version: u32,
    /// Vendor identifier.
    pub vendor: u16,
    /// Device identifier.
    pub device: u16,
    /// Base address register with the registers.
    pub bar: u8,
    /// Their bytes.
    pub bytes: u32,
}

impl Description {
    /// Reads and checks a description.
    pub fn parse(text: &str) -> Result<Self, DescriptionError> {
        if text.len() > MAX_TEXT {
            let long = format!("it has {} bytes", text.len());
            return Err(DescriptionError::Text(long));
        }
        let unreadable =
            |error: toml::de::Error| DescriptionError::Text(error.message().to_owned());
        let description: Self = toml::from_str(text).map_err(unreadable)?;
        if description.schema != SCHEMA {
            return Err(DescriptionError::Schema(description.schema));
        }
        check::check(&description)?;
        Ok(description)
    }

    /// That of the Intel 82540EM.
    pub fn intel_82540em() -> Result<Self, DescriptionError> {
        Self::parse(include_str!("../../../models/82540em.toml"))
    }

    /// That of the Intel 82574L.
    pub fn intel_82574l() -> Result<Self, DescriptionError> {
        Self::parse(include_str!("../../../models/82574l.toml"))
    }

    /// Whether a load of `bytes` bytes at `offset` of the registers has no effect, and shows the
    /// same whether or not the stores at `waiting` have been made.
    pub fn may_overtake(
        &self,
        offset: u64,
        bytes: usize,
        mut waiting: impl Iterator<Item = u64>,
    ) -> bool {
        let mut flushes = self.flush.iter();
        let known = flushes.find(|flush| u64::from(flush.offset) == offset && bytes == 4);
        known.is_some_and(|flush| {
            waiting.all(|store| flush.past.iter().any(|past| u64::from(*past) == store))
        })
    }

    /// Whether guests that have the device by turns do not reach all of the `bytes` bytes at
    /// `offset` of a base address register: a load gives 0 then, and a store is lost.
    pub fn withholds(&self, bar: u8, offset: u64, bytes: usize) -> bool {
        let end = offset.saturating_add(bytes as u64);
        self.withheld.iter().any(|one| {
            let start = u64::from(one.offset);
            one.bar == bar && start < end && offset < start + u64::from(one.bytes)
        })
    }

    /// Whether the register at `offset` is part of the state.
    pub(super) fn saves(&self, offset: u32) -> bool {
        self.register.iter().any(|one| one.holds(offset))
    }

    /// The bits that are kept of a register of the state.
    pub(super) fn kept_at(&self, offset: u32) -> u32 {
        let mut registers = self.register.iter();
        let register = registers.find(|one| one.holds(offset));
        register.map_or(0, |one| one.keep)
    }

    /// Whether a PHY is reached through the register at `offset`.
    pub(super) fn has_phy_at(&self, offset: u32) -> bool {
        let mdio = self.mdio.as_ref();
        mdio.is_some_and(|mdio| mdio.register == offset)
    }

    /// Whether the device has `count` registers from `offset` on.
    pub(super) fn has(&self, offset: u32, count: u32) -> bool {
        let end = count
            .checked_mul(4)
            .and_then(|bytes| offset.checked_add(bytes));
        offset.is_multiple_of(4) && end.is_some_and(|end| end <= self.device.bytes)
    }
}

#[cfg(test)]
mod tests;
