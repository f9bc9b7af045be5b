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

/// Neighbouring pages with the same rights, contiguous in physical memory too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedRun {
    /// The addresses, cut to the range that was asked for.
    pub range: GvaRange,
    /// Physical address of the first byte.
    pub gpa: GuestAddress,
    /// What all levels together allow.
    pub rights: Rights,
}

/// A table that takes part in mapping a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TablePage {
    /// Where it is.
    pub gpa: GuestAddress,
    /// Its level: 5 or 4 at the top, 1 at the bottom.
    pub level: u8,
    /// The first address that it maps, the range aside.
    pub first: Gva,
}

/// Why a visit was cut short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VisitError {
    /// More tables than allowed.
    #[error("the guest uses more than {0} page tables for this range; ask for a smaller one")]
    OverBudget(usize),
}

enum Found<'a> {
    Table(TablePage),
    Leaf(&'a Leaf),
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

impl<M: GuestPhys, F: FnMut(Found)> Visit<'_, M, F> {
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
        (self.on)(Found::Table(TablePage {
            gpa: place.table,
            level: place.level,
            first: place.base,
        }));
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
                (self.on)(Found::Leaf(&Leaf {
                    at,
                    gpa,
                    size,
                    rights,
                    global: entry.0 & Entry::GLOBAL != 0,
                    entry_at: entry_address(place.table, index),
                    entry,
                }));
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
    fn visit<M: GuestPhys>(
        &self,
        memory: &M,
        range: GvaRange,
        max_tables: usize,
        on: impl FnMut(Found),
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

    /// Calls `on` for each page mapped in `range`, in order of addresses. Reads at most
    /// `max_tables` tables. What the processor could not reach (reserved bits, tables outside
    /// memory) counts as not mapped.
    pub fn visit_pages<M: GuestPhys>(
        &self,
        memory: &M,
        range: GvaRange,
        max_tables: usize,
        mut on: impl FnMut(&Leaf),
    ) -> Result<(), VisitError> {
        self.visit(memory, range, max_tables, |found| {
            if let Found::Leaf(leaf) = found {
                on(leaf);
            }
        })
    }

    /// The tables that map `range`, each before those below it. Also those of unmapped parts, as
    /// far down as there are any. A table that is used twice is listed twice.
    pub fn tables_of<M: GuestPhys>(
        &self,
        memory: &M,
        range: GvaRange,
        max_tables: usize,
    ) -> Result<Vec<TablePage>, VisitError> {
        let mut tables = Vec::new();
        self.visit(memory, range, max_tables, |found| {
            if let Found::Table(table) = found {
                tables.push(table);
            }
        })?;
        Ok(tables)
    }

    /// What is mapped in `range`, neighbours merged, in order of addresses.
    pub fn mapped_runs<M: GuestPhys>(
        &self,
        memory: &M,
        range: GvaRange,
        max_tables: usize,
    ) -> Result<Vec<MappedRun>, VisitError> {
        let mut runs: Vec<MappedRun> = Vec::new();
        self.visit_pages(memory, range, max_tables, |leaf| {
            let page = GvaRange::new(leaf.at, leaf.size.bytes());
            let Some(part) = page.and_then(|page| page.intersection(&range)) else {
                return;
            };
            let gpa = GuestAddress(leaf.gpa.0 + (part.first().0 - leaf.at.0));
            if let Some(run) = runs.last_mut()
                && run.rights == leaf.rights
                && run.range.last().checked_add(1) == Some(part.first())
                && run.gpa.0 + run.range.len_bytes() == gpa.0
                && let Some(merged) = GvaRange::inclusive(run.range.first(), part.last())
            {
                run.range = merged;
                return;
            }
            runs.push(MappedRun {
                range: part,
                gpa,
                rights: leaf.rights,
            });
        })?;
        Ok(runs)
    }
}
