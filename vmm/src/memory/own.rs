//! Giving a guest that began as a template memory of its own while it runs.
//!
//! ```text
//!  at rest: follow changes ─► guest runs: copy all that is not zero ─► copy what changed, again while that is much
//!     ─► at rest: copy the rest, map the file of its own at the same addresses
//! ```
//!
//! Where it is only to be seen by others in this process ([`VmHandle::share_memory`]), what the
//! guest has written is all that is copied; the rest comes when it is touched ([`super::missing`]).

use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use super::copying::{Copying, CopyingError, FEW_PAGES, ROUNDS};
use super::template::{Template, joined};
use super::{GuestRam, MemoryError, PAGE_BYTES, data_of};
use crate::error::Error;
use crate::handle::VmHandle;
use crate::refused::Refused;

/// Bytes that are copied at once.
const CHUNK: usize = 256 << 10;
/// Pages that are brought at once.
const BATCH: usize = 64;

/// Why a guest keeps the memory of its template.
#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    /// It cannot be paused.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Its memory cannot be copied: most likely the host has no more.
    #[error("cannot give the guest memory of its own: {0}")]
    Memory(#[from] MemoryError),
    /// Changes cannot be followed.
    #[error(transparent)]
    Kvm(#[from] Error),
}

impl From<CopyingError> for OwnError {
    fn from(error: CopyingError) -> Self {
        match error {
            CopyingError::Refused(refused) => Self::Refused(refused),
            CopyingError::Kvm(error) => Self::Kvm(error),
        }
    }
}

impl VmHandle {
    /// If memory began as a template, copies it into the file of its own, which others can map
    /// then. The guest runs meanwhile, apart from two short pauses. Not to be called with a device
    /// locked. After an error it goes on with the template.
    pub fn own_memory(&self) -> Result<(), OwnError> {
        let one = self.one_copying();
        let ram = &self.machine().ram;
        if !ram.is_template() {
            return Ok(());
        }
        if ram.comes_on_demand() {
            return self.bring_all();
        }
        let copying = self.follow_copying(one)?;
        self.copy_to_own(&copying, ram.populated())
    }

    /// If memory began as a template, has further mappings of the file of its own, in this process,
    /// see the same bytes: those that say so to [`devices::dma::MissingPages`]. What the guest has
    /// written is copied there, and the rest when it is touched; where the host has no
    /// userfaultfd(2) for this process all is copied, as by [`VmHandle::own_memory`].
    pub fn share_memory(&self) -> Result<(), OwnError> {
        let one = self.one_copying();
        let ram = &self.machine().ram;
        if !ram.is_template() || ram.comes_on_demand() {
            return Ok(());
        }
        let copying = self.follow_copying(one)?;
        let written = match ram.can_come_on_demand() {
            // Also what is zero by now: the template has something else there.
            true => ram.written().ok(),
            false => None,
        };
        if let Some(written) = written
            && self.copy_written(&copying, written)?
        {
            return Ok(());
        }
        self.copy_to_own(&copying, ram.populated())
    }

    /// Brings what is a template's into the file of its own.
    fn bring_all(&self) -> Result<(), OwnError> {
        let ram = &self.machine().ram;
        ram.bring_all()?;
        self.with_devices_at_rest(|| Ok(ram.use_own()?))?
    }

    /// Copies what is in `ranges` of the memory's file, outside of which all is zero, and maps it
    /// then.
    fn copy_to_own(&self, copying: &Copying<'_>, ranges: Vec<Range<u64>>) -> Result<(), OwnError> {
        self.copy_running(copying, ranges, false)?;
        self.with_devices_at_rest(|| {
            self.copy_rest(copying)?;
            Ok(self.machine().ram.use_own()?)
        })?
    }

    /// Copies what is in `written` of the memory's file, and maps it then; the rest comes from the
    /// template. Whether it could: a host that puts more than was written into a file of shared
    /// memory would have the rest of that taken for zeros.
    fn copy_written(
        &self,
        copying: &Copying<'_>,
        mut written: Vec<Range<u64>>,
    ) -> Result<bool, OwnError> {
        let ram = &self.machine().ram;
        written.extend(self.copy_running(copying, written.clone(), true)?);
        self.with_devices_at_rest(|| {
            written.extend(self.copy_rest(copying)?);
            let is_all = !ram.is_template() || ram.has_no_more_than(written)?;
            if is_all {
                ram.use_own_on_demand()?;
            }
            Ok(is_all)
        })?
    }

    /// Copies what is in `ranges` of the memory's file while the guest runs, and what changes
    /// meanwhile, which it returns. `zeros`: also pages of zeros.
    fn copy_running(
        &self,
        copying: &Copying<'_>,
        ranges: Vec<Range<u64>>,
        zeros: bool,
    ) -> Result<Vec<Range<u64>>, OwnError> {
        let ram = &self.machine().ram;
        let mut copied = Vec::new();
        ram.empty_own()?;
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                let bytes = (range.end - at).min(CHUNK as u64);
                ram.copy_to_own(at, bytes as usize, zeros)?;
                at += bytes;
            }
        }
        for _ in 0..ROUNDS {
            let changed = self.with_devices_at_rest(|| copying.changed())??;
            let changed = ram.copy_pages_to_own(&changed)?;
            let is_few = changed.len() <= FEW_PAGES;
            copied.extend(changed);
            if is_few {
                break;
            }
        }
        Ok(copied)
    }

    /// Copies what has changed since, with the machine at rest, and returns it. Nothing if a reset
    /// in between did all that is needed.
    fn copy_rest(&self, copying: &Copying<'_>) -> Result<Vec<Range<u64>>, OwnError> {
        let ram = &self.machine().ram;
        match ram.is_template() {
            true => Ok(ram.copy_pages_to_own(&copying.changed()?)?),
            false => Ok(Vec::new()),
        }
    }
}

