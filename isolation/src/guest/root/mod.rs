//! A page-table root of our own, derived from the guest's.
//!
//! ```text
//!  guest's root ──► table ──► table          source: read only, changes under us
//!      │copied        │copied     ╲
//!  derived root ──► table ──► ... ──► (the guest's own tables)
//!      in the monitor area, from a TablePool
//! ```
//!
//! The derived tree is a pure function of the guest's tables and of the [`Edits`]: an entry is the
//! guest's value with the edit's rights taken; a table is copied only where a boundary between
//! edits falls inside of what it maps, and a large page is split only then. Everything else is
//! shared with the guest. Taking a right from a whole half of the address space costs no table.
//!
//! Both arguments change while the root lives. [`DerivedRoot::sync`] follows the guest (another
//! process, a loaded module, a split large page): it compares each copied table with its source and
//! recomputes only the entries that differ. [`DerivedRoot::edit`] follows the policy: it
//! recomputes only the entries of the range. Tables that an edit needed stay until the pool is
//! used up, so that opening and closing a page is one store each.
//!
//! The root table keeps its address for ever. All of this may be called only while no vCPU runs on
//! the tables, and after a change the vCPU's next load of CR3 must flush.

mod edits;
mod tree;

#[cfg(test)]
mod tests;

use vm_memory::GuestAddress;

use super::addr::{Gva, GvaRange};
use super::paging::{Entry, Rights, VirtMemory};
use super::phys::GuestPhys;
use tree::{Context, Node};

pub use edits::{Edits, Restriction, Unaligned};

/// Where tables of our own come from: pages of the monitor area.
pub trait TablePool {
    /// A page that is not in use, all zero; `None` if there is no more.
    fn alloc(&mut self) -> Option<GuestAddress>;

    /// Gives back a page that `alloc` gave.
    fn free(&mut self, table: GuestAddress);

    /// Writes entry `index` (below 512) of a page that `alloc` gave.
    fn write(&mut self, table: GuestAddress, index: usize, entry: u64);
}

/// Why a root could not be built or brought up to date. The root must not be used until a later
/// call succeeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RootError {
    /// The pool is too small for the tables that the edits need.
    #[error("page-table pool used up; give the monitor area more pages or open fewer ranges")]
    PoolExhausted,
    /// The edits take the right to execute, and the guest runs without `EFER.NXE`.
    #[error("the guest does not use no-execute page protection; boot it without noexec=off")]
    NoExecuteIsOff,
    /// An edit is not made of whole pages.
    #[error(transparent)]
    Unaligned(#[from] Unaligned),
}

/// One change of the edits of a root that is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Take rights from what the guest maps.
    Restrict(Restriction),
    /// Leave it as the guest has it.
    Clear,
    /// Map something of ours.
    Map {
        /// First byte of the physical memory.
        gpa: GuestAddress,
        /// For supervisor code only.
        rights: Rights,
    },
}

/// A root derived from the guest's. See the module's description.
#[derive(Debug)]
pub struct DerivedRoot {
    top: Node,
    edits: Edits,
    /// The last change failed half way: everything below the root has to be made again.
    incomplete: bool,
}

impl DerivedRoot {
    /// Builds a root from the tables of `source` as they are now. Gives nothing back to the pool
    /// if the root page itself could not be had; any other failure gives back everything.
    pub fn build<M: GuestPhys>(
        source: &VirtMemory<'_, M>,
        edits: Edits,
        pool: &mut impl TablePool,
    ) -> Result<Self, RootError> {
        if edits.take_execute() && !source.space.no_execute {
            return Err(RootError::NoExecuteIsOff);
        }
        let context = &mut Context::new(source, &edits, pool);
        let mut top = Node::top(context)?;
        if let Err(error) = top.rebuild(context) {
            top.release(pool);
            return Err(error);
        }
        Ok(Self {
            top,
            edits,
            incomplete: false,
        })
    }

    /// The root table: what CR3 shall hold. Never changes.
    pub fn root(&self) -> GuestAddress {
        self.top.gpa()
    }

    /// The edits in force.
    pub fn edits(&self) -> &Edits {
        &self.edits
    }

    /// Tables of our own, the root included.
    pub fn table_count(&self) -> usize {
        self.top.count()
    }

    /// Brings the root up to date with the guest's tables, which may also be those of another
    /// process. Returns how many entries changed.
    pub fn sync<M: GuestPhys>(
        &mut self,
        source: &VirtMemory<'_, M>,
        pool: &mut impl TablePool,
    ) -> Result<usize, RootError> {
        if self.edits.take_execute() && !source.space.no_execute {
            return Err(RootError::NoExecuteIsOff);
        }
        let Self {
            top,
            edits,
            incomplete,
        } = self;
        let context = &mut Context::new(source, edits, pool);
        let done = match *incomplete {
            true => Err(RootError::PoolExhausted),
            false => top.refresh(context, Some(source.space.root)),
        };
        Self::finish(top, incomplete, context, done)
    }

    /// Changes the edits of `range` and the tables with them. Returns how many entries changed.
    pub fn edit<M: GuestPhys>(
        &mut self,
        source: &VirtMemory<'_, M>,
        pool: &mut impl TablePool,
        range: GvaRange,
        change: Change,
    ) -> Result<usize, RootError> {
        match change {
            Change::Restrict(what) => self.edits.restrict(range, what)?,
            Change::Clear => self.edits.clear(range)?,
            Change::Map { gpa, rights } => self.edits.map(range, gpa, rights)?,
        }
        if self.edits.take_execute() && !source.space.no_execute {
            self.incomplete = true;
            return Err(RootError::NoExecuteIsOff);
        }
        let Self {
            top,
            edits,
            incomplete,
        } = self;
        let context = &mut Context::new(source, edits, pool);
        let done = match *incomplete {
            true => Err(RootError::PoolExhausted),
            false => source
                .space
                .levels
                .canonical_parts(range)
                .try_for_each(|part| top.update(context, part)),
        };
        Self::finish(top, incomplete, context, done)
    }

    /// If the incremental way ran out of tables (or did before), drops all and starts over: that
    /// leaves the fewest tables possible.
    fn finish<M: GuestPhys, P: TablePool>(
        top: &mut Node,
        incomplete: &mut bool,
        context: &mut Context<'_, M, P>,
        done: Result<(), RootError>,
    ) -> Result<usize, RootError> {
        let done = done.or_else(|_| top.rebuild(context));
        *incomplete = done.is_err();
        done.map(|()| context.changed)
    }

    /// Each of the guest's entries that was copied and what it was then (accessed and dirty bits
    /// may be older than the rest): what a staleness check would compare.
    pub fn copied_entries(&self) -> impl Iterator<Item = (GuestAddress, Entry)> {
        self.top.copied_entries()
    }

    /// Whether the tables that were copied still say the same, those of the process in
    /// `source` included. Cheaper than `sync` only in that it writes nothing.
    pub fn is_current<M: GuestPhys>(&self, source: &VirtMemory<'_, M>) -> bool {
        !self.incomplete && self.top.is_current(source, Some(source.space.root))
    }

    /// The value of the entry of ours that decides about `at`: that of the smallest table of ours
    /// on the way. For reports.
    pub fn entry_at(&self, at: Gva) -> Entry {
        self.top.entry_at(at)
    }

    /// Gives all tables back.
    pub fn release(self, pool: &mut impl TablePool) {
        self.top.release(pool);
    }
}
