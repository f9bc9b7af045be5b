//! Memory as a call has it: private pages, roots, words on stacks.

use super::Call;
use crate::domain::error::DomainError;
use crate::domain::roots::{Fill, Root, RootError};
use crate::domain::view::{PAGE_SIZE, Pfn};
use crate::guest::addr::Gva;

/// Private copies of pages below which a call is not charged for them.
const MIN_CHARGED: usize = 4096;

impl Call<'_> {
    /// All pages of which P has its own copy because of this or an earlier call, sorted; the
    /// driver's text is not among them.
    pub(super) fn private_pages(&mut self) -> Result<Vec<Pfn>, DomainError> {
        self.harvest()?;
        let domain = &*self.domain;
        let mut pages: Vec<Pfn> = self
            .harvested
            .iter()
            .chain(&self.host_written)
            .copied()
            .chain(domain.warm.iter())
            .filter(|pfn| !domain.is_overlay(*pfn))
            .collect();
        pages.sort_unstable();
        pages.dedup();
        Ok(pages)
    }

    /// Those of [`Call::private_pages`] that the call may have written, by dirty bits where these
    /// tell it: where it has been in the driver root alone, on tables that were not made anew. Not
    /// where pages are closed in between, or devices write them.
    pub(super) fn written_pages(&mut self) -> Result<Vec<Pfn>, DomainError> {
        let domain = &*self.domain;
        let tell = self.roots_at_begin == Some(domain.roots.rebuilds())
            && domain.monitor.crossings() == domain.crossings_at_entry.0
            && self.callbacks.is_empty()
            && !domain.each_store
            && !domain.view.keeps_bases();
        if !tell {
            return self.private_pages();
        }
        self.harvest()?;
        let mut pages = std::mem::take(&mut self.pages);
        let domain = &*self.domain;
        let written = |pfn: &Pfn| domain.roots.is_written(*pfn, &domain.monitor);
        let known = self.harvested.iter().chain(&self.host_written).copied();
        let written = known.chain(domain.warm.iter().filter(written));
        pages.clear();
        pages.extend(written.filter(|pfn| !domain.is_overlay(*pfn)));
        pages.sort_unstable();
        pages.dedup();
        Ok(pages)
    }

    pub(super) fn harvest(&mut self) -> Result<(), DomainError> {
        let harvested = &mut self.harvested;
        let domain = &mut *self.domain;
        domain
            .vm
            .harvest(&domain.slot_bases, |pfn| harvested.push(pfn))?;
        Ok(())
    }

    /// Charges the private copies of pages that are known of; `false` if there is no room for them.
    /// They are looked at each time that they may have doubled, so that it costs most calls one
    /// comparison.
    pub(super) fn may_keep_copies(&mut self) -> bool {
        if self.harvested.len() < 2 * self.copies_charged.max(MIN_CHARGED) {
            return true;
        }
        self.harvested.sort_unstable();
        self.harvested.dedup();
        let more = self.harvested.len().saturating_sub(self.copies_charged);
        self.copies_charged += more;
        let copies = 1 + u64::from(self.domain.view.keeps_bases());
        self.kept.grow(more as u64 * copies * PAGE_SIZE)
    }

    /// Lets P write the page at `va` in the driver root.
    pub(super) fn open(&mut self, va: u64) -> Result<(), DomainError> {
        self.open_in(Root::Driver, va)
    }

    /// Lets P write the page at `va` in `root`.
    pub(super) fn open_in(&mut self, root: Root, va: u64) -> Result<(), DomainError> {
        let domain = &mut *self.domain;
        self.stats.opened += 1;
        match domain
            .roots
            .open(root, va, &domain.view, &mut domain.monitor)
        {
            Err(RootError::OutOfTables) => {
                self.rebuild(root)?;
                let domain = &mut *self.domain;
                domain
                    .roots
                    .open(root, va, &domain.view, &mut domain.monitor)?;
            }
            other => drop(other?),
        }
        if self.domain.moves(va)
            && let Some(at) = self.domain.roots.translate(va, &self.domain.view)?
        {
            let pfn = Pfn::of(at.gpa);
            self.begin_copy(va, pfn)?;
            self.domain.copied.note(pfn, root, va & !(PAGE_SIZE - 1));
        }
        Ok(())
    }

    /// Before P writes to page `pfn` at `va`: makes its copy, and remembers of what, if devices
    /// write it meanwhile.
    pub(super) fn begin_copy(&mut self, va: u64, pfn: Pfn) -> Result<(), DomainError> {
        let is_there = self.domain.view.contains(pfn) && !self.domain.is_overlay(pfn);
        if !self.domain.moves(va) || !is_there {
            return Ok(());
        }
        // What P has written by another address is not to be lost.
        self.harvest()?;
        if self.harvested.contains(&pfn) || self.host_written.contains(&pfn) {
            return Ok(());
        }
        self.domain.view.begin_copy(pfn)?;
        if !self.domain.warm.contains(pfn) {
            self.note_host_written(pfn);
        }
        Ok(())
    }

    pub(super) fn fill(&mut self, root: Root, va: u64) -> Result<Fill, DomainError> {
        self.stats.fills += 1;
        let domain = &mut *self.domain;
        match domain
            .roots
            .fill(root, va, &domain.view, &mut domain.monitor)
        {
            Err(RootError::OutOfTables) => {
                self.rebuild(root)?;
                let domain = &mut *self.domain;
                Ok(domain
                    .roots
                    .fill(root, va, &domain.view, &mut domain.monitor)?)
            }
            other => Ok(other?),
        }
    }

    /// Starts the roots afresh in the middle of a call, with P on `root`: what was open is opened
    /// again when touched.
    fn rebuild(&mut self, root: Root) -> Result<(), DomainError> {
        self.stats.rebuilds += 1;
        self.outdated = Some(root);
        self.domain.build_roots(self.request.sregs.cr3)
    }

    pub(super) fn in_own_stack(&self, va: u64) -> bool {
        self.stacks.iter().any(|stack| stack.contains(Gva(va)))
    }

    pub(super) fn read_guest(&self, va: u64) -> Result<Option<u64>, DomainError> {
        let Some(translation) = self.domain.roots.translate(va, &self.domain.view)? else {
            return Ok(None);
        };
        let slot = (
            Pfn::of(translation.gpa),
            (translation.gpa % PAGE_SIZE) as usize,
        );
        if slot.1 > PAGE_SIZE as usize - 8 || !self.domain.view.contains(slot.0) {
            return Ok(None);
        }
        self.read_slot(slot).map(Some)
    }

    pub(super) fn read_slot(&self, (pfn, offset): (Pfn, usize)) -> Result<u64, DomainError> {
        let page = self.domain.view.private_page(pfn)?;
        let bytes = page
            .get(offset..offset + 8)
            .and_then(|bytes| bytes.try_into().ok());
        bytes
            .map(u64::from_le_bytes)
            .ok_or(DomainError::Internal("a stack slot crosses a page"))
    }

    pub(super) fn write_slot(
        &mut self,
        (pfn, offset): (Pfn, usize),
        value: u64,
    ) -> Result<(), DomainError> {
        let page = self.domain.view.private_page_mut(pfn)?;
        let slot = page.get_mut(offset..offset + 8);
        slot.ok_or(DomainError::Internal("a stack slot crosses a page"))?
            .copy_from_slice(&value.to_le_bytes());
        self.note_host_written(pfn);
        Ok(())
    }

    /// The host has written to this page on P's behalf.
    pub(super) fn note_host_written(&mut self, pfn: Pfn) {
        if self.host_written.last() != Some(&pfn) {
            self.host_written.push(pfn);
        }
    }
}