impl GuestRam {
    /// Copies `pages`, by their numbers, to the memory's own file, and returns where they are.
    fn copy_pages_to_own(&self, pages: &[u32]) -> Result<Vec<Range<u64>>, MemoryError> {
        let copied = pages.iter().map(|&page| {
            let at = u64::from(page) * PAGE_BYTES;
            self.copy_to_own(at, PAGE_BYTES as usize, true)?;
            Ok(at..at + PAGE_BYTES)
        });
        copied.collect()
    }

    /// Whether nothing is in the memory's own file outside of `written`. With huge pages for all
    /// files of shared memory (`transparent_hugepage/shmem_enabled`) a write has the kernel make 2
    /// MiB, of which all counts as written (until Linux 6.14).
    fn has_no_more_than(&self, written: Vec<Range<u64>>) -> Result<bool, MemoryError> {
        let written = joined(written);
        let found = data_of(self.memfd(), self.size_bytes()).map_err(MemoryError::Allocate)?;
        Ok(found.iter().all(|found| {
            let next = written.partition_point(|range| range.end <= found.start);
            let within = |range: &Range<u64>| range.start <= found.start && found.end <= range.end;
            written.get(next).is_some_and(within)
        }))
    }

    /// Copies `bytes`, whole pages, from `offset` on to the same place in the memory's own file,
    /// with or without pages of zeros. Does nothing if that file is in use by now.
    fn copy_to_own(&self, offset: u64, bytes: usize, zeros: bool) -> Result<(), MemoryError> {
        // A reset, which takes the file into use, waits.
        let mapped = self.mapped.lock();
        if mapped.is_none() {
            return Ok(());
        }
        let mut buffer = vec![0; bytes];
        let (page, mut at) = (PAGE_BYTES as usize, offset);
        for piece in buffer.chunks_mut(page) {
            // A write by the guest meanwhile has the page copied again.
            let read = self.region_of(at).and_then(|region| {
                let gpa = region.guest_address.0 + (at - region.file_offset);
                self.memory().read_slice(piece, GuestAddress(gpa)).ok()
            });
            read.ok_or(MemoryError::NoPage(at))?;
            at += PAGE_BYTES;
        }
        let mut from = 0;
        while from < bytes {
            let is_kept = |piece: &[u8]| zeros || piece.iter().any(|&byte| byte != 0);
            let pieces = buffer[from..].chunks(page);
            let kept = pieces.take_while(|piece| is_kept(piece)).count() * page;
            if kept > 0 {
                let kept = kept.min(bytes - from);
                self.memfd()
                    .write_all_at(&buffer[from..from + kept], offset + from as u64)
                    .map_err(MemoryError::Allocate)?;
            }
            from += kept.max(page);
        }
        Ok(())
    }

    fn can_come_on_demand(&self) -> bool {
        let mapped = self.mapped.lock();
        mapped.as_ref().is_some_and(Template::can_be_shared)
    }

    fn bring_all(&self) -> Result<(), MemoryError> {
        let absent = self.mapped.lock().as_ref().map(Template::absent);
        let absent = absent.unwrap_or(Ok(Vec::new()));
        for offsets in absent.map_err(MemoryError::Template)?.chunks(BATCH) {
            // Not for long: a reset, which needs no page of these any more, waits.
            let mapped = self.mapped.lock();
            let Some(template) = mapped.as_ref() else {
                break;
            };
            template.bring(offsets)?;
        }
        Ok(())
    }

    /// Empties the memory's own file of what an earlier attempt left there.
    fn empty_own(&self) -> Result<(), MemoryError> {
        let mapped = self.mapped.lock();
        match mapped.is_some() {
            true => self.punch(),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_the_own_file_and_was_not_written_is_seen() {
        let ram = GuestRam::new(4 << 20).unwrap();
        let page = |number: u64| number * PAGE_BYTES..(number + 1) * PAGE_BYTES;
        assert!(ram.has_no_more_than(Vec::new()).unwrap());
        for number in [3, 4, 9] {
            ram.memfd()
                .write_all_at(&[1; PAGE_BYTES as usize], page(number).start)
                .unwrap();
        }
        let of = |pages: &[u64]| pages.iter().map(|&number| page(number)).collect();
        // In any order, and some twice: pages come as they are written.
        assert!(ram.has_no_more_than(of(&[9, 4, 3, 4])).unwrap());
        assert!(ram.has_no_more_than(of(&[2, 3, 4, 5, 9])).unwrap());
        assert!(!ram.has_no_more_than(of(&[3, 4])).unwrap());
        assert!(!ram.has_no_more_than(of(&[4, 9])).unwrap());
        assert!(!ram.has_no_more_than(of(&[3, 9])).unwrap());
        assert!(!ram.has_no_more_than(Vec::new()).unwrap());
    }
}
