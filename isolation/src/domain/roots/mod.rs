//! The two page-table roots that P runs on, and how they follow the guest's own tables.
//!
//! ```text
//!               driver root                              kernel root
//!  a page is    read-only, not executable ...            as the guest has it ...
//!  except       driver text      execute                 driver text   not executable
//!               common code      execute                 monitor area  as its pages say
//!               opened pages     write
//!               monitor area     as its pages say
//! ```
//!
//! Memory that devices write while calls run is read-only in the kernel root as well, until it is
//! opened (`moving`).
//!
//! A root is filled on demand. An entry either *links* a whole sub-tree of the guest's own tables
//! (with write and execute taken away where the root's default says so: permissions of all levels
//! are combined, Intel SDM volume 3, section 4.6), or leads to a *mirror*, a table in the monitor
//! area that is itself filled on demand. Mirrors exist only on the paths to pages with permissions
//! of their own.
//!
//! Every entry that was taken over from the guest is remembered with its value. Before each call
//! the values are compared; when one changed the roots are built anew. Tables of the guest below a
//! link are walked by the processor itself and cannot go stale.

mod entry;
mod open;
mod writes;

use std::collections::{HashMap, HashSet};

use super::monitor::{self, MAPPED_PAGES, Monitor, TABLE_PAGES};
use super::view::{PAGE_SIZE, PrivateView, ViewError};
use crate::guest::addr::{Gva, GvaRange};
pub use entry::{Permissions, Root};
use entry::{bits, index, prefix, put_entry, restrict, shift, split, without_used};
use writes::Leaves;

/// What filling an address did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// The root now says what the guest and the root's own permissions say.
    Filled,
    /// The guest itself does not map the address.
    NotMapped,
}

/// Why roots could not be built.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The monitor area's table pages are used up.
    #[error("no table pages left for the domain's page tables")]
    OutOfTables,
    /// A guest page table lies outside guest memory.
    #[error("a guest page table is not in guest memory: {0}")]
    Table(#[from] ViewError),
}

/// What the paging structures of one translation say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// Guest physical address.
    pub gpa: u64,
    /// Writable at every level.
    pub write: bool,
    /// Executable at every level.
    pub execute: bool,
}

/// A guest entry that a root depends on.
#[derive(Debug, Clone, Copy)]
struct Source {
    gpa: u64,
    value: u64,
}

#[derive(Debug, Default)]
struct RootState {
    /// Mirror tables: (level, virtual address prefix) to page of the monitor area.
    mirrors: HashMap<(u8, u64), u64>,
    /// Leaf permissions of pages that differ from the root's default.
    special: HashMap<u64, Permissions>,
}

/// Both roots. The tables live in the monitor area.
#[derive(Debug)]
pub struct Roots {
    cr3: u64,
    /// Memory that is read-only in the kernel root until it is opened.
    moving: Option<GvaRange>,
    driver: RootState,
    kernel: RootState,
    /// Entries below the top level.
    sources: Vec<Source>,
    /// Their addresses.
    known: HashSet<u64>,
    /// Entries of the top level in use: index and value.
    top_sources: Vec<(u64, u64)>,
    next_table: u64,
    /// Entries of the driver root that let P write.
    leaves: Leaves,
    rebuilds: u64,
    /// All that [`Roots::build`] puts in is in.
    complete: bool,
}

const DRIVER_TOP: u64 = MAPPED_PAGES;
const KERNEL_TOP: u64 = MAPPED_PAGES + 1;

/// Offset in the monitor area of the driver root's and the kernel root's top-level table, in bytes.
pub const ROOT_OFFSETS: (u64, u64) = (DRIVER_TOP * PAGE_SIZE, KERNEL_TOP * PAGE_SIZE);

/// Where the fixed parts of the address space are.
#[derive(Debug, Clone)]
pub struct FixedPages {
    /// Pages of the isolated driver's text, by virtual address.
    pub driver_text: Vec<u64>,
    /// Pages of kernel code that both roots may execute, by virtual address.
    pub common: Vec<u64>,
}

