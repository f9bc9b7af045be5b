//! Memory as it was at a mark, beside what has become of it.

use std::time::Duration;

use devices::dma::GuestMemory;
use vm_memory::GuestAddress;

use super::add_differing;
use super::error::MarkError;
use super::kept::{MarkState, Marks};
use super::pages::Places;
use super::tree::{Id, Tree};
use crate::dirty::User;
use crate::handle::VmHandle;
use crate::memory::{GuestRam, PAGE_BYTES};
use crate::quiesce::Quiesced;

/// A guest at rest, and what its memory was at the mark that it has gone on from.
pub struct SinceMark<'a> {
    tree: &'a Tree<MarkState>,
    mark: Id,
    ram: &'a GuestRam,
    changed: Vec<GuestAddress>,
}

impl SinceMark<'_> {
    /// First addresses of the pages of 4 KiB that have other bytes than at the mark, in no order.
    pub fn changed(&self) -> &[GuestAddress] {
        &self.changed
    }

    /// Memory as it is now.
    pub fn now(&self) -> &GuestMemory {
        self.ram.memory()
    }

    /// Fills `data` with what was from `at` on at the mark; `false` where there is no memory, with
    /// `data` filled in part.
    pub fn read(&self, at: GuestAddress, data: &mut [u8]) -> bool {
        let (mut at, mut rest) = (at.0, data);
        while !rest.is_empty() {
            let offset = at % PAGE_BYTES;
            let page = self.ram.page_at(GuestAddress(at - offset));
            let Some(page) = page.and_then(|page| u32::try_from(page).ok()) else {
                return false;
            };
            let here = rest.len().min((PAGE_BYTES - offset) as usize);
            let (part, behind) = rest.split_at_mut(here);
            self.tree
                .content(self.mark, page)
                .read(offset as usize, part);
            let Some(next) = at.checked_add(here as u64) else {
                return behind.is_empty();
            };
            (at, rest) = (next, behind);
        }
        true
    }
}

impl VmHandle {
    /// Brings the machine to rest, has `look` see what has changed since the mark with this name,
    /// and lets it go on if it was running. `limit` is how long to wait for it to come to rest. Not
    /// to be called with a device locked.
    ///
    /// # Errors
    /// There is no such mark, the guest was at another since, or does not come to rest.
    pub fn since_mark<T>(
        &self,
        name: &str,
        limit: Duration,
        look: impl FnOnce(&SinceMark<'_>) -> T,
    ) -> Result<T, MarkError> {
        let marks = &*self.kept_marks();
        let found = marks.tree.find(name);
        let mark = found.ok_or_else(|| MarkError::NoSuchMark(name.to_owned()))?;
        if marks.tree.current() != Some(mark) {
            return Err(MarkError::NotFrom(name.to_owned()));
        }
        self.quiesce(limit, |quiesced| quiesced.since_mark(marks, mark, look))?
    }
}

impl Quiesced<'_, '_> {
    fn since_mark<T>(
        &mut self,
        marks: &Marks,
        mark: Id,
        look: impl FnOnce(&SinceMark<'_>) -> T,
    ) -> Result<T, MarkError> {
        // While it is looked.
        let others = self.others_rest().map_err(MarkError::Others)?;
        let ram = &self.machine.ram;
        let mut tracker = self.machine.dirty.lock();
        tracker.collect(ram)?;
        let set = tracker.set(User::Marks).ok_or(MarkError::NoMark)?;
        if marks.others_wrote || others.is_some() {
            add_differing(ram, &marks.tree, mark, set);
        }
        let places = Places::of(ram);
        let differs = |page: &u32| !places.is(*page, marks.tree.content(mark, *page));
        let address = |page: u32| {
            let offset = u64::from(page) * PAGE_BYTES;
            let region = ram.region_of(offset)?;
            let at = region.guest_address.0 + (offset - region.file_offset);
            Some(GuestAddress(at))
        };
        let changed = set.pages().iter().copied().filter(differs);
        let since = SinceMark {
            tree: &marks.tree,
            mark,
            ram,
            changed: changed.filter_map(address).collect(),
        };
        Ok(look(&since))
    }
}
