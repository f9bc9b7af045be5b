//! Where pages of guest memory are in both mappings of a private view.
//!
//! Each call looks up a few hundred pages and words. A guest's memory is a few regions, of which
//! all but a little is in the first or second.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::dma::GuestMemory;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::page::{PAGE_SIZE, Page, Pfn};
use super::view::ViewError;

/// A region of the guest's memory that is mapped twice.
#[derive(Debug, Clone, Copy)]
struct Place {
    first: Pfn,
    pages: u64,
    shared: NonNull<Page>,
    private: NonNull<Page>,
}

/// All regions of a view.
#[derive(Debug)]
pub(super) struct Places(Vec<Place>);

// SAFETY: the addresses are of mappings that the view owns, or shares with others that may be on
// any thread. Who dereferences them keeps the view's rule.
unsafe impl Send for Places {}

// SAFETY: as for `Send`; nothing is changed through a shared reference but by atomic accesses.
unsafe impl Sync for Places {}

impl Places {
    /// Of two mappings with the same regions, which have to live as long.
    pub fn new(shared: &GuestMemory, private: &GuestMemory) -> Result<Self, ViewError> {
        let places = shared.iter().zip(private.iter());
        let places = places.map(|(shared, private)| {
            let gpa = shared.start_addr().raw_value();
            let is_same = shared.start_addr() == private.start_addr()
                && shared.len() == private.len()
                && gpa.is_multiple_of(PAGE_SIZE);
            let address = |region: *mut u8| {
                let address = NonNull::new(region.cast::<Page>());
                address.filter(|at| at.cast::<u64>().is_aligned())
            };
            Some(Place {
                first: Pfn::of(is_same.then_some(gpa)?),
                pages: shared.len() / PAGE_SIZE,
                shared: address(shared.as_ptr())?,
                private: address(private.as_ptr())?,
            })
        });
        let places: Option<Vec<Place>> = places.collect();
        places.map(Self).ok_or(ViewError::Layout)
    }

    /// K's page: 4096 mapped bytes, aligned to 8, for as long as the view lives.
    pub fn shared(&self, pfn: Pfn) -> Result<*mut Page, ViewError> {
        self.page(pfn, |place| place.shared)
    }

    /// P's page: the same.
    pub fn private(&self, pfn: Pfn) -> Result<*mut Page, ViewError> {
        self.page(pfn, |place| place.private)
    }

    /// The 64-bit word around `gpa` as K has it, which others may be writing: read once.
    pub fn shared_word(&self, gpa: u64) -> Result<u64, ViewError> {
        self.word(gpa, |place| place.shared)
    }

    /// The same as P has it.
    pub fn private_word(&self, gpa: u64) -> Result<u64, ViewError> {
        self.word(gpa, |place| place.private)
    }

    fn page(
        &self,
        pfn: Pfn,
        mapping: impl Fn(&Place) -> NonNull<Page>,
    ) -> Result<*mut Page, ViewError> {
        for place in &self.0 {
            let index = pfn.0.wrapping_sub(place.first.0);
            if index < place.pages {
                // SAFETY: the region has more pages than that, one behind the other in either
                // mapping.
                return Ok(unsafe { mapping(place).add(index as usize) }.as_ptr());
            }
        }
        let gpa = pfn.0.saturating_mul(PAGE_SIZE);
        Err(ViewError::NotMemory(gpa))
    }

    fn word(&self, gpa: u64, mapping: impl Fn(&Place) -> NonNull<Page>) -> Result<u64, ViewError> {
        let page = self.page(Pfn::of(gpa), mapping);
        let page = page.map_err(|_| ViewError::NotMemory(gpa))?;
        let index = (gpa % PAGE_SIZE / 8) as usize;
        // SAFETY: a whole mapped page, aligned to 8 bytes, has that word; an aligned atomic load
        // may race with whoever writes it.
        let word = unsafe { AtomicU64::from_ptr(page.cast::<u64>().add(index)) };
        Ok(u64::from_le(word.load(Ordering::Relaxed)))
    }
}
