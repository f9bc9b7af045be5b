//! Guest memory: one memfd, mapped shared, unless it begins as a [`template`].
//!
//! One descriptor for all of it, so that another mapping of the same memory (private, for an
//! isolated call) sees the same layout. Pages are allocated when the guest touches them; nothing is
//! zeroed or touched in advance. Where the host lets us, the file is one that can have huge pages.

use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::dma::{DirtyLog, GuestMemory};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::{Advice, madvise};
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion,
    mmap::MmapRegionBuilder,
};

use crate::layout::{LOW_MEMORY_END, MEMORY_ABOVE_4G};

mod ahead;
pub(crate) mod copying;
mod files;
mod lost;
mod missing;
mod own;
mod template;
mod untouched;
mod userfault;

pub use self::files::FILE_NAME;
use self::files::{allocate_large_pages, large_page_file, small_page_file};
pub use self::lost::when_memory_is_lost;
pub use self::own::OwnError;
use self::template::Mapped;
pub use self::template::{MemorySource, data_of};
pub(crate) use self::untouched::Untouched;
pub use self::userfault::Userfault;

/// Least memory a machine can have, in bytes: the part below 1 MiB and as much again.
pub const MIN_MEMORY_BYTES: u64 = 2 << 20;

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;

/// Why guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Less than [`MIN_MEMORY_BYTES`].
    #[error("{} MiB of memory are too little: give the guest at least 2 MiB, 128 MiB for Linux", .0 >> 20)]
    TooSmall(u64),
    /// No multiple of a page.
    #[error("memory of {0} bytes is no multiple of 4096: give whole MiB")]
    NotWholePages(u64),
    /// No multiple of a large page.
    #[error(
        "memory of {0} bytes is no multiple of 2 MiB, the size of a large page: give an even number of MiB"
    )]
    NotWholeLargePages(u64),
    /// There are not as many large pages.
    #[error(
        "the host has no {needed} large pages to spare ({source}): set some aside, as with `sysctl vm.nr_hugepages={needed}`, or leave out --large-pages"
    )]
    LargePages {
        /// Pages that are needed.
        needed: u64,
        /// Why not.
        source: std::io::Error,
    },
    /// More than the host has in all.
    #[error("the guest is to have {} MiB, but this host has {} MiB: ask for less", .asked >> 20, .host >> 20)]
    MoreThanHost {
        /// Bytes asked for.
        asked: u64,
        /// Bytes of memory in this host.
        host: u64,
    },
    /// More than the processor can address below the 64-bit PCI window.
    #[error("the guest is to have {} MiB, but this processor can address {} MiB: ask for less", .asked >> 20, .limit >> 20)]
    MoreThanAddressable {
        /// Bytes asked for.
        asked: u64,
        /// Most there can be.
        limit: u64,
    },
    /// The host refuses.
    #[error("cannot allocate guest memory: {0}; close other programs or ask for less")]
    Allocate(std::io::Error),
    /// The host refuses a mapping.
    #[error("cannot map guest memory: {0}; check `ulimit -v`")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
    /// The template cannot be mapped.
    #[error("cannot map the file that guest memory begins as: {0}")]
    Template(#[source] std::io::Error),
    /// The template is too short.
    #[error(
        "the file that guest memory begins as has {length} bytes, the guest {wanted}: it was cut, or is of another guest"
    )]
    TemplateSize {
        /// Its length.
        length: u64,
        /// Bytes of memory.
        wanted: u64,
    },
    /// There is no page at this offset.
    #[error("offset {0:#x} is outside guest memory")]
    NoPage(u64),
    /// The regions do not fit together.
    #[error("guest memory cannot be laid out: {0}")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
}

/// A contiguous part of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// KVM's memory slot, also in other VMs that map the same memory.
    pub slot: u32,
    /// First guest physical address.
    pub guest_address: GuestAddress,
    /// Length in bytes.
    pub len: u64,
    /// Where it starts in the memfd.
    pub file_offset: u64,
    /// Where it is mapped in this process.
    pub host_address: u64,
}

/// All memory of a guest.
#[derive(Debug)]
pub struct GuestRam {
    memfd: Arc<File>,
    memory: Arc<GuestMemory>,
    regions: Vec<RamRegion>,
    size_bytes: u64,
    has_large_pages: bool,
    mapped: Mapped,
    owning: Mutex<()>,
}

impl GuestRam {
    /// Memory of `size_bytes`, below 3 GiB and from 4 GiB on.
    pub fn from(source: MemorySource, size_bytes: u64) -> Result<Self, MemoryError> {
        match source {
            MemorySource::Fresh => Self::new(size_bytes),
            MemorySource::LargePages => Self::make(size_bytes, true),
            MemorySource::Template { file, userfault } => {
                let ram = Self::new(size_bytes)?;
                ram.use_template(file, userfault)?;
                Ok(ram)
            }
        }
    }

