//! The private view: a second, copy-on-write mapping of the guest's memory.
//!
//! ```text
//!   memfd  ──MAP_SHARED──►  shared mapping   what K, its devices and the host see
//!          ──MAP_PRIVATE─►  private mapping  what P sees: a page is the shared one until P (or the
//!                                            host on P's behalf) writes to it, its own copy after
//! ```
//!
//! Pages of the private view that were never written follow the shared memory at no cost. Pages
//! that were written are copies and hide what K writes later: every function here that creates a
//! copy leaves it to the caller to remember the page and to drop or refresh it.
//!
//! Rule for all page accesses by reference: nobody else writes the two pages meanwhile. The caller
//! holds the guest's other vCPUs and its emulated devices (see `transaction`). Where that is not
//! so, because a domain is made or looked at between calls, bytes are copied: whoever writes
//! meanwhile then makes them differ, and nothing worse.
//!
//! A device that cannot be held, of the host or in another process, writes K's pages whenever it
//! likes. A view of such a guest remembers what its copies were made from (`bases`), and compares
//! with that.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::dma::{GuestMemory, ViewToken};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use super::bases::{copy_down, take_over};
pub use super::page::{PAGE_SIZE, Page, Pfn};
use super::places::Places;
use super::written::Written;
use crate::policy::diff::PageMask;

/// Why a view could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// Guest memory is not in a file of its own, so it cannot be mapped a second time.
    #[error("guest memory at {0:#x} is in no file of its own and cannot be mapped a second time")]
    NotFileBacked(u64),
    /// The second mapping was refused.
    #[error("cannot map guest memory at {gpa:#x} privately: {source}")]
    Map {
        /// First guest physical address of the region.
        gpa: u64,
        /// What `mmap` said.
        source: vm_memory::mmap::MmapRegionError,
    },
    /// Pages that are missing in guest memory's file do not come to the second mapping.
    #[error(
        "cannot have missing pages of guest memory at {gpa:#x} come to a second mapping: {source}"
    )]
    Missing {
        /// First guest physical address of the region.
        gpa: u64,
        /// What the host's kernel said.
        source: io::Error,
    },
    /// The regions do not form an address space.
    #[error("guest memory regions overlap")]
    Layout,
    /// An address that is no guest memory.
    #[error("guest physical address {0:#x} is not in guest memory")]
    NotMemory(u64),
    /// Dropping pages failed.
    #[error("cannot drop private pages: {0}")]
    Drop(#[source] io::Error),
}

/// The shared memory of a guest and a private view of the same pages.
#[derive(Debug)]
pub struct PrivateView {
    shared: Arc<GuestMemory>,
    private: GuestMemory,
    places: Places,
    /// What copies were made from, if devices write K's pages meanwhile; of those that the host
    /// knows of.
    bases: Option<HashMap<Pfn, Box<Page>>>,
    /// Where calls have written to K's memory that is not their own, if that is wanted.
    written: Option<Written>,
    /// That pages of the guest's which are missing come here, too.
    _tokens: Vec<ViewToken>,
}

impl PrivateView {
    /// Maps all of `shared` a second time, copy-on-write. No page is copied yet.
    pub fn new(shared: Arc<GuestMemory>) -> Result<Self, ViewError> {
        let (mut regions, mut tokens) = (Vec::new(), Vec::new());
        for region in shared.iter() {
            let gpa = region.start_addr();
            let file = region
                .file_offset()
                .ok_or(ViewError::NotFileBacked(gpa.raw_value()))?;
            let log = region.get_mmap();
            let log = log.bitmap();
            let missing = match log.is_elsewhere() {
                true => match log.missing_pages() {
                    // Asked again: the guest may have got all of its memory in between.
                    None if log.is_elsewhere() => {
                        return Err(ViewError::NotFileBacked(gpa.raw_value()));
                    }
                    missing => missing,
                },
                false => None,
            };
            let size = usize::try_from(region.len()).map_err(|_| ViewError::Layout)?;
            let mapping = MmapRegion::build(
                Some(file.clone()),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_NORESERVE,
            )
            .map_err(|source| ViewError::Map {
                gpa: gpa.raw_value(),
                source,
            })?;
            if let Some(missing) = missing {
                let start = mapping.as_ptr() as u64;
                let token = missing.view(start..start + region.len(), file.start());
                tokens.push(token.map_err(|source| ViewError::Missing {
                    gpa: gpa.raw_value(),
                    source,
                })?);
            }
            regions.push(GuestRegionMmap::new(mapping, gpa).ok_or(ViewError::Layout)?);
        }
        let private = GuestMemory::from_regions(regions).map_err(|_| ViewError::Layout)?;
        Ok(Self {
            places: Places::new(&shared, &private)?,
            shared,
            private,
            bases: None,
            written: None,
            _tokens: tokens,
        })
    }

    /// Remembers what copies are made from, from now on: devices write K's pages while calls run.
    pub fn keep_bases(&mut self) {
        self.bases.get_or_insert_default();
    }

    /// Whether it remembers that.
    pub fn keeps_bases(&self) -> bool {
        self.bases.is_some()
    }

