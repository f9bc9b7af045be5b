//! Memory that begins as a file's bytes, which several guests share until they write.
//!
//! ```text
//!   template  ──MAP_PRIVATE─►  guest memory      shared page for page with everybody who maps the file; a page
//!                                  │             that the guest writes is its own from then on
//!                own_memory, reset │ mmap(MAP_FIXED) at the same addresses
//!                                  ▼
//!   own file  ──MAP_SHARED──►  guest memory
//! ```
//!
//! Between the two is a guest whose memory others see through further mappings of its own file: it
//! has what the guest has written, and the rest comes when it is touched ([`super::missing`]).
//!
//! KVM's memory slots name addresses of this process, so they stay as they are. The guest's own
//! file is there from the start, empty, so that whoever has the memory finds it behind it; until it
//! is in use the memory's [`devices::dma::DirtyLog`] says that nothing is in it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{SeekFrom, seek};
use rustix::mm::{MapFlags, ProtFlags, mmap};

use super::lost::Watched;
use super::missing::{BringError, Missing, absent};
use super::userfault::Userfault;
use super::{GuestRam, MemoryError, PAGE_BYTES, RamRegion};

/// Where a machine's memory comes from.
#[derive(Debug, Clone, Default)]
pub enum MemorySource {
    /// Zeros.
    #[default]
    Fresh,
    /// Zeros, in pages of 2 MiB that the host has set aside (hugetlbfs), all allocated at once.
    LargePages,
    /// The bytes of a file, which is not changed.
    Template {
        /// Holds all of memory, at the offsets of [`RamRegion::file_offset`]. It must stay as it is
        /// and as long as it is: a page that is missing when it is touched ends the process with
        /// one line ([`super::lost`]).
        file: Arc<File>,
        /// With it, further mappings of the machine's own file see the memory before all of it is
        /// there ([`crate::VmHandle::share_memory`]).
        userfault: Option<Arc<Userfault>>,
    },
}

/// What memory is mapped from if not from its own file.
#[derive(Debug, Default)]
pub(super) struct Mapped(Mutex<Option<Template>>);

/// A template that is mapped.
#[derive(Debug)]
pub(super) struct Template {
    file: Arc<File>,
    watched: Arc<Watched>,
    userfault: Option<Arc<Userfault>>,
    /// The own file is mapped, and pages of the template come into it.
    missing: Option<Missing>,
}

impl Template {
    /// Whether pages come into the own file when they are touched.
    pub fn is_shared(&self) -> bool {
        self.missing.is_some()
    }

    /// The template.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The same, for who reads it while the memory becomes something else.
    pub fn shared_file(&self) -> Arc<File> {
        self.file.clone()
    }

    /// Whether they could.
    pub fn can_be_shared(&self) -> bool {
        self.userfault.is_some()
    }

    /// Offsets of those that have not come yet, if they do.
    pub fn absent(&self) -> io::Result<Vec<u64>> {
        self.missing
            .as_ref()
            .map_or(Ok(Vec::new()), Missing::absent)
    }

    /// Brings the pages at `offsets` that have not come yet, if they do.
    pub fn bring(&self, offsets: &[u64]) -> Result<(), BringError> {
        let missing = self.missing.as_ref();
        missing.map_or(Ok(()), |missing| missing.bring(offsets))
    }
}

impl Mapped {
    pub fn lock(&self) -> MutexGuard<'_, Option<Template>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GuestRam {
    /// Maps `file` in place of the memory's own.
    pub(super) fn use_template(
        &self,
        file: Arc<File>,
        userfault: Option<Arc<Userfault>>,
    ) -> Result<(), MemoryError> {
        let length = file.metadata().map_err(MemoryError::Template)?.len();
        if length < self.size_bytes() {
            let wanted = self.size_bytes();
            return Err(MemoryError::TemplateSize { length, wanted });
        }
        let mut mapped = self.mapped.lock();
        for region in self.regions() {
            map_over(region, &file, MapFlags::PRIVATE).map_err(MemoryError::Template)?;
        }
        self.for_each_log(|log| log.set_elsewhere(true));
        let watched = Watched::new(file.clone(), self.regions(), self.size_bytes());
        let watched = watched.map_err(MemoryError::Template)?;
        *mapped = Some(Template {
            file,
            watched: Arc::new(watched),
            userfault,
            missing: None,
        });
        Ok(())
    }

