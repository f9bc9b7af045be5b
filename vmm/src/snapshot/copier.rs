//! Pages of guest memory on their way into an image.

use std::ops::Range;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use super::capture_error::{CaptureError, still_wanted};
use super::{Chain, IMAGE_FILE, ImageWriter, PAGE_BYTES, SnapshotError};
use crate::dirty::ranges;
use crate::memory::{GuestRam, RamRegion, Untouched};

/// Most pages that are copied at once.
const BATCH_PAGES: u64 = 256;
/// Pages after which it is asked whether the snapshot is still wanted: 64 MiB.
const PAGES_BETWEEN_WORDS: u64 = 1 << 14;

/// Copies pages of a machine's memory into an image. Pages are numbered as they are in the memory's
/// file, without the gap below 4 GiB.
pub(super) struct Copier<'a> {
    ram: &'a GuestRam,
    dir: &'a Path,
    image: ImageWriter,
    /// Of a diff: pages that are as this has them are left out.
    parent: Option<&'a Chain>,
    /// While all pages are copied: those that are read where they would come from.
    untouched: Option<Untouched>,
    pages: Vec<u8>,
    before: Vec<u8>,
    since_word: u64,
}

impl<'a> Copier<'a> {
    /// Into `image`, of the snapshot in `dir`.
    pub fn new(
        ram: &'a GuestRam,
        dir: &'a Path,
        image: ImageWriter,
        parent: Option<&'a Chain>,
    ) -> Self {
        Self {
            ram,
            dir,
            image,
            parent,
            untouched: None,
            pages: Vec::new(),
            before: Vec::new(),
            since_word: 0,
        }
    }

    /// Copies all pages that may differ from zero, or from the parent. Those that nobody has
    /// touched stay so.
    pub fn copy_all(&mut self, tell: &mut dyn FnMut(&str) -> bool) -> Result<(), CaptureError> {
        self.untouched = self.ram.untouched();
        let copied = self.copy_each(tell);
        self.untouched = None;
        copied
    }

    fn copy_each(&mut self, tell: &mut dyn FnMut(&str) -> bool) -> Result<(), CaptureError> {
        let all = 0..self.ram.size_bytes() / PAGE_BYTES;
        if self.parent.is_some() {
            return self.copy(all, tell);
        }
        for range in self.ram.populated() {
            self.copy(
                range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES),
                tell,
            )?;
        }
        Ok(())
    }

    /// Copies the pages of `range`.
    pub fn copy(
        &mut self,
        range: Range<u64>,
        tell: &mut dyn FnMut(&str) -> bool,
    ) -> Result<(), CaptureError> {
        let mut first = range.start;
        while first < range.end {
            let end = (first + BATCH_PAGES).min(range.end);
            // No batch reaches over the gap.
            let end = self.region(first)?.1.min(end);
            self.read(first, end)?;
            self.put(first)?;
            self.since_word += end - first;
            if self.since_word >= PAGES_BETWEEN_WORDS {
                self.since_word = 0;
                still_wanted(tell, &format!("copying memory, {} MiB so far", end >> 8))?;
            }
            first = end;
        }
        Ok(())
    }

    /// Copies `pages`, by their numbers in rising order.
    pub fn copy_pages(
        &mut self,
        pages: &[u32],
        tell: &mut dyn FnMut(&str) -> bool,
    ) -> Result<(), CaptureError> {
        ranges(pages).try_for_each(|range| self.copy(range, tell))
    }

    /// What is copied from now on has changed: it is not compared with the parent.
    pub fn comes_again(&mut self) {
        self.parent = None;
    }

    /// Has the image hold `bytes` at guest physical `address`, where the guest holds something
    /// else. Within a page.
    pub fn put_instead(&mut self, address: GuestAddress, bytes: &[u8]) -> Result<(), CaptureError> {
        let beyond = || SnapshotError::GuestMemory(address.0);
        let page = self.ram.page_at(address).ok_or_else(beyond)?;
        let at = (address.0 % PAGE_BYTES) as usize;
        self.image
            .change(page, |content| {
                let place = content.get_mut(at..at.checked_add(bytes.len())?)?;
                place.copy_from_slice(bytes);
                Some(())
            })
            .map_err(|source| self.cannot_write(source))?
            .ok_or_else(beyond)?;
        Ok(())
    }

    /// The image, when all is in it.
    pub fn into_image(self) -> ImageWriter {
        self.image
    }

    fn cannot_write(&self, source: std::io::Error) -> SnapshotError {
        SnapshotError::write(self.dir.join(IMAGE_FILE))(source)
    }

    /// The region that page `first` is in, and the first page behind it.
    fn region(&self, first: u64) -> Result<(RamRegion, u64), SnapshotError> {
        let offset = first * PAGE_BYTES;
        let region = self.ram.region_of(offset).copied();
        let region = region.ok_or(SnapshotError::GuestMemory(offset))?;
        Ok((region, (region.file_offset + region.len) / PAGE_BYTES))
    }

    /// Reads the pages.
    fn read(&mut self, first: u64, end: u64) -> Result<(), SnapshotError> {
        self.pages.resize(((end - first) * PAGE_BYTES) as usize, 0);
        let untouched = self.untouched.as_ref();
        read(self.ram, untouched, first * PAGE_BYTES, &mut self.pages)
    }

    /// Puts the pages that were read into the image, those that differ.
    fn put(&mut self, first: u64) -> Result<(), CaptureError> {
        let Some(parent) = self.parent else {
            let put = self.image.put(first, &self.pages);
            return Ok(put.map_err(|source| self.cannot_write(source))?);
        };
        self.before.resize(self.pages.len(), 0);
        parent.read(first, &mut self.before)?;
        let size = PAGE_BYTES as usize;
        let pairs = self.pages.chunks(size).zip(self.before.chunks(size));
        for (number, (page, before)) in (first..).zip(pairs) {
            if page != before {
                let put = self.image.put(number, page);
                put.map_err(|source| self.cannot_write(source))?;
            }
        }
        Ok(())
    }
}

/// Reads guest memory from `offset` of the memory's file on, `untouched` of it from where it would
/// come.
pub(super) fn read(
    ram: &GuestRam,
    untouched: Option<&Untouched>,
    offset: u64,
    mut into: &mut [u8],
) -> Result<(), SnapshotError> {
    let (mut at, end) = (offset, offset + into.len() as u64);
    while at < end {
        let region = ram.region_of(at).ok_or(SnapshotError::GuestMemory(at))?;
        let end = (region.file_offset + region.len).min(end);
        let whole = (false, end);
        let (is_untouched, until) = untouched.map_or(whole, |known| known.kind(at, end));
        let (here, behind) = into.split_at_mut((until - at) as usize);
        match untouched.filter(|_| is_untouched) {
            Some(known) => known.read(at, here).map_err(|source| {
                ram.end_if_template_was_cut();
                SnapshotError::Untouched(source)
            })?,
            None => {
                let address = region.guest_address.0 + (at - region.file_offset);
                let read = ram.memory().read_slice(here, GuestAddress(address));
                read.map_err(|_| SnapshotError::GuestMemory(address))?;
            }
        }
        (at, into) = (until, behind);
    }
    Ok(())
}
