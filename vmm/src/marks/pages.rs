//! Contents of pages that are kept for marks.

use rustix::mm::{Advice, madvise};
use vm_memory::{GuestMemoryBackend, MmapRegion, VolatileMemory};

use super::error::MarkError;
use crate::memory::{GuestRam, PAGE_BYTES, RamRegion, Untouched};

/// Bytes of a page.
const PAGE: usize = PAGE_BYTES as usize;

/// All of a machine's memory at one moment, pages of zeros left out.
pub(super) struct Base {
    /// As large as guest memory, page for page; what was never written takes no memory.
    bytes: MmapRegion,
    /// A bit for each page that is there.
    there: Vec<u64>,
    count: u64,
}

impl Base {
    /// A memory of `size` bytes, all zero.
    pub fn new(size: u64) -> Result<Self, MarkError> {
        let bytes = usize::try_from(size)
            .ok()
            .and_then(|size| MmapRegion::new(size).ok())
            .ok_or(MarkError::NoMemory)?;
        // SAFETY: the range is exactly this mapping; the advice changes no content.
        let advised =
            unsafe { madvise(bytes.as_ptr().cast(), bytes.size(), Advice::LinuxNoHugepage) };
        if let Err(error) = advised {
            tracing::debug!(%error, "kept pages may take huge ones");
        }
        Ok(Self {
            there: vec![0; bytes.size().div_ceil(PAGE * 64)],
            bytes,
            count: 0,
        })
    }

    /// Number of pages that are there.
    pub fn count(&self) -> u64 {
        self.count
    }

    fn has(&self, page: u32) -> bool {
        self.there
            .get(page as usize / 64)
            .is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    fn place(&self, page: u32) -> Option<*mut u8> {
        let offset = page as usize * PAGE;
        (offset < self.bytes.size()).then(|| self.bytes.as_ptr().wrapping_add(offset))
    }

    /// The page's bytes; `None` for zeros.
    fn find(&self, page: u32) -> Option<*const u8> {
        let place = self.place(page).filter(|_| self.has(page))?;
        Some(place.cast_const())
    }

    /// Takes `page` of `ram` as it is now, unless it is zero and was.
    pub fn take(&mut self, ram: &GuestRam, page: u32) -> Result<(), MarkError> {
        let no_page = || MarkError::NoPage(page);
        let region = ram
            .region_of(u64::from(page) * PAGE_BYTES)
            .ok_or_else(no_page)?;
        let offset = u64::from(page) * PAGE_BYTES - region.file_offset;
        let address = vm_memory::GuestAddress(region.guest_address.0 + offset);
        // By volatile accesses: guest code may run, and the page is taken again then.
        let from = ram
            .memory()
            .get_slices(address, PAGE)
            .next()
            .and_then(Result::ok)
            .ok_or_else(no_page)?;
        if !self.has(page) && is_zero(&from)? {
            return Ok(());
        }
        let to = self
            .bytes
            .get_slice(page as usize * PAGE, PAGE)
            .map_err(|_| no_page())?;
        from.copy_to_volatile_slice(to);
        self.note(page);
        Ok(())
    }

    /// The same while the guest runs, without touching what nobody has touched: that is in
    /// `untouched`.
    pub fn take_quietly(
        &mut self,
        ram: &GuestRam,
        page: u32,
        untouched: Option<&Untouched>,
    ) -> Result<(), MarkError> {
        let offset = u64::from(page) * PAGE_BYTES;
        let is_untouched = |known: &&Untouched| known.kind(offset, offset + PAGE_BYTES).0;
        let Some(untouched) = untouched.filter(is_untouched) else {
            return self.take(ram, page);
        };
        let mut content = [0; PAGE];
        untouched.read(offset, &mut content).map_err(|source| {
            ram.end_if_template_was_cut();
            MarkError::Untouched(source)
        })?;
        if !self.has(page) && content.iter().all(|&byte| byte == 0) {
            return Ok(());
        }
        let to = self.bytes.get_slice(page as usize * PAGE, PAGE);
        to.map_err(|_| MarkError::NoPage(page))?.copy_from(&content);
        self.note(page);
        Ok(())
    }

    fn note(&mut self, page: u32) {
        if let Some(word) = self.there.get_mut(page as usize / 64) {
            self.count += u64::from(*word >> (page % 64) & 1 == 0);
            *word |= 1 << (page % 64);
        }
    }

    /// Becomes what `delta` makes of it.
    pub fn absorb(&mut self, delta: &Delta) {
        for (slot, &page) in delta.pages.iter().enumerate() {
            let (Some(to), Some(from)) = (self.place(page), delta.slot(slot)) else {
                continue;
            };
            // SAFETY: both are whole pages, of different mappings, and nobody else has a reference
            // to either.
            unsafe { std::ptr::copy_nonoverlapping(from, to, PAGE) };
            self.note(page);
        }
    }
}

fn is_zero(
    slice: &vm_memory::VolatileSlice<'_, impl vm_memory::bitmap::BitmapSlice>,
) -> Result<bool, MarkError> {
    let words = slice
        .get_array_ref::<u64>(0, PAGE / 8)
        .map_err(|_| MarkError::NoMemory)?;
    Ok((0..words.len()).all(|index| words.load(index) == 0))
}

/// Pages that are other than at the mark before.
pub(super) struct Delta {
    /// In rising order.
    pages: Vec<u32>,
    /// Their bytes, in the same order.
    bytes: Vec<u8>,
}

impl Delta {
    /// `pages` as they are now in `ram`, of a machine at rest.
    pub fn take(ram: &GuestRam, mut pages: Vec<u32>) -> Result<Self, MarkError> {
        pages.sort_unstable();
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(pages.len() * PAGE)
            .map_err(|_| MarkError::NoMemory)?;
        let places = Places::of(ram);
        for &page in &pages {
            let from = places.find(page).ok_or(MarkError::NoPage(page))?;
            // SAFETY: `find` gives a whole mapped page of guest memory, which nobody writes while
            // the machine is at rest; the slice is gone before it goes on.
            bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(from, PAGE) });
        }
        Ok(Self { pages, bytes })
    }

    /// Their numbers.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    fn slot(&self, slot: usize) -> Option<*const u8> {
        let bytes = self.bytes.get(slot * PAGE..slot * PAGE + PAGE)?;
        Some(bytes.as_ptr())
    }

    fn find(&self, page: u32) -> Option<*const u8> {
        self.slot(self.pages.binary_search(&page).ok()?)
    }

    /// What this and then `later` make together.
    pub fn then(&self, later: &Self) -> Result<Self, MarkError> {
        let mut pages = [&self.pages[..], &later.pages[..]].concat();
        pages.sort_unstable();
        pages.dedup();
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(pages.len() * PAGE)
            .map_err(|_| MarkError::NoMemory)?;
        for &page in &pages {
            let from = later.find(page).or_else(|| self.find(page));
            let from = from.ok_or(MarkError::NoPage(page))?;
            // SAFETY: a whole page of one of the two, which are not changed meanwhile.
            bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(from, PAGE) });
        }
        Ok(Self { pages, bytes })
    }
}

