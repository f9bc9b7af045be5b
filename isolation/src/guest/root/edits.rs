//! How a derived root shall differ from the guest's own.

use rangemap::RangeInclusiveMap;
use vm_memory::GuestAddress;

use crate::guest::addr::{Gva, GvaRange};
use crate::guest::paging::{Entry, Rights};

/// Rights taken from what the guest maps. Rights can only be taken, never given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Restriction {
    /// No writes.
    pub no_write: bool,
    /// No instruction fetches.
    pub no_execute: bool,
    /// Not mapped at all.
    pub hidden: bool,
}

impl Restriction {
    /// Readable at most as the guest has it, executable too, but not writable.
    pub const NO_WRITE: Self = Self {
        no_write: true,
        no_execute: false,
        hidden: false,
    };
    /// Not executable.
    pub const NO_EXECUTE: Self = Self {
        no_write: false,
        no_execute: true,
        hidden: false,
    };
    /// Readable at most.
    pub const READ_ONLY: Self = Self {
        no_write: true,
        no_execute: true,
        hidden: false,
    };
    /// Not there.
    pub const HIDDEN: Self = Self {
        no_write: false,
        no_execute: false,
        hidden: true,
    };

    /// `entry` with the rights taken.
    pub(super) fn apply(self, entry: Entry) -> Entry {
        if !entry.is_present() {
            return entry;
        }
        if self.hidden {
            return Entry(0);
        }
        let mut value = entry.0;
        if self.no_write {
            value &= !Entry::WRITE;
        }
        if self.no_execute {
            value |= Entry::NO_EXECUTE;
        }
        Entry(value)
    }
}

/// What is changed in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Edit {
    /// As the guest has it, less some rights.
    Restrict(Restriction),
    /// Something of ours in 4 KiB pages, whatever the guest has there.
    Map {
        /// Physical address less virtual address, modulo 2^64: equal for all pages of a mapping.
        offset: u64,
        /// For supervisor code only; `user` is ignored.
        rights: Rights,
    },
}

/// A range whose ends are not page boundaries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{range} is not made of whole 4 KiB pages, or its physical address is not")]
pub struct Unaligned {
    /// The range.
    pub range: GvaRange,
}

/// What the edits say about a range.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// The same everywhere.
    Uniform(Option<Edit>),
    /// Not the same everywhere.
    Mixed {
        /// Something of ours is mapped in it.
        maps: bool,
    },
}

/// Edits by range. A later edit of a range takes the place of an earlier one.
#[derive(Debug, Clone, Default)]
pub struct Edits {
    ranges: RangeInclusiveMap<u64, Edit>,
}

impl Edits {
    /// Takes rights from what the guest maps in `range`; an empty restriction undoes earlier edits.
    pub fn restrict(&mut self, range: GvaRange, what: Restriction) -> Result<(), Unaligned> {
        check_aligned(range)?;
        let keys = range.first().0..=range.last().0;
        if what == Restriction::default() {
            self.ranges.remove(keys);
        } else {
            self.ranges.insert(keys, Edit::Restrict(what));
        }
        Ok(())
    }

    /// Leaves `range` as the guest has it.
    pub fn clear(&mut self, range: GvaRange) -> Result<(), Unaligned> {
        self.restrict(range, Restriction::default())
    }

    /// Maps `range` to physical memory from `gpa`, for supervisor code and not global.
    pub fn map(
        &mut self,
        range: GvaRange,
        gpa: GuestAddress,
        rights: Rights,
    ) -> Result<(), Unaligned> {
        check_aligned(range)?;
        if gpa.0 & !Entry::ADDRESS != 0 {
            return Err(Unaligned { range });
        }
        let rights = Rights {
            user: false,
            ..rights
        };
        let offset = gpa.0.wrapping_sub(range.first().0);
        self.ranges.insert(
            range.first().0..=range.last().0,
            Edit::Map { offset, rights },
        );
        Ok(())
    }

    /// What `at` may be used for, given that the guest allows everything; `None` if nothing of the
    /// guest's is changed or something of ours is mapped there.
    pub fn restriction_at(&self, at: Gva) -> Option<Restriction> {
        match self.ranges.get(&at.0) {
            Some(Edit::Restrict(what)) => Some(*what),
            _ => None,
        }
    }

    pub(super) fn over(&self, range: GvaRange) -> Over {
        let keys = range.first().0..=range.last().0;
        let mut overlapping = self.ranges.overlapping(&keys);
        let Some((found, edit)) = overlapping.next() else {
            return Over::Uniform(None);
        };
        if found.start() <= keys.start() && keys.end() <= found.end() {
            return Over::Uniform(Some(*edit));
        }
        let is_map = |edit: &Edit| matches!(edit, Edit::Map { .. });
        Over::Mixed {
            maps: is_map(edit) || overlapping.any(|(_, edit)| is_map(edit)),
        }
    }

    pub(super) fn take_execute(&self) -> bool {
        self.ranges.iter().any(|(_, edit)| match edit {
            Edit::Restrict(what) => what.no_execute,
            Edit::Map { rights, .. } => !rights.execute,
        })
    }
}

fn check_aligned(range: GvaRange) -> Result<(), Unaligned> {
    if range.to_pages() == range {
        Ok(())
    } else {
        Err(Unaligned { range })
    }
}
