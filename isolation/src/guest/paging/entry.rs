//! One page-table entry.

use serde::Serialize;
use vm_memory::GuestAddress;

use super::AddressSpace;

/// A page-table entry of any level (Intel SDM volume 3, tables 4-14 to 4-20).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Entry(pub u64);

impl Entry {
    /// P: the entry is in use.
    pub const PRESENT: u64 = 1;
    /// R/W: writes are allowed.
    pub const WRITE: u64 = 1 << 1;
    /// U/S: user-mode accesses are allowed.
    pub const USER: u64 = 1 << 2;
    /// A: set by the processor on first use.
    pub const ACCESSED: u64 = 1 << 5;
    /// D: set by the processor on the first write through a page entry.
    pub const DIRTY: u64 = 1 << 6;
    /// PS: the entry of level 2 or 3 maps a large page.
    pub const LARGE: u64 = 1 << 7;
    /// G: the translation survives a load of CR3.
    pub const GLOBAL: u64 = 1 << 8;
    /// The physical address bits.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    /// XD/NX: no instruction fetches.
    pub const NO_EXECUTE: u64 = 1 << 63;

    /// PAT bit of a 4 KiB page.
    const PAT_SMALL: u64 = 1 << 7;
    /// PAT bit of a large page.
    const PAT_LARGE: u64 = 1 << 12;

    /// Whether the processor uses the entry at all.
    pub fn is_present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }

    /// The rights that this entry by itself leaves.
    pub fn rights(self) -> Rights {
        Rights {
            write: self.0 & Self::WRITE != 0,
            user: self.0 & Self::USER != 0,
            execute: self.0 & Self::NO_EXECUTE == 0,
        }
    }

    /// The table of the next level. Only meaningful where `page` is `None`.
    pub fn table(self) -> GuestAddress {
        GuestAddress(self.0 & Self::ADDRESS)
    }

    /// The page that this entry of a table of `level` maps; `None` if it points at a table.
    pub fn page(self, level: u8) -> Option<(GuestAddress, PageSize)> {
        let large = self.0 & Self::LARGE != 0;
        let size = match level {
            1 => PageSize::Size4K,
            2 if large => PageSize::Size2M,
            3 if large => PageSize::Size1G,
            _ => return None,
        };
        Some((
            GuestAddress(self.0 & Self::ADDRESS & !(size.bytes() - 1)),
            size,
        ))
    }

    /// Whether a bit is set that makes the processor raise a page fault with RSVD.
    pub fn has_reserved_bits(self, level: u8, space: &AddressSpace) -> bool {
        // Address bits below the page size are reserved too, but for the PAT bit of a large page.
        let unaligned = match self.page(level) {
            Some((_, PageSize::Size4K)) | None => 0,
            Some((_, size)) => (size.bytes() - 1) & Self::ADDRESS & !Self::PAT_LARGE,
        };
        let mut reserved = unaligned | (Self::ADDRESS & !((1 << space.physical_bits.min(52)) - 1));
        if !space.no_execute {
            reserved |= Self::NO_EXECUTE;
        }
        if level >= 4 {
            reserved |= Self::LARGE;
        }
        self.0 & reserved != 0
    }

    /// Entry `index` of the table, one level down, that maps the same memory with the same rights
    /// as this large page of `level` (2 or 3) does. Returns the entry itself if it is no large
    /// page.
    pub fn split(self, level: u8, index: usize) -> Self {
        let Some((page, size)) = self.page(level).filter(|(_, s)| *s != PageSize::Size4K) else {
            return self;
        };
        let step = size.bytes() / super::ENTRIES as u64;
        let mut flags = self.0 & !Self::ADDRESS;
        let pat = self.0 & Self::PAT_LARGE != 0;
        if size == PageSize::Size2M {
            flags &= !Self::LARGE;
            if pat {
                flags |= Self::PAT_SMALL;
            }
        } else if pat {
            flags |= Self::PAT_LARGE;
        }
        Self((page.0 + (index % super::ENTRIES) as u64 * step) | flags)
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Entry({:#x})", self.0)
    }
}

/// What a mapping allows besides reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Rights {
    /// Writes.
    pub write: bool,
    /// Accesses from user mode.
    pub user: bool,
    /// Instruction fetches.
    pub execute: bool,
}

impl Rights {
    /// Everything: where a walk starts from.
    pub const ALL: Self = Self {
        write: true,
        user: true,
        execute: true,
    };

    /// What both allow.
    pub fn and(self, other: Self) -> Self {
        Self {
            write: self.write && other.write,
            user: self.user && other.user,
            execute: self.execute && other.execute,
        }
    }
}

/// Size of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum PageSize {
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl PageSize {
    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Size4K => 1 << 12,
            Self::Size2M => 1 << 21,
            Self::Size1G => 1 << 30,
        }
    }
}