/// What a mark keeps of memory.
pub(super) enum Pages {
    /// Of the first mark.
    Base(Base),
    /// Of one that follows another.
    Delta(Delta),
}

/// A page's bytes at a mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// The mark does not have it; the one before does.
    Before,
    /// It is zero.
    Zero,
    /// It is here.
    At(*const u8),
}

impl Found {
    /// Copies what is from `offset` on in the page that was found; `to` is not longer than what is
    /// left of it. What the mark before has is left out.
    pub fn read(self, offset: usize, to: &mut [u8]) {
        let len = to.len().min(PAGE.saturating_sub(offset));
        match self {
            // SAFETY: a whole page that is kept, which nobody changes as long as the marks are
            // borrowed, and which the range does not go beyond.
            Self::At(kept) => unsafe {
                std::ptr::copy_nonoverlapping(kept.add(offset.min(PAGE)), to.as_mut_ptr(), len);
            },
            Self::Zero => to.fill(0),
            Self::Before => {}
        }
    }
}

impl Pages {
    /// Number of pages that take memory.
    pub fn count(&self) -> u64 {
        match self {
            Self::Base(base) => base.count(),
            Self::Delta(delta) => delta.pages.len() as u64,
        }
    }

    /// The bytes of `page`.
    pub fn find(&self, page: u32) -> Found {
        match self {
            Self::Base(base) => base.find(page).map_or(Found::Zero, Found::At),
            Self::Delta(delta) => delta.find(page).map_or(Found::Before, Found::At),
        }
    }
}

/// Where pages of guest memory are mapped in this process.
pub(super) struct Places<'a>(&'a [RamRegion]);

impl<'a> Places<'a> {
    /// Of `ram`.
    pub fn of(ram: &'a GuestRam) -> Self {
        Self(ram.regions())
    }

    /// Where `page` is.
    pub fn find(&self, page: u32) -> Option<*mut u8> {
        let at = u64::from(page) * PAGE_BYTES;
        self.0.iter().find_map(|region| {
            let offset = at.checked_sub(region.file_offset)?;
            (offset < region.len).then_some((region.host_address + offset) as *mut u8)
        })
    }

    /// Whether `page` is what was found of it. The machine is at rest.
    pub fn is(&self, page: u32, found: Found) -> bool {
        let Some(from) = self.find(page) else {
            return true;
        };
        let mut here = [0; PAGE];
        // SAFETY: `from` is a whole mapped page of guest memory, which nobody writes while the machine
        // is at rest and those outside stand still; one of them that writes all the same has other
        // bytes compared.
        unsafe { std::ptr::copy_nonoverlapping(from.cast_const(), here.as_mut_ptr(), PAGE) };
        match found {
            // SAFETY: a whole page that is kept, which nobody changes meanwhile.
            Found::At(kept) => here == unsafe { std::slice::from_raw_parts(kept, PAGE) },
            Found::Zero => here.iter().all(|&byte| byte == 0),
            Found::Before => true,
        }
    }

    /// Makes `page` what was found of it. The machine is at rest.
    pub fn put(&self, page: u32, found: Found) {
        let Some(to) = self.find(page) else { return };
        match found {
            // SAFETY: `to` is a whole mapped page of guest memory, to which nobody has a reference,
            // and which nobody accesses while the machine is at rest; `from` is a whole page that
            // is kept, in another mapping.
            Found::At(from) => unsafe { std::ptr::copy_nonoverlapping(from, to, PAGE) },
            // SAFETY: as above.
            Found::Zero => unsafe { std::ptr::write_bytes(to, 0, PAGE) },
            Found::Before => {}
        }
    }
}