    /// Maps the memory's own file, which has all that was written, and has the rest come from the
    /// template when it is touched. The machine is at rest. Who reads guest memory while it is not
    /// holds [`crate::VmHandle::one_copying`]: what is read between the mapping and the kernel's
    /// knowing that pages are missing would be zero for good.
    pub(super) fn use_own_on_demand(&self) -> Result<(), MemoryError> {
        let mut mapped = self.mapped.lock();
        let Some(template) = mapped.as_mut().filter(|template| !template.is_shared()) else {
            return Ok(());
        };
        let Some(userfault) = template.userfault.clone() else {
            return Ok(());
        };
        // No huge pages are asked for: the kernel's thread that puts small ones together would take
        // pages that are missing for zeros (until Linux 6.4).
        let missing = self.map_own().and_then(|()| {
            Missing::serve(
                userfault,
                template.file.clone(),
                self.memfd.clone(),
                self.regions(),
                template.watched.clone(),
            )
        });
        let missing = match missing {
            Ok(missing) => missing,
            Err(error) => {
                tracing::debug!(%error, "all of a template is copied");
                let (file, watched) = (template.file.clone(), template.watched.clone());
                drop(mapped);
                // Some of the memory is mapped from the own file by now, where pages are missing.
                if let Err(error) = self.fill_up(&file).and_then(|()| self.use_own()) {
                    watched.end_because(&error);
                }
                return Ok(());
            }
        };
        self.for_each_log(|log| log.set_missing_pages(Some(missing.for_views())));
        template.missing = Some(missing);
        Ok(())
    }

    /// Maps the memory's own file. After an error some of it may be.
    fn map_own(&self) -> io::Result<()> {
        let mut regions = self.regions().iter();
        regions.try_for_each(|region| map_over(region, self.memfd(), MapFlags::SHARED))
    }

    /// Ends the process, with a line that says so, if memory is mapped from a file that was cut: to
    /// be asked where the guest cannot go on, before anything else is made of it.
    pub(crate) fn end_if_template_was_cut(&self) {
        if let Some(template) = &*self.mapped.lock() {
            template.watched.end_if_cut();
        }
    }

    /// Copies what the memory's own file has not yet from `template`. The machine is at rest.
    fn fill_up(&self, template: &File) -> Result<(), MemoryError> {
        let mut page = [0; PAGE_BYTES as usize];
        let absent = absent(template, self.memfd(), self.size_bytes());
        for offset in absent.map_err(MemoryError::Template)? {
            let read = template.read_exact_at(&mut page, offset);
            read.map_err(MemoryError::Template)?;
            let written = self.memfd().write_all_at(&page, offset);
            written.map_err(MemoryError::Allocate)?;
        }
        Ok(())
    }

    /// Whether some of it is a template's: its own file is empty, or has what was touched.
    pub fn is_template(&self) -> bool {
        self.mapped.lock().is_some()
    }

    /// Whether the file of its own is what is mapped, though some of it is a template's.
    pub fn comes_on_demand(&self) -> bool {
        let mapped = self.mapped.lock();
        mapped.as_ref().is_some_and(Template::is_shared)
    }

    /// Maps the memory's own file. If it was mapped from a template, its bytes are those of the
    /// file now.
    pub(crate) fn use_own(&self) -> Result<(), MemoryError> {
        let mut mapped = self.mapped.lock();
        let Some(template) = mapped.as_ref() else {
            return Ok(());
        };
        if !template.is_shared() {
            self.map_own().map_err(MemoryError::Template)?;
        }
        let template = mapped.take();
        // In this order: whoever finds nobody who brings pages finds that none is needed.
        self.for_each_log(|log| log.set_elsewhere(false));
        self.for_each_log(|log| log.set_missing_pages(None));
        drop(mapped);
        // Nobody waits for a page any more that is not there: it is zero.
        drop(template);
        self.advise();
        Ok(())
    }

