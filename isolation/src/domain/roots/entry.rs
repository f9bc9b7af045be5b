//! Entries of page tables, and what becomes of a guest's entry in each root.

use super::super::monitor::Monitor;

/// Entry bits (Intel SDM volume 3, tables 4-15 to 4-20).
pub(super) mod bits {
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const ACCESSED: u64 = 1 << 5;
    pub const DIRTY: u64 = 1 << 6;
    pub const LARGE: u64 = 1 << 7;
    pub const GLOBAL: u64 = 1 << 8;
    pub const PAT_LARGE: u64 = 1 << 12;
    pub const NX: u64 = 1 << 63;
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// One of the two roots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Root {
    /// The driver's: nothing is writable or executable but what was opened.
    Driver,
    /// The kernel's: the guest's permissions, driver text and memory that devices write meanwhile
    /// excepted.
    Kernel,
}

/// Permissions of one page in one root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permissions {
    /// Stores succeed.
    pub write: bool,
    /// Instruction fetches succeed.
    pub execute: bool,
}

pub(super) fn shift(level: u8) -> u32 {
    12 + 9 * (u32::from(level) - 1)
}

pub(super) fn index(va: u64, level: u8) -> u64 {
    (va >> shift(level)) & 511
}

/// What addresses covered by one table of `level` have in common.
pub(super) fn prefix(va: u64, level: u8) -> u64 {
    if level >= 4 {
        0
    } else {
        va >> shift(level + 1)
    }
}

/// The entry one level below (at `level`) that a large page's `entry` at `from` stands for.
pub(super) fn split(entry: u64, from: u8, level: u8, va: u64) -> u64 {
    let covered = (1u64 << shift(from)) - 1;
    let piece = (va & covered) & !((1u64 << shift(level)) - 1);
    let base = entry & bits::ADDRESS & !covered;
    let mut flags = entry & !bits::ADDRESS & !bits::LARGE;
    if level > 1 {
        flags |= bits::LARGE | (entry & bits::PAT_LARGE);
    } else if entry & bits::PAT_LARGE != 0 {
        // PAT is bit 12 of a large entry and bit 7 of a 4 KiB one.
        flags |= bits::LARGE;
    }
    base | piece | flags
}

/// `entry` with the permissions that `root` gives by default, or those of a `special` page. Global
/// bits go: a translation must not survive the switch to the other root.
pub(super) fn restrict(root: Root, entry: u64, special: Option<Permissions>) -> u64 {
    let entry = entry & !bits::GLOBAL;
    match (special, root) {
        (Some(special), Root::Driver) => {
            let write = if special.write {
                entry & bits::WRITE
            } else {
                0
            };
            let nx = if special.execute {
                entry & bits::NX
            } else {
                bits::NX
            };
            (entry & !bits::WRITE & !bits::NX) | write | nx
        }
        (None, Root::Driver) => (entry & !bits::WRITE) | bits::NX,
        (Some(special), Root::Kernel) if !special.execute => entry | bits::NX,
        (_, Root::Kernel) => entry,
    }
}

pub(super) fn without_used(entry: u64) -> u64 {
    entry & !(bits::ACCESSED | bits::DIRTY)
}

/// Entry `at` of the table that is page `table` of the monitor area.
pub(super) fn entry_at(monitor: &Monitor, table: u64, at: u64) -> u64 {
    let entries = monitor.page(table).as_chunks::<8>().0;
    entries
        .get(at as usize)
        .map_or(0, |entry| u64::from_le_bytes(*entry))
}

/// Sets it.
pub(super) fn put_entry(monitor: &mut Monitor, table: u64, at: u64, entry: u64) {
    let at = at as usize * 8;
    monitor.page_mut(table)[at..at + 8].copy_from_slice(&entry.to_le_bytes());
}
