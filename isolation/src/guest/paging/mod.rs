//! The guest's page tables, walked in software (Intel SDM volume 3, section 4.5; AMD APM volume 2,
//! section 5.3): 4-level and 5-level paging with 4 KiB, 2 MiB and 1 GiB pages.
//!
//! The tables belong to a guest that may be hostile and whose other vCPUs may be writing them:
//! every word is read once and judged by itself, and a walk reads at most five. Rights are those of
//! supervisor code with `CR0.WP` set; protection keys, SMEP and SMAP are left to the processor.

mod entry;
mod virt;
mod visit;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use vm_memory::GuestAddress;

use super::addr::{Gva, GvaRange};
use super::phys::{GuestPhys, OutsideMemory};

pub use entry::{Entry, PageSize, Rights};
pub use virt::{VirtError, VirtMemory};

/// Entries in a table.
pub const ENTRIES: usize = 512;

/// Bytes of a table.
pub const TABLE_BYTES: u64 = 4096;

/// How many levels of tables a walk goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Levels {
    /// 48-bit linear addresses, PML4.
    Four,
    /// 57-bit linear addresses, PML5 (`CR4.LA57`).
    Five,
}

impl Levels {
    /// The level of the root table: 4 or 5. The table that holds 4 KiB pages is level 1.
    pub fn top(self) -> u8 {
        match self {
            Self::Four => 4,
            Self::Five => 5,
        }
    }

    /// Bits of a linear address that are translated: 48 or 57.
    pub fn address_bits(self) -> u32 {
        12 + 9 * u32::from(self.top())
    }

    /// `at` with its untranslated upper bits made equal to the highest translated one.
    pub fn sign_extend(self, at: Gva) -> Gva {
        let unused = 64 - self.address_bits();
        Gva(((at.0 << unused) as i64 >> unused) as u64)
    }

    /// Whether the untranslated upper bits of `at` all equal the highest translated one.
    pub fn is_canonical(self, at: Gva) -> bool {
        self.sign_extend(at) == at
    }

    /// The parts of `range` that are canonical: at most one in the lower and one in the upper half.
    pub fn canonical_parts(self, range: GvaRange) -> impl Iterator<Item = GvaRange> {
        let half = 1u64 << (self.address_bits() - 1);
        let lower = GvaRange::new(Gva(0), half);
        let upper = GvaRange::inclusive(Gva(half.wrapping_neg()), Gva(u64::MAX));
        [lower, upper]
            .into_iter()
            .flatten()
            .filter_map(move |half| half.intersection(&range))
    }
}

/// Bytes that one entry of a table of `level` (1 to 5) maps.
pub fn entry_span(level: u8) -> u64 {
    1 << (12 + 9 * (u32::from(level.clamp(1, 5)) - 1))
}

/// Index of the entry for `at` in a table of `level` (1 to 5).
pub fn entry_index(level: u8, at: Gva) -> usize {
    (at.0 >> entry_span(level).trailing_zeros()) as usize % ENTRIES
}

/// One guest address space: where its tables are and how the processor reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressSpace {
    /// The top-level table.
    pub root: GuestAddress,
    /// How many levels there are.
    pub levels: Levels,
    /// `EFER.NXE`: bit 63 of an entry is "no execute" and not reserved.
    pub no_execute: bool,
    /// Physical address width of the guest's CPUID (leaf 0x80000008): bits above it are reserved.
    pub physical_bits: u8,
}

impl AddressSpace {
    const CR4_LA57: u64 = 1 << 12;
    const EFER_NXE: u64 = 1 << 11;

    /// From a vCPU's registers in 64-bit mode. `physical_bits` is kept within 32 to 52.
    pub fn from_registers(cr3: u64, cr4: u64, efer: u64, physical_bits: u8) -> Self {
        Self {
            root: GuestAddress(cr3 & Entry::ADDRESS),
            levels: if cr4 & Self::CR4_LA57 != 0 {
                Levels::Five
            } else {
                Levels::Four
            },
            no_execute: efer & Self::EFER_NXE != 0,
            physical_bits: physical_bits.clamp(32, 52),
        }
    }