impl Roots {
    /// Empty roots that follow the tables at `cr3`. `moving` is read-only in the kernel root, too,
    /// until it is opened.
    pub fn new(cr3: u64, moving: Option<GvaRange>) -> Self {
        Self {
            cr3,
            moving,
            driver: RootState::default(),
            kernel: RootState::default(),
            sources: Vec::new(),
            known: HashSet::new(),
            top_sources: Vec::new(),
            next_table: KERNEL_TOP + 1,
            leaves: Leaves::default(),
            rebuilds: 0,
            complete: false,
        }
    }

    /// How often the roots were built, the first time included.
    pub fn rebuilds(&self) -> u64 {
        self.rebuilds
    }

    /// Takes all mirrors down and puts the fixed pages and the monitor area in.
    pub fn build(
        &mut self,
        cr3: u64,
        fixed: &FixedPages,
        view: &PrivateView,
        monitor: &mut Monitor,
    ) -> Result<(), RootError> {
        *self = Self {
            rebuilds: self.rebuilds + 1,
            ..Self::new(cr3, self.moving)
        };
        for top in [DRIVER_TOP, KERNEL_TOP] {
            monitor.page_mut(top).fill(0);
        }
        self.driver.mirrors.insert((4, 0), DRIVER_TOP);
        self.kernel.mirrors.insert((4, 0), KERNEL_TOP);
        for va in &fixed.driver_text {
            self.driver.special.insert(
                *va,
                Permissions {
                    write: false,
                    execute: true,
                },
            );
            self.kernel.special.insert(
                *va,
                Permissions {
                    write: false,
                    execute: false,
                },
            );
        }
        for va in &fixed.common {
            self.driver.special.insert(
                *va,
                Permissions {
                    write: false,
                    execute: true,
                },
            );
        }
        for va in &fixed.driver_text {
            self.fill(Root::Driver, *va, view, monitor)?;
            self.fill(Root::Kernel, *va, view, monitor)?;
        }
        for va in &fixed.common {
            self.fill(Root::Driver, *va, view, monitor)?;
        }
        self.map_monitor(Root::Driver, view, monitor)?;
        self.map_monitor(Root::Kernel, view, monitor)?;
        self.complete = true;
        Ok(())
    }

    /// Whether the guest's tables, entered at `cr3`, still say what the roots took from them.
    pub fn fresh(&self, cr3: u64, view: &PrivateView) -> bool {
        let top = cr3 & bits::ADDRESS;
        let same = |gpa: u64, value: u64| {
            view.shared_word(gpa)
                .is_ok_and(|now| without_used(now) == without_used(value))
        };
        self.complete
            && self
                .top_sources
                .iter()
                .all(|(index, value)| same(top + index * 8, *value))
            && self
                .sources
                .iter()
                .all(|source| same(source.gpa, source.value))
    }

    /// What was taken over from the guest's tables is not to be relied upon: the next call builds
    /// the roots anew.
    pub fn forget(&mut self) {
        self.complete = false;
    }

    /// Follows the tables at `cr3` from now on; the user half is forgotten when they are another
    /// process's.
    pub fn enter(&mut self, cr3: u64, monitor: &mut Monitor) {
        if self.cr3 & bits::ADDRESS == cr3 & bits::ADDRESS {
            return;
        }
        self.cr3 = cr3;
        for top in [DRIVER_TOP, KERNEL_TOP] {
            monitor.page_mut(top)[..PAGE_SIZE as usize / 2].fill(0);
        }
        self.top_sources.retain(|(index, _)| *index >= 256);
    }

    /// Walks the guest's tables as P sees them, permissions of the roots left aside.
    pub fn translate(&self, va: u64, view: &PrivateView) -> Result<Option<Translation>, RootError> {
        let mut table = self.cr3 & bits::ADDRESS;
        let (mut write, mut execute) = (true, true);
        for level in (1..=4u8).rev() {
            let entry = view.private_word(table + index(va, level) * 8)?;
            if entry & bits::PRESENT == 0 {
                return Ok(None);
            }
            write &= entry & bits::WRITE != 0;
            execute &= entry & bits::NX == 0;
            if level == 1 || (level < 4 && entry & bits::LARGE != 0) {
                let offset_mask = (1 << shift(level)) - 1;
                let gpa = (entry & bits::ADDRESS & !offset_mask) | (va & offset_mask);
                return Ok(Some(Translation {
                    gpa,
                    write,
                    execute,
                }));
            }
            table = entry & bits::ADDRESS;
        }
        Ok(None)
    }

