//! Guest virtual addresses and ranges of them.
//!
//! Guest physical addresses are `vm_memory::GuestAddress`; the two never mix in one integer type.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A guest virtual (linear) address. Not necessarily canonical.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Gva(pub u64);

impl Gva {
    /// The address `bytes` further on, or `None` past the end of the address space.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }

    /// The address `bytes` back, or `None` below zero.
    pub fn checked_sub(self, bytes: u64) -> Option<Self> {
        self.0.checked_sub(bytes).map(Self)
    }

    /// The first byte of the 4 KiB page that holds this address.
    pub fn page(self) -> Self {
        Self(self.0 & !0xfff)
    }
}

impl fmt::Debug for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gva({:#x})", self.0)
    }
}

impl fmt::Display for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A non-empty range of guest virtual addresses. Kept by its last byte, so that a range may end
/// with the address space (the kernel half does).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GvaRange {
    first: Gva,
    last: Gva,
}

impl GvaRange {
    /// `len` bytes from `first`; `None` if there are none or they run past the address space.
    pub fn new(first: Gva, len: u64) -> Option<Self> {
        let last = first.checked_add(len.checked_sub(1)?)?;
        Some(Self { first, last })
    }

    /// From `first` to `last`, both included; `None` if `last` lies before `first`.
    pub fn inclusive(first: Gva, last: Gva) -> Option<Self> {
        (first <= last).then_some(Self { first, last })
    }

    /// From `first` up to but not including `end`; `None` if that is empty.
    pub fn until(first: Gva, end: Gva) -> Option<Self> {
        Self::inclusive(first, end.checked_sub(1)?)
    }

    /// The range of `size` bytes, a power of two, and aligned to it, that holds `at`.
    pub fn aligned(at: Gva, size: u64) -> Self {
        let within = size.wrapping_sub(1);
        Self {
            first: Gva(at.0 & !within),
            last: Gva(at.0 | within),
        }
    }

    /// First byte.
    pub fn first(&self) -> Gva {
        self.first
    }

    /// Last byte.
    pub fn last(&self) -> Gva {
        self.last
    }

    /// Length in bytes; the whole 64-bit space reads as `u64::MAX`.
    pub fn len_bytes(&self) -> u64 {
        (self.last.0 - self.first.0).saturating_add(1)
    }

    /// Whether the byte at `at` is in the range.
    pub fn contains(&self, at: Gva) -> bool {
        self.first <= at && at <= self.last
    }

    /// Whether every byte of `other` is in the range.
    pub fn covers(&self, other: &Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// What the two ranges have in common.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        Self::inclusive(self.first.max(other.first), self.last.min(other.last))
    }

    /// The smallest range of whole 4 KiB pages around this one.
    pub fn to_pages(&self) -> Self {
        Self {
            first: self.first.page(),
            last: Gva(self.last.0 | 0xfff),
        }
    }

    /// First bytes of the 4 KiB pages the range touches, in order.
    pub fn pages(&self) -> impl Iterator<Item = Gva> + use<> {
        (self.first.0 >> 12..=self.last.0 >> 12).map(|page| Gva(page << 12))
    }
}

impl fmt::Debug for GvaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.first.0, self.last.0)
    }
}

impl fmt::Display for GvaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