    /// Whether the entries of 4 KiB pages at `one` and `other` are in the same table.
    pub fn same_table(one: Gva, other: Gva) -> bool {
        let covered = entry_span(2);
        one.0 / covered == other.0 / covered
    }

    /// Translates `at`, as a processor would that looks for no permission in particular.
    pub fn walk(&self, memory: &impl GuestPhys, at: Gva) -> Result<Translation, WalkError> {
        if !self.levels.is_canonical(at) {
            return Err(WalkError::NotCanonical { at });
        }
        let mut path = WalkPath::default();
        let mut rights = Rights::ALL;
        let mut table = self.root;
        let mut level = self.levels.top();
        loop {
            let at_gpa = entry_address(table, entry_index(level, at));
            let value = memory
                .read_u64(at_gpa)
                .map_err(|OutsideMemory { at, .. }| WalkError::TableOutsideMemory { level, at })?;
            let entry = Entry(value);
            let step = Step {
                level,
                at: at_gpa,
                entry,
            };
            path.push(step);
            if !entry.is_present() {
                return Err(WalkError::NotPresent { step });
            }
            if entry.has_reserved_bits(level, self) {
                return Err(WalkError::ReservedBits { step });
            }
            rights = rights.and(entry.rights());
            if let Some((page, size)) = entry.page(level) {
                let gpa = GuestAddress(page.0 | (at.0 & (size.bytes() - 1)));
                let global = entry.0 & Entry::GLOBAL != 0;
                return Ok(Translation {
                    at,
                    gpa,
                    page,
                    size,
                    rights,
                    global,
                    path,
                });
            }
            table = entry.table();
            level -= 1; // An entry of level 1 is always a page.
        }
    }
}

/// Guest physical address of entry `index` of the table at `table`.
pub fn entry_address(table: GuestAddress, index: usize) -> GuestAddress {
    GuestAddress((table.0 & Entry::ADDRESS) + (index % ENTRIES) as u64 * 8)
}

/// One entry that a walk read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Level of the table it is in: 5 or 4 at the top, 1 at the bottom.
    pub level: u8,
    /// Where the entry is.
    pub at: GuestAddress,
    /// What it was when it was read.
    pub entry: Entry,
}

/// The entries a walk read, the top-level table's first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WalkPath {
    steps: [Option<Step>; 5],
}

impl WalkPath {
    fn push(&mut self, step: Step) {
        if let Some(free) = self.steps.iter_mut().find(|s| s.is_none()) {
            *free = Some(step);
        }
    }

    /// The steps, the top-level table's first.
    pub fn iter(&self) -> impl Iterator<Item = Step> + '_ {
        self.steps.iter().flatten().copied()
    }

    /// The step at `level`, if the walk came that far.
    pub fn at_level(&self, level: u8) -> Option<Step> {
        self.iter().find(|s| s.level == level)
    }
}

/// Where an address leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// The address that was asked for.
    pub at: Gva,
    /// Its guest physical address. Not checked against memory: it may be a device or nothing.
    pub gpa: GuestAddress,
    /// First byte of the page.
    pub page: GuestAddress,
    /// Size of the page.
    pub size: PageSize,
    /// What all levels together allow.
    pub rights: Rights,
    /// The page's global bit.
    pub global: bool,
    /// The entries on the way.
    pub path: WalkPath,
}

/// Why an address leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WalkError {
    /// The upper bits are not a sign extension.
    #[error("guest address {at} is not canonical")]
    NotCanonical {
        /// The address.
        at: Gva,
    },
    /// An entry is not present.
    #[error("the guest maps nothing there: level {} entry {:#x} at {:#x}", .step.level, .step.entry.0, .step.at.0)]
    NotPresent {
        /// The entry.
        step: Step,
    },
    /// An entry has a bit set that the processor reserves.
    #[error("reserved bit set in level {} page-table entry {:#x} at {:#x}", .step.level, .step.entry.0, .step.at.0)]
    ReservedBits {
        /// The entry.
        step: Step,
    },
    /// A table lies where there is no memory.
    #[error("the level {level} page table entry at {:#x} is outside guest memory", .at.0)]
    TableOutsideMemory {
        /// Level of the table.
        level: u8,
        /// Where the entry would be.
        at: GuestAddress,
    },
}