    /// Puts into `root` what the guest's tables say about `va`.
    pub fn fill(
        &mut self,
        root: Root,
        va: u64,
        view: &PrivateView,
        monitor: &mut Monitor,
    ) -> Result<Fill, RootError> {
        let page = va & !(PAGE_SIZE - 1);
        let special = self.state(root).special.get(&page).copied();
        let mut guest_table = self.cr3 & bits::ADDRESS;
        // Set once the walk is below a large page of the guest: its entry and the level it was at.
        let mut large: Option<(u64, u8)> = None;
        for level in (1..=4u8).rev() {
            let mirror = self.mirror(root, level, page, monitor)?;
            let at = index(page, level);
            let (entry, source) = match large {
                Some((entry, from)) => (split(entry, from, level, page), None),
                None => {
                    let gpa = guest_table + at * 8;
                    let entry = view.private_word(gpa)?;
                    (entry, Some(Source { gpa, value: entry }))
                }
            };
            if entry & bits::PRESENT == 0 {
                return Ok(Fill::NotMapped);
            }
            let below = self.has_special_below(root, level, page);
            if level == 1 || !below {
                let special = special.filter(|_| level == 1);
                let leaf = self.restricted(root, (level, page), entry, special);
                self.put_leaf((root, mirror, at), leaf, special, monitor);
                self.remember(level, at, source);
                if let (1, Some((entry, from))) = (level, large) {
                    self.fill_split(root, page, mirror, (entry, from), monitor);
                }
                return Ok(Fill::Filled);
            }
            // A path of our own: the guest's permissions hold at the leaf, so grant all here and
            // carry the guest's along.
            self.remember(level, at, source);
            let next = self.mirror(root, level - 1, page, monitor)?;
            let kept = bits::WRITE | bits::USER | bits::NX;
            let upper = entry & kept | bits::PRESENT | bits::ACCESSED;
            put_entry(
                monitor,
                mirror,
                at,
                upper | (monitor.gpa() + next * PAGE_SIZE),
            );
            if large.is_none() {
                if level < 4 && entry & bits::LARGE != 0 {
                    large = Some((entry, level));
                } else {
                    guest_table = entry & bits::ADDRESS;
                }
            } else {
                large = Some((entry, level));
            }
        }
        Ok(Fill::NotMapped)
    }

    /// Fills the rest of a table that stands for a piece of a large page: all of it depends on the
    /// one entry that was remembered, so it costs nothing later.
    fn fill_split(
        &mut self,
        root: Root,
        page: u64,
        mirror: u64,
        (entry, from): (u64, u8),
        monitor: &mut Monitor,
    ) {
        let first = page & !((1 << shift(2)) - 1);
        for at in 0..512 {
            let va = first + at * PAGE_SIZE;
            let special = self.state(root).special.get(&va).copied();
            let entry = self.restricted(root, (1, va), split(entry, from, 1, va), special);
            self.put_leaf((root, mirror, at), entry, special, monitor);
        }
    }

    /// `entry`, which covers `va` at its level, with the permissions that `root` gives.
    fn restricted(
        &self,
        root: Root,
        (level, va): (u8, u64),
        entry: u64,
        special: Option<Permissions>,
    ) -> u64 {
        let entry = restrict(root, entry, special);
        let covered = GvaRange::aligned(Gva(va), 1 << shift(level));
        let moving = self.moving.filter(|_| root == Root::Kernel);
        let is_moving = moving.is_some_and(|moving| moving.intersection(&covered).is_some());
        match special {
            None if is_moving => entry & !bits::WRITE,
            _ => entry,
        }
    }

    fn state(&self, root: Root) -> &RootState {
        match root {
            Root::Driver => &self.driver,
            Root::Kernel => &self.kernel,
        }
    }

    fn state_mut(&mut self, root: Root) -> &mut RootState {
        match root {
            Root::Driver => &mut self.driver,
            Root::Kernel => &mut self.kernel,
        }
    }