    /// Makes P's page a copy of K's, before P writes to it, and remembers what it is a copy of.
    /// Nothing is done if that is known already, or is not to be remembered. P must not have a copy
    /// of which nobody knows: it would be lost.
    pub fn begin_copy(&mut self, pfn: Pfn) -> Result<(), ViewError> {
        match &self.bases {
            Some(bases) if !bases.contains_key(&pfn) => self.refresh(pfn),
            _ => Ok(()),
        }
    }

    /// K's bytes of a page as they were when P's copy was made, as far as that is remembered; as
    /// they are otherwise.
    pub fn before(&self, pfn: Pfn) -> Result<&Page, ViewError> {
        match self.bases.as_ref().and_then(|bases| bases.get(&pfn)) {
            Some(base) => Ok(base),
            None => self.shared_page(pfn),
        }
    }

    /// What P's copy has otherwise than the page that it was made from.
    pub fn changes(&self, pfn: Pfn) -> Result<PageMask, ViewError> {
        Ok(PageMask::changed(
            self.before(pfn)?,
            self.private_page(pfn)?,
        ))
    }

    /// Takes what devices have written to K's page since P's copy was made over into that, where P
    /// has not written.
    pub fn take_over(&mut self, pfn: Pfn) -> Result<(), ViewError> {
        let shared = self.places.shared(pfn)?;
        let private = self.places.private(pfn)?;
        if let Some(base) = self.bases.as_mut().and_then(|bases| bases.get_mut(&pfn)) {
            // SAFETY: both are whole mapped pages (`Places`); P runs on the calling thread
            // only, so not now, and `&mut self` makes this the only access to its page.
            unsafe { take_over(shared, base, &mut *private) };
        }
        Ok(())
    }

    /// The shared memory: what K and its devices see.
    pub fn shared(&self) -> &GuestMemory {
        &self.shared
    }

    /// The private memory: what P sees.
    pub fn private(&self) -> &GuestMemory {
        &self.private
    }

    /// Whether `pfn` is a page of guest memory.
    pub fn contains(&self, pfn: Pfn) -> bool {
        self.places.shared(pfn).is_ok()
    }

    /// K's bytes of a page.
    pub fn shared_page(&self, pfn: Pfn) -> Result<&Page, ViewError> {
        let pointer = self.places.shared(pfn)?;
        // SAFETY: `Places` vouches for 4096 mapped bytes that live as long as `self.shared`.
        // The guest and its devices are held while a transaction looks at pages (module rule), so
        // nothing writes them during the borrow.
        Ok(unsafe { &*pointer })
    }

    /// K's bytes of a page, to change.
    pub fn shared_page_mut(&mut self, pfn: Pfn) -> Result<&mut Page, ViewError> {
        let pointer = self.places.shared(pfn)?;
        self.mark_shared(pfn);
        // SAFETY: as in `shared_page`, and `&mut self` makes this the only borrow of the view.
        Ok(unsafe { &mut *pointer })
    }

    /// P's bytes of a page.
    pub fn private_page(&self, pfn: Pfn) -> Result<&Page, ViewError> {
        let pointer = self.places.private(pfn)?;
        // SAFETY: as in `shared_page`; P runs on the calling thread only, so not now.
        Ok(unsafe { &*pointer })
    }

    /// Copies K's bytes of a page, which others may be writing.
    pub fn copy_shared(&self, pfn: Pfn) -> Result<Box<Page>, ViewError> {
        let mut page = Box::new([0; PAGE_SIZE as usize]);
        let read = self
            .shared
            .read_slice(page.as_mut_slice(), GuestAddress(pfn.gpa()));
        read.map_err(|_| ViewError::NotMemory(pfn.gpa()))?;
        Ok(page)
    }

    /// Copies P's bytes from guest physical address `gpa`, which others may be writing.
    pub fn read_private(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), ViewError> {
        let read = self.private.read_slice(bytes, GuestAddress(gpa));
        read.map_err(|_| ViewError::NotMemory(gpa))
    }

    /// Writes P's bytes at guest physical address `gpa`: the page is a private copy from now on.
    /// Others may be writing the guest's.
    pub fn write_private(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), ViewError> {
        let written = self.private.write_slice(bytes, GuestAddress(gpa));
        written.map_err(|_| ViewError::NotMemory(gpa))
    }

    /// The 64-bit word around `gpa` as K has it, which others may be writing: read once.
    pub fn shared_word(&self, gpa: u64) -> Result<u64, ViewError> {
        self.places.shared_word(gpa)
    }

    /// The same as P has it.
    pub fn private_word(&self, gpa: u64) -> Result<u64, ViewError> {
        self.places.private_word(gpa)
    }

    /// P's bytes of a page, to change: the page is a private copy from now on.
    pub fn private_page_mut(&mut self, pfn: Pfn) -> Result<&mut Page, ViewError> {
        let pointer = self.places.private(pfn)?;
        // SAFETY: as in `private_page`, and `&mut self` makes this the only borrow of the view.
        Ok(unsafe { &mut *pointer })
    }

    /// Has [`PrivateView::note_written`] remember from now on; what was remembered is forgotten.
    pub fn remember_written(&mut self) {
        self.written = Some(Written::default());
    }