    /// Parts of the memory's file, in bytes and whole pages, outside of which all is zero, in
    /// rising order. Costs by what is there, for memory that is a template's by its size.
    pub fn populated(&self) -> Vec<Range<u64>> {
        self.find_populated().unwrap_or_else(|error| {
            tracing::debug!(%error, "all of guest memory may be other than zero");
            std::iter::once(0..self.size_bytes()).collect()
        })
    }

    fn find_populated(&self) -> io::Result<Vec<Range<u64>>> {
        let mapped = self.mapped.lock();
        let Some(template) = &*mapped else {
            drop(mapped);
            return data_of(self.memfd(), self.size_bytes());
        };
        let mut found = data_of(&template.file, self.size_bytes())?;
        // What is missing now would be taken for zeros.
        template.watched.end_if_cut();
        let is_shared = template.is_shared();
        drop(mapped);
        match is_shared {
            true => found.extend(data_of(self.memfd(), self.size_bytes())?),
            false => found.extend(self.written()?),
        }
        Ok(joined(found))
    }

    /// Pages of a template's memory that are not its file's any more, in bytes and rising order.
    pub(super) fn written(&self) -> io::Result<Vec<Range<u64>>> {
        let mut found = Vec::new();
        for region in self.regions() {
            own_pages(region, &mut found)?;
        }
        Ok(joined(found))
    }
}

/// Maps `file` over `region`.
fn map_over(region: &RamRegion, file: &File, flags: MapFlags) -> io::Result<()> {
    // SAFETY: the range is the mapping of this region, which the memory owns and which nobody has a
    // reference into: guest memory is accessed by volatile accesses alone, and these find one
    // mapping or the other.
    let mapped = unsafe {
        mmap(
            region.host_address as *mut _,
            region.len as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            flags | MapFlags::FIXED | MapFlags::NORESERVE,
            file,
            region.file_offset,
        )
    };
    mapped.map(|_| ()).map_err(Into::into)
}

/// Parts of the first `size` bytes of `file` that are no hole, in whole pages (lseek(2),
/// `SEEK_DATA`).
///
/// # Errors
/// The file system cannot say.
pub fn data_of(file: &File, size: u64) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing follows.
            Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?;
        let start = start / PAGE_BYTES * PAGE_BYTES;
        at = end.next_multiple_of(PAGE_BYTES);
        if start < size {
            found.push(start..at.min(size));
        }
    }
    Ok(found)
}

/// What a page of a private mapping of a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PageKind {
    /// Not in this process's memory.
    Absent,
    /// The file's.
    OfFile,
    /// Written since: its own.
    Own,
}

/// Gives each page of `region`, which is a private mapping, to `look`, with its offset in memory's
/// file (proc_pid_pagemap(5): present or swapped, of a file or shared).
pub(super) fn look_at_pages(
    region: &RamRegion,
    mut look: impl FnMut(u64, PageKind),
) -> io::Result<()> {
    const PRESENT_OR_SWAPPED: u64 = 3 << 62;
    const OF_FILE: u64 = 1 << 61;
    /// Entries that are read at once.
    const BATCH: u64 = 8192;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut entries = vec![0; BATCH as usize * 8];
    let mut page = 0;
    let pages = region.len / PAGE_BYTES;
    while page < pages {
        let count = BATCH.min(pages - page);
        let bytes = &mut entries[..count as usize * 8];
        pagemap.read_exact_at(bytes, (region.host_address / PAGE_BYTES + page) * 8)?;
        for (number, entry) in (page..).zip(bytes.as_chunks().0) {
            let entry = u64::from_ne_bytes(*entry);
            let kind = match (entry & PRESENT_OR_SWAPPED != 0, entry & OF_FILE != 0) {
                (false, _) => PageKind::Absent,
                (true, true) => PageKind::OfFile,
                (true, false) => PageKind::Own,
            };
            look(region.file_offset + number * PAGE_BYTES, kind);
        }
        page += count;
    }
    Ok(())
}

/// Adds the pages of a private mapping that are no longer its file's.
fn own_pages(region: &RamRegion, found: &mut Vec<Range<u64>>) -> io::Result<()> {
    look_at_pages(region, |offset, kind| {
        if kind == PageKind::Own {
            found.push(offset..offset + PAGE_BYTES);
        }
    })
}

/// The same places in rising order, none twice.
pub(super) fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}