    /// Whether the entry of `level` that covers `va` also covers a page with permissions of its
    /// own, so that it cannot be a link.
    fn has_special_below(&self, root: Root, level: u8, va: u64) -> bool {
        let state = self.state(root);
        let covered = GvaRange::aligned(Gva(va), 1 << shift(level));
        let moving = self.moving.filter(|_| root == Root::Kernel);
        // What is beside it keeps the guest's permissions: areas of memory begin at any GiB.
        let is_moving_in_part = moving.is_some_and(|moving| {
            moving.intersection(&covered).is_some() && !moving.covers(&covered)
        });
        level > 1
            && (is_moving_in_part
                || state
                    .mirrors
                    .contains_key(&(level - 1, prefix(va, level - 1)))
                || state.special.contains_key(&va))
    }

    /// The mirror table of `level` that covers `va`, made when there is none.
    fn mirror(
        &mut self,
        root: Root,
        level: u8,
        va: u64,
        monitor: &mut Monitor,
    ) -> Result<u64, RootError> {
        let key = (level, prefix(va, level));
        if let Some(table) = self.state(root).mirrors.get(&key) {
            return Ok(*table);
        }
        let table = self.next_table;
        if table >= MAPPED_PAGES + TABLE_PAGES {
            return Err(RootError::OutOfTables);
        }
        self.next_table += 1;
        monitor.page_mut(table).fill(0);
        self.state_mut(root).mirrors.insert(key, table);
        Ok(table)
    }

    fn remember(&mut self, level: u8, at: u64, source: Option<Source>) {
        let Some(source) = source else { return };
        if level == 4 {
            if !self.top_sources.iter().any(|(index, _)| *index == at) {
                self.top_sources.push((at, source.value));
            }
        } else if self.known.insert(source.gpa) {
            self.sources.push(source);
        }
    }

    /// Maps the monitor area's pages at its virtual address, all within one table.
    fn map_monitor(
        &mut self,
        root: Root,
        view: &PrivateView,
        monitor: &mut Monitor,
    ) -> Result<(), RootError> {
        let va = monitor.va();
        let mut guest_table = Some(self.cr3 & bits::ADDRESS);
        for level in [4, 3, 2u8] {
            let mirror = self.mirror(root, level, va, monitor)?;
            let next = self.mirror(root, level - 1, va, monitor)?;
            let at = index(va, level);
            let entry = bits::PRESENT | bits::WRITE | bits::ACCESSED;
            put_entry(
                monitor,
                mirror,
                at,
                entry | (monitor.gpa() + next * PAGE_SIZE),
            );
            // The place must stay free in the guest: its entry is a source like any other.
            if let Some(table) = guest_table {
                let gpa = table + at * 8;
                let value = view.private_word(gpa)?;
                self.remember(level, at, Some(Source { gpa, value }));
                let descend = value & bits::PRESENT != 0 && value & bits::LARGE == 0;
                guest_table = descend.then_some(value & bits::ADDRESS);
            }
        }
        let table = self.mirror(root, 1, va, monitor)?;
        for page in 0..MAPPED_PAGES {
            let access = monitor::access(page);
            let write = match root {
                Root::Driver => access.driver_write,
                Root::Kernel => access.kernel_write,
            };
            let mut entry = (monitor.gpa() + page * PAGE_SIZE) | bits::PRESENT | bits::ACCESSED;
            if write {
                entry |= bits::WRITE | bits::DIRTY;
            }
            if !access.execute {
                entry |= bits::NX;
            }
            put_entry(monitor, table, index(va + page * PAGE_SIZE, 1), entry);
        }
        Ok(())
    }
}

/// Whether the 2 MiB around `va` are unmapped in the guest's tables at `cr3`, so that the monitor
/// area can go there.
pub fn is_free(view: &PrivateView, cr3: u64, va: u64) -> Result<bool, RootError> {
    let mut table = cr3 & bits::ADDRESS;
    for level in [4, 3, 2u8] {
        let entry = view.private_word(table + index(va, level) * 8)?;
        if entry & bits::PRESENT == 0 {
            return Ok(true);
        }
        if entry & bits::LARGE != 0 {
            return Ok(false);
        }
        table = entry & bits::ADDRESS;
    }
    Ok(false)
}
