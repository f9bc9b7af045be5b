//! Going over all that is mapped in a range of addresses.

use vm_memory::GuestAddress;

use super::{
    AddressSpace, Entry, PageSize, Rights, TABLE_BYTES, entry_address, entry_index, entry_span,
};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::phys::GuestPhys;

/// A page found in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// First address of the page (which may lie before the range, if the range starts inside).
    pub at: Gva,
    /// Where the page's memory is.
    pub gpa: GuestAddress,
    /// Size of the page.
    pub size: PageSize,
    /// What all levels together allow.
    pub rights: Rights,
    /// The page's global bit.
    pub global: bool,
    /// Where the page's entry is.
    pub entry_at: GuestAddress,
    /// The page's entry.
    pub entry: Entry,
}

/// Why a visit was cut short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VisitError {
    /// More tables than allowed.
    #[error("the guest uses more than {0} page tables for this range; ask for a smaller one")]
    OverBudget(usize),
}

/// A table to be visited, and the part of the range it is asked about.
struct Place {
    table: GuestAddress,
    level: u8,
    base: Gva,
    range: GvaRange,
    rights: Rights,
}

struct Visit<'a, M, F> {
    space: &'a AddressSpace,
    memory: &'a M,
    budget: usize,
    left: usize,
    on: F,
}

impl<M: GuestPhys, F: FnMut(&Leaf)> Visit<'_, M, F> {
    /// Goes over one table. Recursion ends at level 1, at most five deep.
    fn table(&mut self, place: &Place) -> Result<(), VisitError> {
        self.left = self
            .left
            .checked_sub(1)
            .ok_or(VisitError::OverBudget(self.budget))?;
        let mut bytes = [0; TABLE_BYTES as usize];
        if self.memory.read(place.table, &mut bytes).is_err() {
            return Ok(()); // The processor would find nothing there either.
        }
        let span = entry_span(place.level);
        let first = entry_index(place.level, place.range.first());
        let last = entry_index(place.level, place.range.last());
        let entries = bytes.as_chunks::<8>().0;
        for (index, bytes) in entries.iter().enumerate().take(last + 1).skip(first) {
            let entry = Entry(u64::from_le_bytes(*bytes));
            if !entry.is_present() || entry.has_reserved_bits(place.level, self.space) {
                continue;
            }
            let at = Gva(place.base.0.wrapping_add(index as u64 * span));
            let rights = place.rights.and(entry.rights());
            if let Some((gpa, size)) = entry.page(place.level) {
                (self.on)(&Leaf {
                    at,
                    gpa,
                    size,
                    rights,
                    global: entry.0 & Entry::GLOBAL != 0,
                    entry_at: entry_address(place.table, index),
                    entry,
                });
                continue;
            }
            let covered = GvaRange::new(at, span).and_then(|r| r.intersection(&place.range));
            if let Some(range) = covered {
                let table = entry.table();
                self.table(&Place {
                    table,
                    level: place.level - 1,
                    base: at,
                    range,
                    rights,
                })?;
            }
        }
        Ok(())
    }
}

impl AddressSpace {
    /// Calls `on` for each page mapped in `range`, in order of addresses. Reads at most
    /// `max_tables` tables. What the processor could not reach (reserved bits, tables outside
    /// memory) counts as not mapped.
    pub fn visit_pages<M: GuestPhys>(
        &self,
        memory: &M,
        range: GvaRange,
        max_tables: usize,
        on: impl FnMut(&Leaf),
    ) -> Result<(), VisitError> {
        let mut visit = Visit {
            space: self,
            memory,
            budget: max_tables,
            left: max_tables,
            on,
        };
        for range in self.levels.canonical_parts(range) {
            let base = Gva(range.first().0 & !((1 << self.levels.address_bits()) - 1));
            let level = self.levels.top();
            visit.table(&Place {
                table: self.root,
                level,
                base,
                range,
                rights: Rights::ALL,
            })?;
        }
        Ok(())
    }
}
