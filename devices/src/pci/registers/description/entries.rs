//! The entries of a description, but for `[parked]` (`answers`).

use serde::Deserialize;

/// A field of configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct ConfigField {
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
pub(in crate::pci::registers) struct Flush {
    pub register: String,
    pub offset: u32,
    /// Registers to which a store changes nothing of what it shows.
    pub past: Vec<u32>,
}

/// A store.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Store {
    pub register: String,
    pub offset: u32,
    pub value: u32,
}

/// Bits of a register that make the device stand still.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Quieting {
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
pub(in crate::pci::registers) struct Idle {
    pub offset: u32,
    /// Bits that are 0 then.
    pub busy: u32,
    /// How long that may take, in microseconds.
    pub wait_us: u64,
}

/// A register, or several of a kind one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Register {
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
pub(in crate::pci::registers) struct Mdio {
    pub register: u32,
    pub phy: u8,
    pub saved: Vec<PhyRegister>,
}

/// A register of a PHY.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct PhyRegister {
    pub name: String,
    pub number: u8,
    #[serde(default = "all_of_phy")]
    pub keep: u16,
}

/// Registers that are left alone.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Untouched {
    pub name: String,
    pub offset: u32,
    #[serde(default = "one")]
    pub count: u32,
    pub why: Why,
}

/// A register that counts frames which the device has received and lost. Reading it clears it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Lost {
    pub register: String,
    pub offset: u32,
}

/// A part of a base address register that no guest reaches of those that have the device by turns.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Withheld {
    pub name: String,
    pub bar: u8,
    pub offset: u32,
    pub bytes: u32,
}

/// Why registers are left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::pci::registers) enum Why {
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

/// How the device is reset.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Reset {
    pub register: String,
    pub offset: u32,
    /// Bits that reset it, and clear themselves.
    pub bits: u32,
    /// Register that shows that it has read its own memory again.
    pub done_offset: u32,
    /// Bits that are set then.
    pub done: u32,
    /// How long that may take, in microseconds.
    pub wait_us: u64,
    /// Registers of the state that are 0 then, in the order in which they are made so where a
    /// device leaves them.
    #[serde(default)]
    pub zero: Vec<u32>,
}

/// Registers with the station address.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Station {
    /// Its first four bytes.
    pub low: u32,
    /// The other two, in the lower half.
    pub high: u32,
    /// Bits of `high` that say that there is one.
    pub valid: u32,
}

/// Registers by which a ring is found.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct RingPlace {
    pub name: String,
    pub base_low: u32,
    pub base_high: u32,
    /// Holds its length in bytes.
    pub length: u32,
    pub control: u32,
    /// Bits of `control` that are set while the ring is used.
    pub enable: u32,
    /// What its descriptors look like. With it for every ring, the device reaches no memory but the
    /// rings and what the descriptors point to.
    pub descriptor: Option<Descriptor>,
}

/// Where the descriptors of a ring have addresses.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::pci::registers) struct Descriptor {
    /// Length of one.
    pub bytes: u32,
    /// Where in it there may be an address of 64 bits. What is something else there at times costs
    /// a piece of the map, and nothing else.
    pub addresses: Vec<u32>,
    /// Most bytes that the device reads or writes there.
    pub buffer_bytes: u32,
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

impl Register {
    /// Their offsets.
    pub fn offsets(&self) -> impl Iterator<Item = u32> + use<> {
        (self.offset..).step_by(4).take(self.count as usize)
    }

    /// Whether the one at `offset` is one of these.
    pub fn holds(&self, offset: u32) -> bool {
        let within = offset.checked_sub(self.offset);
        offset.is_multiple_of(4) && within.is_some_and(|within| within / 4 < self.count)
    }
}
