//! The tables of a derived root.

use std::collections::BTreeMap;

use vm_memory::GuestAddress;

use super::edits::{Edit, Edits, Over};
use super::{RootError, TablePool};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::paging::{
    ENTRIES, Entry, Levels, TABLE_BYTES, VirtMemory, entry_address, entry_index, entry_span,
};
use crate::guest::phys::GuestPhys;

type Table = Box<[u64; ENTRIES]>;

/// What a change of the tree needs at hand.
pub(super) struct Context<'a, M, P> {
    source: &'a VirtMemory<'a, M>,
    edits: &'a Edits,
    pool: &'a mut P,
    /// Entries written so far.
    pub(super) changed: usize,
}

impl<'a, M: GuestPhys, P: TablePool> Context<'a, M, P> {
    pub(super) fn new(source: &'a VirtMemory<'a, M>, edits: &'a Edits, pool: &'a mut P) -> Self {
        Self {
            source,
            edits,
            pool,
            changed: 0,
        }
    }
}

/// What a table of ours was made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// A table of the guest's.
    Copied(GuestAddress),
    /// A large page of the guest's, from an entry of this level; no accessed and dirty bits.
    Split(Entry, u8),
    /// Nothing: the guest maps nothing there.
    Empty,
}

/// A table of ours.
#[derive(Debug)]
pub(super) struct Node {
    gpa: GuestAddress,
    level: u8,
    levels: Levels,
    /// First address that it maps; 0 at the top.
    base: Gva,
    origin: Origin,
    /// The guest's entries, as last read.
    source: Table,
    /// Our entries.
    entries: Table,
    /// Tables of ours below this one, by index.
    children: BTreeMap<usize, Node>,
}

impl Node {
    /// The root table, still empty.
    pub(super) fn top<M: GuestPhys, P: TablePool>(
        context: &mut Context<'_, M, P>,
    ) -> Result<Self, RootError> {
        let space = context.source.space;
        Ok(Self {
            gpa: context.pool.alloc().ok_or(RootError::PoolExhausted)?,
            level: space.levels.top(),
            levels: space.levels,
            base: Gva(0),
            origin: Origin::Copied(space.root),
            source: Box::new([0; ENTRIES]),
            entries: Box::new([0; ENTRIES]),
            children: BTreeMap::new(),
        })
    }

    pub(super) fn gpa(&self) -> GuestAddress {
        self.gpa
    }

    pub(super) fn count(&self) -> usize {
        1 + self.children.values().map(Self::count).sum::<usize>()
    }

    /// Gives the table and all below it back.
    pub(super) fn release(self, pool: &mut impl TablePool) {
        for child in self.children.into_values() {
            child.release(pool);
        }
        pool.free(self.gpa);
    }

