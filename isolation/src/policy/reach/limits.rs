//! What is looked at of memory that comes from the guest.

use crate::guest::addr::Gva;

/// Pointers into the first and last pages of the address space are error numbers or nonsense.
pub(super) const LOWEST: Gva = Gva(0xff00_0000_0000_0000);
pub(super) const HIGHEST: Gva = Gva(u64::MAX - 0x1_0000);

/// Most elements of an array that are looked into: a few rings, not their hundreds of slots.
pub(super) const MAX_ELEMENTS: u64 = 8;

/// Deepest nesting of structures in a structure.
pub(super) const MAX_NESTING: usize = 8;
