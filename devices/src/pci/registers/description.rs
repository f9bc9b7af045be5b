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
//! [parked]            # how an image answers the driver of a guest that has not got the device now (`parked`)
//! ```
//!
//! `keep` is the bits that are saved, written back and compared; all if it is left out. Others are
//! written as 0. `moves` is those that are not compared after they were written: the device changes
//! them itself, and may have done so at once.

use serde::Deserialize;

use super::parked::Answers;
use super::reset::{Reset, Station};
use super::ring::RingPlace;

/// The form of files that this code reads.
const SCHEMA: u32 = 1;
/// Longest file, in bytes.
const MAX_TEXT: usize = 64 << 10;
/// Most entries of one kind.
const MAX_ENTRIES: usize = 512;
/// Most registers in all.
const MAX_REGISTERS: u32 = 4096;
/// Longest wait for a field of configuration space to take effect, in microseconds.
const MAX_SETTLE_US: u64 = 100_000;
/// Bytes of conventional configuration space.
const CONFIG_BYTES: u16 = 256;
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

/// A field of configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConfigField {
    pub name: String,
    pub offset: u16,
    pub bytes: u8,
    #[serde(default = "all")]
    pub keep: u32,
    /// How long the function takes after a change, in microseconds.
    #[serde(default)]
    pub settle_us: u64,
    /// Bits that are 0 while the function has registers to save.
    #[serde(default)]
    pub awake: u32,
}

/// A register whose loads have no effect. Drivers load it to have their stores arrive, which a bus
/// may hold back.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Flush {
    register: String,
    offset: u32,
    /// Registers to which a store changes nothing of what it shows.
    past: Vec<u32>,
}

/// A store.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Store {
    pub register: String,
    pub offset: u32,
    pub value: u32,
}

/// Bits of a register that make the device stand still.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Quieting {
    pub register: String,
    pub offset: u32,
    /// Bits to clear.
    #[serde(default)]
    pub clear: u32,
    /// Bits to set.
    #[serde(default)]
    pub set: u32,
    /// Bits are cleared by writing them here.
    pub through: Option<u32>,
}

/// Where the device shows that it stands still.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Idle {
    pub offset: u32,
    /// Bits that are 0 then.
    pub busy: u32,
    /// How long that may take, in microseconds.
    pub wait_us: u64,
}

/// A register, or several of a kind one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Register {
    pub name: String,
    pub offset: u32,
    #[serde(default = "one")]
    pub count: u32,
    #[serde(default = "all")]
    pub keep: u32,
    /// Bits that the device itself changes as soon as it runs.
    #[serde(default)]
    pub moves: u32,
}

/// A PHY that is reached through a register of the form of the 8254x's MDIC (13.4.7).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mdio {
    pub register: u32,
    pub phy: u8,
    pub saved: Vec<PhyRegister>,
}

/// A register of a PHY.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PhyRegister {
    pub name: String,
    pub number: u8,
    #[serde(default = "all_of_phy")]
    pub keep: u16,
}

/// Registers that are left alone.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Untouched {
    pub name: String,
    pub offset: u32,
    #[serde(default = "one")]
    pub count: u32,
    pub why: Why,
}

/// Why registers are left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Why {
    /// Reading them changes them.
    ReadClears,
    /// They cannot be written.
    ReadOnly,
    /// They cannot be read.
    WriteOnly,
    /// Accesses are steps of a conversation with something behind them.
    Interface,
    /// They go on by themselves.
    Runs,
    /// They count only while the device sleeps.
    WakeUp,
}

fn one() -> u32 {
    1
}

fn all() -> u32 {
    u32::MAX
}