    pub(super) fn copied_entries(&self) -> Box<dyn Iterator<Item = (GuestAddress, Entry)> + '_> {
        let own = match self.origin {
            Origin::Copied(table) => Some(table),
            Origin::Split(..) | Origin::Empty => None,
        };
        let own = own.into_iter().flat_map(|table| {
            let entry = move |(i, value): (usize, &u64)| (entry_address(table, i), Entry(*value));
            self.source.iter().enumerate().map(entry)
        });
        Box::new(own.chain(self.children.values().flat_map(Self::copied_entries)))
    }

    pub(super) fn entry_at(&self, at: Gva) -> Entry {
        let index = entry_index(self.level, at);
        match self.children.get(&index) {
            Some(child) => child.entry_at(at),
            None => Entry(self.entries[index]),
        }
    }

    /// Makes everything anew with as few tables as possible. The table itself stays in its place.
    pub(super) fn rebuild<M: GuestPhys, P: TablePool>(
        &mut self,
        context: &mut Context<'_, M, P>,
    ) -> Result<(), RootError> {
        for child in std::mem::take(&mut self.children).into_values() {
            child.release(context.pool);
        }
        self.origin = Origin::Copied(context.source.space.root);
        self.source = read_source(context.source, self.origin);
        (0..ENTRIES).try_for_each(|index| self.recompute(context, index, self.entry_range(index)))
    }

    /// Recomputes the entries for `range`, which is canonical, after its edits have changed.
    pub(super) fn update<M: GuestPhys, P: TablePool>(
        &mut self,
        context: &mut Context<'_, M, P>,
        range: GvaRange,
    ) -> Result<(), RootError> {
        let first = entry_index(self.level, range.first());
        let last = entry_index(self.level, range.last());
        (first..=last).try_for_each(|index| match self.entry_range(index).intersection(&range) {
            Some(within) => self.recompute(context, index, within),
            None => Ok(()),
        })
    }

    /// Reads the guest's tables again and recomputes the entries that say something else now.
    /// `moved` is where the root's source is now.
    pub(super) fn refresh<M: GuestPhys, P: TablePool>(
        &mut self,
        context: &mut Context<'_, M, P>,
        moved: Option<GuestAddress>,
    ) -> Result<(), RootError> {
        if let Some(root) = moved {
            self.origin = Origin::Copied(root);
        }
        if let Origin::Copied(_) = self.origin {
            let now = read_source(context.source, self.origin);
            if now != self.source {
                for index in 0..ENTRIES {
                    if says_the_same(now[index], self.source[index]) {
                        continue;
                    }
                    self.source[index] = now[index];
                    self.recompute(context, index, self.entry_range(index))?;
                }
            }
        }
        self.children
            .values_mut()
            .try_for_each(|child| child.refresh(context, None))
    }

    pub(super) fn is_current<M: GuestPhys>(
        &self,
        source: &VirtMemory<'_, M>,
        moved: Option<GuestAddress>,
    ) -> bool {
        let origin = moved.map_or(self.origin, Origin::Copied);
        let same = match origin {
            Origin::Copied(_) => {
                let now = read_source(source, origin);
                now == self.source
                    || now
                        .iter()
                        .zip(&*self.source)
                        .all(|(a, b)| says_the_same(*a, *b))
            }
            Origin::Split(..) | Origin::Empty => true,
        };
        same && self
            .children
            .values()
            .all(|child| child.is_current(source, None))
    }

    /// The addresses that entry `index` maps.
    fn entry_range(&self, index: usize) -> GvaRange {
        let span = entry_span(self.level);
        let at = Gva(self.base.0.wrapping_add(index as u64 * span));
        GvaRange::aligned(self.levels.sign_extend(at), span)
    }

    fn set<M: GuestPhys, P: TablePool>(
        &mut self,
        context: &mut Context<'_, M, P>,
        index: usize,
        entry: Entry,
    ) {
        if self.entries[index] != entry.0 {
            self.entries[index] = entry.0;
            context.pool.write(self.gpa, index, entry.0);
            context.changed += 1;
        }
    }

    /// Computes entry `index` from the guest's entry and the edits. Where there is a table of ours
    /// below, only its part `within` can have other edits than before.
    fn recompute<M: GuestPhys, P: TablePool>(
        &mut self,
        context: &mut Context<'_, M, P>,
        index: usize,
        within: GvaRange,
    ) -> Result<(), RootError> {
        let source = Entry(self.source[index]);
        let range = self.entry_range(index);
        let over = context.edits.over(range);
        let needs_table = self.level > 1
            && match over {
                Over::Uniform(Some(Edit::Map { .. })) | Over::Mixed { maps: true } => true,
                Over::Mixed { maps: false } => self.is_usable(context, source),
                Over::Uniform(_) => false,
            };
        let origin = self.origin_below(context, source);
        match self.children.remove(&index) {
            // Kept even where no boundary needs it any more; see the module's description.
            Some(mut child) if child.origin == origin => {
                let done = child.update(context, within);
                let entry = self.table_entry(source, &child);
                self.children.insert(index, child);
                done?;
                self.set(context, index, entry);
                return Ok(());
            }
            Some(stale) => {
                self.set(context, index, Entry(0));
                stale.release(context.pool);
            }
            None => {}
        }
        if needs_table {
            let child = self.below(context, index, origin)?;
            let entry = self.table_entry(source, &child);
            self.children.insert(index, child);
            self.set(context, index, entry);
            return Ok(());
        }
        let entry = match over {
            Over::Uniform(Some(Edit::Restrict(what))) => what.apply(source),
            Over::Uniform(Some(Edit::Map { offset, rights })) => {
                let mut flags = Entry::PRESENT | Entry::ACCESSED | Entry::DIRTY;
                if rights.write {
                    flags |= Entry::WRITE;
                }
                if !rights.execute {
                    flags |= Entry::NO_EXECUTE;
                }
                Entry((range.first().0.wrapping_add(offset) & Entry::ADDRESS) | flags)
            }
            Over::Uniform(None) | Over::Mixed { .. } => source,
        };
        self.set(context, index, entry);
        Ok(())
    }

    /// Whether the processor would go on through `entry`.
    fn is_usable<M, P>(&self, context: &Context<'_, M, P>, entry: Entry) -> bool {
        entry.is_present() && !entry.has_reserved_bits(self.level, &context.source.space)
    }

    /// What a table of ours in place of `source` would be made from.
    fn origin_below<M, P>(&self, context: &Context<'_, M, P>, source: Entry) -> Origin {
        if !self.is_usable(context, source) {
            Origin::Empty
        } else if source.page(self.level).is_some() {
            Origin::Split(source.without_accessed_dirty(), self.level)
        } else {
            Origin::Copied(source.table())
        }
    }

    /// The entry of ours that leads to `child` instead of to what `source` leads to.
    fn table_entry(&self, source: Entry, child: &Self) -> Entry {
        let inner = Entry::PRESENT | Entry::WRITE | Entry::ACCESSED;
        let flags = match child.origin {
            Origin::Copied(_) => source.0 & !Entry::ADDRESS,
            Origin::Split(page, _) => inner | (page.0 & Entry::USER),
            Origin::Empty => inner,
        };
        Entry(child.gpa.0 | flags)
    }

    /// A complete table of ours for entry `index`. On failure nothing is left of it.
    fn below<M: GuestPhys, P: TablePool>(
        &self,
        context: &mut Context<'_, M, P>,
        index: usize,
        origin: Origin,
    ) -> Result<Self, RootError> {
        let mut child = Self {
            gpa: context.pool.alloc().ok_or(RootError::PoolExhausted)?,
            level: self.level - 1,
            levels: self.levels,
            base: self.entry_range(index).first(),
            origin,
            source: read_source(context.source, origin),
            entries: Box::new([0; ENTRIES]),
            children: BTreeMap::new(),
        };
        let done = (0..ENTRIES)
            .try_for_each(|index| child.recompute(context, index, child.entry_range(index)));
        match done {
            Ok(()) => Ok(child),
            Err(error) => {
                child.release(context.pool);
                Err(error)
            }
        }
    }
}

/// The entries of `origin` as they are now. A table outside memory has none.
fn read_source<M: GuestPhys>(source: &VirtMemory<'_, M>, origin: Origin) -> Table {
    let mut entries = Box::new([0; ENTRIES]);
    match origin {
        Origin::Copied(table) => {
            let mut bytes = [0; TABLE_BYTES as usize];
            if source.memory.read(table, &mut bytes).is_ok() {
                for (entry, bytes) in entries.iter_mut().zip(bytes.as_chunks::<8>().0) {
                    *entry = u64::from_le_bytes(*bytes);
                }
            }
        }
        Origin::Split(page, level) => {
            for (index, entry) in entries.iter_mut().enumerate() {
                *entry = page.split(level, index).0;
            }
        }
        Origin::Empty => {}
    }
    entries
}

fn says_the_same(a: u64, b: u64) -> bool {
    Entry(a).without_accessed_dirty() == Entry(b).without_accessed_dirty()
}