    /// A call has written these bytes of page `pfn`, if that is to be remembered.
    pub fn note_written(&mut self, pfn: Pfn, bytes: Range<usize>) {
        if let Some(written) = &mut self.written {
            written.note(pfn, bytes);
        }
    }

    /// Where calls have written since that was to be remembered; `None` if it was not.
    pub fn written(&self) -> Option<&Written> {
        self.written.as_ref()
    }

    /// Copies the bytes of `mask` from P's page to K's.
    pub fn publish(&mut self, pfn: Pfn, mask: &PageMask) -> Result<(), ViewError> {
        let from = self.places.private(pfn)?.cast::<u8>();
        let to = self.places.shared(pfn)?.cast::<u8>();
        for run in mask.runs() {
            // SAFETY: both pages are mapped (`Places`), a run of a mask is within a page, and
            // the two mappings are different addresses, so the ranges do not overlap.
            unsafe {
                std::ptr::copy_nonoverlapping(from.add(run.start), to.add(run.start), run.len());
            }
        }
        self.mark_shared(pfn);
        Ok(())
    }

    /// Notes that K's page was written by its address, for whoever wants to know what changed.
    fn mark_shared(&self, pfn: Pfn) {
        if let Some((region, at)) = self.shared.to_region_addr(GuestAddress(pfn.gpa())) {
            region
                .bitmap()
                .mark_dirty(at.0 as usize, PAGE_SIZE as usize);
        }
    }

    /// Writes the 64-bit word at `gpa`, a multiple of 8, to K's memory, which others may be
    /// writing.
    pub fn write_shared_word(&mut self, gpa: u64, value: u64) -> Result<(), ViewError> {
        let address = GuestAddress(gpa);
        let written = self.shared.store(value.to_le(), address, Ordering::Relaxed);
        written.map_err(|_| ViewError::NotMemory(gpa))
    }

    /// Makes the private copy of `pfn` equal to K's page again, keeping it a copy.
    pub fn refresh(&mut self, pfn: Pfn) -> Result<(), ViewError> {
        let from = self.places.shared(pfn)?;
        let to = self.places.private(pfn)?;
        let Some(bases) = &mut self.bases else {
            // SAFETY: as in `publish`, with whole pages.
            unsafe { std::ptr::copy_nonoverlapping(from, to, 1) };
            return Ok(());
        };
        let base = bases
            .entry(pfn)
            .or_insert_with(|| Box::new([0; PAGE_SIZE as usize]));
        // SAFETY: `from` is a whole mapped page, which is read word by word as others may be
        // writing it; `to` is as in `publish`.
        unsafe {
            copy_down(from, base);
            to.write(**base);
        }
        Ok(())
    }

    /// Drops all private copies: P sees K's pages only.
    pub fn drop_all(&mut self) -> Result<(), ViewError> {
        if let Some(bases) = &mut self.bases {
            bases.clear();
        }
        for region in self.private.iter() {
            let bytes = usize::try_from(region.len()).map_err(|_| ViewError::Layout)?;
            // SAFETY: as in `drop_pages`, with the whole of a region's mapping.
            let result =
                unsafe { libc::madvise(region.as_ptr().cast(), bytes, libc::MADV_DONTNEED) };
            if result != 0 {
                return Err(ViewError::Drop(io::Error::last_os_error()));
            }
        }
        Ok(())
    }

    /// Drops the private copies of `pfns` (sorted, no duplicates): P sees K's pages again. Returns
    /// the number of system calls made, one for each run of adjacent pages.
    pub fn drop_pages(&mut self, pfns: &[Pfn]) -> Result<u32, ViewError> {
        if let Some(bases) = &mut self.bases {
            for pfn in pfns {
                bases.remove(pfn);
            }
        }
        let mut calls = 0;
        let mut rest = pfns;
        while let Some(first) = rest.first() {
            let mut length = 1;
            let start = self.places.private(*first)?;
            while let Some(next) = rest.get(length) {
                // Neighbours in guest memory need not be neighbours in ours: regions end.
                let expected = start.wrapping_add(length);
                if self.places.private(*next)? != expected {
                    break;
                }
                length += 1;
            }
            // SAFETY: the range is whole pages of our own private file mapping; dropping them makes
            // the next access read the file's page, which is what the caller asked for. No borrow
            // of the pages exists (`&mut self`).
            let result = unsafe {
                libc::madvise(
                    start.cast(),
                    length * PAGE_SIZE as usize,
                    libc::MADV_DONTNEED,
                )
            };
            if result != 0 {
                return Err(ViewError::Drop(io::Error::last_os_error()));
            }
            calls += 1;
            rest = &rest[length..];
        }
        Ok(calls)
    }
}

#[cfg(test)]
impl PrivateView {
    /// Puts other memory in the place of P's, where that is written by its guest physical address;
    /// what was there has to live as long as the view.
    pub(super) fn swap_private(&mut self, with: &mut GuestMemory) {
        std::mem::swap(&mut self.private, with);
    }
}

#[cfg(test)]
#[path = "view_tests.rs"]
mod tests;