fn all_of_phy() -> u16 {
    u16::MAX
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
        description.check()?;
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

    fn check(&self) -> Result<(), DescriptionError> {
        let wrong = |name: &str, what| Err(DescriptionError::Entry(name.to_owned(), what));
        let lengths = [self.config.len(), self.before.len(), self.ring.len()];
        let more = [
            self.register.len(),
            self.after.len(),
            self.untouched.len(),
            self.flush.len(),
        ];
        if lengths
            .into_iter()
            .chain(more)
            .any(|length| length > MAX_ENTRIES)
        {
            return wrong(&self.device.name, "too many entries");
        }
        if self.device.bar > 5 {
            return wrong(&self.device.name, "there are base address registers 0 to 5");
        }
        for (index, field) in self.config.iter().enumerate() {
            let aligned = matches!(field.bytes, 1 | 2 | 4)
                && field.offset.is_multiple_of(u16::from(field.bytes))
                && field.offset < CONFIG_BYTES;
            if !aligned {
                return wrong(&field.name, "no aligned field of configuration space");
            }
            if field.settle_us > MAX_SETTLE_US {
                return wrong(&field.name, "it takes too long to settle");
            }
            let earlier = &self.config[..index];
            if earlier.iter().any(|other| other.name == field.name) {
                return wrong(&field.name, "it is there twice");
            }
        }
        self.check_registers()?;
        if let Some(mdio) = &self.mdio {
            if !self.has(mdio.register, 1) || mdio.phy >= 32 {
                return wrong("mdio", "no such register or PHY");
            }
            for (index, phy) in mdio.saved.iter().enumerate() {
                let earlier = &mdio.saved[..index];
                if phy.number >= PHY_REGISTERS {
                    return wrong(&phy.name, "a PHY has registers 0 to 31");
                }
                if earlier.iter().any(|other| other.number == phy.number) {
                    return wrong(&phy.name, "it is there twice");
                }
            }
        }
        self.parked.as_ref().map_or(Ok(()), |one| one.check(self))
    }

    fn check_registers(&self) -> Result<(), DescriptionError> {
        let wrong = |name: &str, what| Err(DescriptionError::Entry(name.to_owned(), what));
        let mut taken: Vec<(&str, std::ops::Range<u32>, bool)> = Vec::new();
        let saved = self.register.iter();
        let saved = saved.map(|one| (one.name.as_str(), one.offset, one.count, true));
        let left = self.untouched.iter();
        let left = left.map(|one| (one.name.as_str(), one.offset, one.count, false));
        let mut total = 0u32;
        for (name, offset, count, is_saved) in saved.chain(left) {
            if count == 0 || !self.has(offset, count) {
                return wrong(name, "no aligned registers of this device");
            }
            total = total.saturating_add(count);
            if total > MAX_REGISTERS {
                return wrong(name, "too many registers");
            }
            let range = offset..offset + 4 * count;
            for (other, others, other_saved) in &taken {
                if range.start < others.end && others.start < range.end {
                    return wrong(name, "its registers are another's too");
                }
                if *other == name && is_saved && *other_saved {
                    return wrong(name, "it is there twice");
                }
            }
            taken.push((name, range, is_saved));
        }
        for store in self.before.iter().chain(&self.after) {
            if !self.has(store.offset, 1) {
                return wrong(&store.register, "no aligned register of this device");
            }
        }
        for flush in &self.flush {
            let known = |offset: &u32| self.has(*offset, 1);
            if flush.past.len() > MAX_ENTRIES
                || !known(&flush.offset)
                || !flush.past.iter().all(known)
            {
                return wrong(&flush.register, "no aligned register of this device");
            }
            if flush.past.contains(&flush.offset) {
                return wrong(&flush.register, "a store to it changes what it shows");
            }
        }
        for quiet in &self.quiet {
            // One by itself, whose whole value goes back.
            let mut registers = self.register.iter();
            let saved = registers
                .any(|one| (one.offset, one.count, one.keep) == (quiet.offset, 1, u32::MAX));
            if !saved || quiet.through.is_some_and(|offset| !self.has(offset, 1)) {
                return wrong(&quiet.register, "it is not saved whole");
            }
        }
        if let Some(idle) = &self.idle
            && (!self.has(idle.offset, 1) || idle.wait_us > MAX_SETTLE_US)
        {
            return wrong("idle", "no such register, or too long a wait");
        }
        if let Some(reset) = &self.reset
            && (!self.has(reset.offset, 1)
                || !self.has(reset.done_offset, 1)
                || reset.wait_us > MAX_SETTLE_US
                || reset.zero.iter().any(|at| !self.saves(*at)))
        {
            return wrong(&reset.register, "no such register, or too long a wait");
        }
        if let Some(station) = &self.station {
            let saved = |offset: u32| {
                let mut registers = self.register.iter();
                registers.any(|one| one.offsets().any(|at| at == offset))
            };
            if !saved(station.low) || !saved(station.high) {
                return wrong("station", "its registers are not saved");
            }
        }
        for ring in &self.ring {
            for offset in [ring.base_low, ring.base_high, ring.length, ring.control] {
                let known = self.register.iter().any(|one| one.offset == offset);
                if !known {
                    return wrong(&ring.name, "its registers are not saved");
                }
            }
            if ring.descriptor.as_ref().is_some_and(|one| !one.is_valid()) {
                return wrong(&ring.name, "its descriptors are none");
            }
        }
        Ok(())
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

impl Register {
    /// Whether the one at `offset` is one of these.
    fn holds(&self, offset: u32) -> bool {
        let within = offset.checked_sub(self.offset);
        offset.is_multiple_of(4) && within.is_some_and(|within| within / 4 < self.count)
    }
}

#[cfg(test)]
mod tests;