    /// Memory of `size_bytes`, all zero, below 3 GiB and from 4 GiB on.
    pub fn new(size_bytes: u64) -> Result<Self, MemoryError> {
        Self::make(size_bytes, false)
    }

    fn make(size_bytes: u64, has_large_pages: bool) -> Result<Self, MemoryError> {
        if size_bytes < MIN_MEMORY_BYTES {
            return Err(MemoryError::TooSmall(size_bytes));
        }
        if !size_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::NotWholePages(size_bytes));
        }
        let info = rustix::system::sysinfo();
        let host = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit));
        if size_bytes > host {
            return Err(MemoryError::MoreThanHost {
                asked: size_bytes,
                host,
            });
        }
        let memfd = match has_large_pages {
            true => large_page_file(size_bytes)?,
            false => small_page_file(size_bytes)?,
        };
        let memfd = Arc::new(File::from(memfd));

        let low = size_bytes.min(LOW_MEMORY_END);
        let parts = [(0, low, 0), (MEMORY_ABOVE_4G, size_bytes - low, low)];
        let (mut regions, mut mapped) = (Vec::new(), Vec::new());
        for (guest, len, file_offset) in parts.into_iter().filter(|&(_, len, _)| len > 0) {
            let file = FileOffset::from_arc(memfd.clone(), file_offset);
            let mapping =
                MmapRegionBuilder::new_with_bitmap(len as usize, DirtyLog::with_len(len as usize))
                    .with_file_offset(file)
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                    .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                    .build()
                    .map_err(MemoryError::Map)?;
            advise_huge_pages(&mapping);
            let guest_address = GuestAddress(guest);
            regions.push(RamRegion {
                slot: regions.len() as u32,
                guest_address,
                len,
                file_offset,
                host_address: mapping.as_ptr() as u64,
            });
            let limit = u64::MAX - guest;
            mapped.push(GuestRegionMmap::new(mapping, guest_address).ok_or(
                MemoryError::MoreThanAddressable {
                    asked: size_bytes,
                    limit,
                },
            )?);
        }
        let memory = GuestMemory::from_regions(mapped).map_err(MemoryError::Layout)?;
        Ok(Self {
            memfd,
            memory: Arc::new(memory),
            regions,
            size_bytes,
            has_large_pages,
            mapped: Mapped::default(),
            owning: Mutex::new(()),
        })
    }

    /// The memory, for reading and writing by guest physical address.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The memfd that holds all of it.
    pub fn memfd(&self) -> &File {
        &self.memfd
    }

    /// Its contiguous parts in rising order.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Bytes of memory in all.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Whether it is in pages of 2 MiB that cannot be taken apart: no other mapping can have less
    /// of it.
    pub fn has_large_pages(&self) -> bool {
        self.has_large_pages
    }

    /// First guest physical address behind the last byte of memory.
    pub fn end(&self) -> GuestAddress {
        self.regions
            .last()
            .map_or(GuestAddress(0), |r| GuestAddress(r.guest_address.0 + r.len))
    }

    /// First address behind the memory that starts at 0.
    pub fn low_end(&self) -> u64 {
        self.size_bytes.min(LOW_MEMORY_END)
    }

    /// Number of the page at guest physical `address`, as the memory's file has it.
    pub fn page_at(&self, address: GuestAddress) -> Option<u64> {
        let regions = self.regions.iter();
        let mut regions = regions.filter_map(|region| {
            let offset = address.0.checked_sub(region.guest_address.0)?;
            (offset < region.len).then(|| (region.file_offset + offset) / PAGE_BYTES)
        });
        regions.next()
    }

    /// The region that byte `offset` of the memory's file is in.
    pub fn region_of(&self, offset: u64) -> Option<&RamRegion> {
        let mut regions = self.regions.iter();
        regions
            .find(|region| (region.file_offset..region.file_offset + region.len).contains(&offset))
    }

    /// Gives every page back to the host: the guest sees zeros again, also if its memory began as a
    /// template. Private copies of pages in other mappings of the memfd stay.
    pub fn clear(&self) -> Result<(), MemoryError> {
        if self.logs_are_on() {
            // Changes that no write makes.
            for range in self.populated() {
                self.mark_changed(&range);
            }
        }
        self.use_own()?;
        self.punch()
    }

    fn punch(&self) -> Result<(), MemoryError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&*self.memfd, flags, 0, self.size_bytes)
            .map_err(|errno| MemoryError::Allocate(errno.into()))?;
        match self.has_large_pages {
            true => allocate_large_pages(&self.memfd, self.size_bytes),
            false => Ok(()),
        }
    }

    /// Calls `f` with the log of each region, in the order of regions.
    pub(crate) fn for_each_log(&self, mut f: impl FnMut(&DirtyLog)) {
        for region in self.memory.iter() {
            f(region.get_mmap().bitmap());
        }
    }

    /// To be kept while memory is copied to the file of its own.
    fn owning(&self) -> MutexGuard<'_, ()> {
        self.owning.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn logs_are_on(&self) -> bool {
        let mut on = false;
        self.for_each_log(|log| on |= log.is_on());
        on
    }

    /// Marks what is at `range` of the file as written.
    fn mark_changed(&self, range: &Range<u64>) {
        let mut regions = self.regions.iter();
        self.for_each_log(|log| {
            let Some(region) = regions.next() else { return };
            let start = range.start.max(region.file_offset);
            let end = range.end.min(region.file_offset + region.len);
            if start < end {
                log.mark_dirty(
                    (start - region.file_offset) as usize,
                    (end - start) as usize,
                );
            }
        });
    }

    /// Asks for huge pages.
    fn advise(&self) {
        for region in self.memory.iter() {
            advise_huge_pages(&region.get_mmap());
        }
    }
}

/// Asks for huge pages for a mapping.
fn advise_huge_pages(mapping: &MmapRegion<DirtyLog>) {
    // SAFETY: the range is exactly this mapping; the advice changes no content.
    let result = unsafe {
        madvise(
            mapping.as_ptr().cast(),
            mapping.size(),
            Advice::LinuxHugepage,
        )
    };
    if let Err(error) = result {
        // Kernels without huge pages refuse it.
        tracing::debug!(%error, "no huge pages for guest memory");
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::files::LARGE_PAGE_BYTES;
    use super::*;

    #[test]
    fn sizes_that_cannot_work_are_refused() {
        assert!(matches!(GuestRam::new(0), Err(MemoryError::TooSmall(0))));
        assert!(matches!(
            GuestRam::new(1 << 20),
            Err(MemoryError::TooSmall(_))
        ));
        assert!(matches!(
            GuestRam::new((2 << 20) + 1),
            Err(MemoryError::NotWholePages(_))
        ));
        assert!(matches!(
            GuestRam::new(1 << 50),
            Err(MemoryError::MoreThanHost { .. })
        ));
    }

    #[test]
    fn memory_beyond_3_gib_is_above_4_gib_and_the_hole_is_empty() {
        let ram = GuestRam::new(4 << 30).unwrap();
        let [low, high] = ram.regions() else {
            panic!("{:?}", ram.regions())
        };
        assert_eq!(
            (low.guest_address.0, low.len, low.file_offset),
            (0, 3 << 30, 0)
        );
        assert_eq!(
            (high.guest_address.0, high.len, high.file_offset),
            (1 << 32, 1 << 30, 3 << 30)
        );
        assert_eq!(ram.end().0, 5 << 30);
        assert!(ram.memory().write_obj(1u8, GuestAddress(3 << 30)).is_err());
        ram.memory()
            .write_obj(0x55u8, GuestAddress(1 << 32))
            .unwrap();
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_at(ram.memfd(), &mut byte, 3 << 30).unwrap();
        assert_eq!(byte, [0x55]);
    }

    /// Of large pages there may be none here: then it says how many it wants.
    #[test]
    fn large_pages_are_had_whole_or_asked_for() {
        let odd = GuestRam::from(MemorySource::LargePages, 3 << 20);
        assert!(matches!(odd, Err(MemoryError::NotWholeLargePages(_))));
        match GuestRam::from(MemorySource::LargePages, 4 << 20) {
            Ok(ram) => {
                assert!(ram.has_large_pages());
                let memory = ram.memory();
                memory.write_obj(7u64, GuestAddress(0x1008)).unwrap();
                ram.clear().unwrap();
                assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1008)).unwrap(), 0);
            }
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("vm.nr_hugepages=2"), "{text}");
            }
        }
        // More than any host has set aside.
        let host = rustix::system::sysinfo();
        let all = (host.totalram as u64 * u64::from(host.mem_unit)) & !(LARGE_PAGE_BYTES - 1);
        let error = GuestRam::from(MemorySource::LargePages, all).unwrap_err();
        assert!(error.to_string().contains("vm.nr_hugepages"), "{error}");
    }

    #[test]
    fn cleared_memory_reads_zero_and_costs_nothing() {
        let ram = GuestRam::new(4 << 20).unwrap();
        ram.memory()
            .write_slice(&[0xaa; 1 << 16], GuestAddress(0x1000))
            .unwrap();
        ram.clear().unwrap();
        let blocks = std::os::unix::fs::MetadataExt::blocks(&ram.memfd().metadata().unwrap());
        assert_eq!(blocks, 0);
        assert_eq!(
            ram.memory().read_obj::<u64>(GuestAddress(0x1000)).unwrap(),
            0
        );
    }
}
