//! Guest memory in the IOMMU's map.
//!
//! ```text
//!   DmaRegion (file) ── mapped in this process ──► DmaMemory ── at guest physical addresses ──► DmaMap (IOMMU)
//! ```
//!
//! What is in the map is locked: the function may reach it at any time. Memory that a guest has not
//! touched yet is allocated by that.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::VfioError;
use super::sys;
use crate::dma::{DmaRegion, DmaSpace};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Bytes of a large page: an entry of the processor's page tables and of the IOMMU's.
const LARGE_PAGE: usize = 2 << 20;
const SMALL_PAGE: usize = 4 << 10;

/// A part of guest memory in this process.
#[derive(Debug)]
struct Part {
    /// Guest physical address.
    guest: u64,
    /// Address in this process.
    host: *mut libc::c_void,
    bytes: usize,
}

/// Guest memory in this process, to be given to a function. It is mapped anew, so that nobody takes
/// it away meanwhile.
#[derive(Debug)]
pub struct DmaMemory {
    parts: Vec<Part>,
}

// SAFETY: the addresses are only passed on to the kernel, never followed.
unsafe impl Send for DmaMemory {}
// SAFETY: as above.
unsafe impl Sync for DmaMemory {}

impl DmaMemory {
    /// All memory that a space reaches.
    ///
    /// # Errors
    /// Memory is a template's, or cannot be mapped.
    pub fn of_space(space: &DmaSpace) -> Result<Self, VfioError> {
        let regions = space.regions();
        let all: u64 = space.memory().iter().map(GuestMemoryRegion::len).sum();
        let reached: u64 = regions.iter().map(|region| region.len).sum();
        if reached != all {
            return Err(VfioError::SharedMemory);
        }
        Self::new(&regions)
    }

    /// Memory by the files that it is in.
    ///
    /// # Errors
    /// It cannot be mapped.
    pub fn new(regions: &[DmaRegion]) -> Result<Self, VfioError> {
        let mut memory = Self { parts: Vec::new() };
        for region in regions {
            let part = map(region).map_err(VfioError::host("map guest memory"))?;
            memory.parts.push(part);
        }
        Ok(memory)
    }

    /// Bytes of memory in all.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes as u64).sum()
    }

    /// Allocates the memory and maps all of it here, in large pages where the host has some, so
    /// that a function can be given it without a fault and an entry for each small one. Ends early
    /// when nobody else has it any more. What fails is left to the function's map, which does the
    /// same.
    pub fn populate(self: &Arc<Self>) {
        for part in &self.parts {
            for start in (0..part.bytes).step_by(LARGE_PAGE) {
                if Arc::strong_count(self) == 1 {
                    return;
                }
                if let Err(error) = part.populate(start) {
                    tracing::debug!(%error, "guest memory is not allocated in advance");
                    return;
                }
            }
        }
    }
}

impl Part {
    /// Allocates a large page's bytes from `start`, or what there is of them.
    fn populate(&self, start: usize) -> io::Result<()> {
        let bytes = LARGE_PAGE.min(self.bytes.saturating_sub(start));
        let advise = |bytes: usize, advice| {
            // SAFETY: the range is within this mapping. Pages are allocated as by a write that
            // changes nothing, or their contents move and stay the same.
            let result = unsafe { libc::madvise(self.host.byte_add(start), bytes, advice) };
            match result {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // There is something to collapse where there is a page. Kernels before 6.1 have no such
        // advice.
        advise(bytes.min(SMALL_PAGE), libc::MADV_POPULATE_WRITE)?;
        if bytes == LARGE_PAGE && advise(bytes, libc::MADV_COLLAPSE).is_ok() {
            return Ok(());
        }
        advise(bytes, libc::MADV_POPULATE_WRITE)
    }
}

impl Drop for DmaMemory {
    fn drop(&mut self) {
        for part in &self.parts {
            // SAFETY: the range is a mapping of ours that nobody refers to.
            unsafe { libc::munmap(part.host, part.bytes) };
        }
    }
}

/// Maps a part where its large pages can be such here too: they lie in the mapping as they lie in
/// the file.
fn map(region: &DmaRegion) -> io::Result<Part> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let bytes = usize::try_from(region.len).map_err(|_| invalid())?;
    let offset = libc::off_t::try_from(region.offset).map_err(|_| invalid())?;
    let within = (region.offset % LARGE_PAGE as u64) as usize;
    let room = bytes.checked_add(2 * LARGE_PAGE).ok_or_else(invalid)?;
    let anywhere = std::ptr::null_mut();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at a place that the kernel chooses replaces nothing.
    let reserved = unsafe { libc::mmap(anywhere, room, libc::PROT_NONE, flags, -1, 0) };
    if reserved == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let skipped = (reserved as usize).next_multiple_of(LARGE_PAGE) - reserved as usize + within;
    // SAFETY: less than two large pages are skipped.
    let place = unsafe { reserved.byte_add(skipped) };
    // SAFETY: the new mapping replaces a part of the one above, and nothing else.
    let host = unsafe {
        libc::mmap(
            place,
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED,
            region.file.as_raw_fd(),
            offset,
        )
    };
    let error = (host == libc::MAP_FAILED).then(io::Error::last_os_error);
    // The room around it. Where mapping failed, what was there may be gone already and be somebody
    // else's: it is left alone.
    let end = (skipped + bytes).next_multiple_of(SMALL_PAGE);
    for (start, end) in [(0, skipped), (end, room)] {
        if start < end {
            // SAFETY: these pages are of the first mapping, and nobody refers to them.
            unsafe { libc::munmap(reserved.byte_add(start), end - start) };
        }
    }
    if let Some(error) = error {
        return Err(error);
    }
    // Without them each page is an entry of the map. It is a matter of speed only: refused, nothing
    // else changes. SAFETY: the range is exactly this mapping; the advice changes no content.
    unsafe { libc::madvise(host, bytes, libc::MADV_HUGEPAGE) };
    Ok(Part {
        guest: region.address,
        host,
        bytes,
    })
}

/// Memory that the functions of a container reach, at guest physical addresses. Dropped, they reach
/// it no more. The kernel has found and locked its pages: the mapping in this process is needed for
/// the next time only.
#[derive(Debug)]
pub struct DmaMap {
    container: Arc<File>,
    /// Bytes of the pieces that are put in and taken out by themselves; each begins at a multiple
    /// of it, or where memory does.
    piece: u64,
    /// Guest physical address and length of each piece that is in the map.
    pieces: BTreeMap<u64, u64>,
    took: Duration,
}

impl DmaMap {
    /// Lets the functions of `container` reach `memory`.
    ///
    /// # Errors
    /// The limit of locked memory is in the way, or the host has not enough.
    pub(super) fn new(container: Arc<File>, memory: &DmaMemory) -> Result<Self, VfioError> {
        let mut map = Self::empty(container, u64::MAX);
        map.add(memory, &Wanted::All, Batch::ALL)?;
        Ok(map)
    }

    /// One in which there is nothing yet, for `memory` in pieces.
    pub(super) fn for_pieces(container: Arc<File>, memory: &DmaMemory) -> Self {
        Self::empty(container, piece_bytes(memory.bytes()))
    }

    fn empty(container: Arc<File>, piece: u64) -> Self {
        Self {
            container,
            piece,
            pieces: BTreeMap::new(),
            took: Duration::ZERO,
        }
    }

    /// Lets the functions reach more of `memory`: those of its pieces that are wanted, or some of
    /// them, and gives where the next ones are. It is the memory of which there are pieces already.
    ///
    /// # Errors
    /// As those of [`Self::new`]; a part of it may be there then.
    pub(super) fn add(
        &mut self,
        memory: &DmaMemory,
        wanted: &Wanted<'_>,
        batch: Batch,
    ) -> Result<Option<u64>, VfioError> {
        let mut left = batch.most;
        let start = Instant::now();
        let wanted = wanted.pieces(self.piece);
        for part in &memory.parts {
            for (guest, bytes) in pieces_of(part.guest, part.bytes as u64, self.piece) {
                let is_wanted = wanted.as_ref().is_none_or(|all| all.contains(&guest));
                if guest < batch.from || !is_wanted || self.pieces.contains_key(&guest) {
                    continue;
                }
                if left == 0 {
                    return Ok(Some(guest));
                }
                left -= 1;
                let host = part.host as u64 + (guest - part.guest);
                // SAFETY: guest memory is changed by others at any time and read as such. It is
                // mapped during the call: the piece is within its part.
                let result = unsafe { sys::map_dma(&self.container, guest, host, bytes) };
                result.map_err(|error| refused(error, memory.bytes()))?;
                self.pieces.insert(guest, bytes);
            }
        }
        self.took += start.elapsed();
        Ok(None)
    }

    /// Takes all out of the map but the pieces in which some of `near` is, or some of that, and
    /// gives where the next ones are.
    ///
    /// # Errors
    /// The host does not take it out.
    pub(super) fn keep(
        &mut self,
        near: &[Range<u64>],
        batch: Batch,
    ) -> Result<Option<u64>, VfioError> {
        let kept = Wanted::Near(near).pieces(self.piece).unwrap_or_default();
        self.take_out(&kept, batch)
            .map_err(VfioError::host("take guest memory out of the IOMMU's map"))
    }

    /// How long it took to put the memory into the map.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.pieces.values().sum()
    }

    /// Takes the memory out of the map; gives how long that took.
    pub fn unmap(mut self) -> Result<Duration, VfioError> {
        let start = Instant::now();
        self.keep(&[], Batch::ALL)?;
        Ok(start.elapsed())
    }

    fn take_out(&mut self, kept: &BTreeSet<u64>, batch: Batch) -> io::Result<Option<u64>> {
        let (some, next) = batch.of(&self.pieces, kept);
        for (guest, bytes) in some {
            sys::unmap_dma(&self.container, guest, bytes)?;
            self.pieces.remove(&guest);
        }
        Ok(next)
    }
}

/// How many pieces at a time, and from which guest physical address on.
#[derive(Debug, Clone, Copy)]
pub struct Batch {
    /// From here on.
    pub from: u64,
    /// At most so many.
    pub most: usize,
}

impl Batch {
    /// All at once.
    pub const ALL: Self = Self {
        from: 0,
        most: usize::MAX,
    };

    /// Its pieces among `all` but those that are kept, and where the next batch begins.
    fn of(self, all: &BTreeMap<u64, u64>, kept: &BTreeSet<u64>) -> (Vec<(u64, u64)>, Option<u64>) {
        let mut far = all
            .range(self.from..)
            .map(|(guest, bytes)| (*guest, *bytes))
            .filter(|(guest, _)| !kept.contains(guest));
        let some = far.by_ref().take(self.most).collect();
        (some, far.next().map(|(guest, _)| guest))
    }
}

/// Which pieces of memory.
pub(super) enum Wanted<'a> {
    /// All.
    All,
    /// Those in which some of these ranges of guest physical addresses is.
    Near(&'a [Range<u64>]),
}

impl Wanted<'_> {
    /// Where they begin, were memory everywhere; `None` for all. Beginnings of memory that are no
    /// multiples of a piece are not found: their pieces are left to [`Wanted::All`].
    fn pieces(&self, piece: u64) -> Option<BTreeSet<u64>> {
        let Self::Near(ranges) = self else {
            return None;
        };
        let mut pieces = BTreeSet::new();
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            let (first, last) = (range.start / piece, (range.end - 1) / piece);
            // Nothing that a device is told of is so long: of an address that is none it is enough.
            let last = last.min(first.saturating_add(MOST_PIECES_OF_ONE));
            pieces.extend((first..=last).map(|number| number * piece));
        }
        Some(pieces)
    }
}

/// Most pieces that one range is looked at for.
const MOST_PIECES_OF_ONE: u64 = 8;
/// Most pieces that memory has: the host keeps some 65,000 entries for all maps of a container
/// (`dma_entry_limit` of vfio_iommu_type1).
const MOST_PIECES: u64 = 4096;

/// How long pieces of so much memory are: large pages where that is not too many.
fn piece_bytes(memory: u64) -> u64 {
    let pages = LARGE_PAGE as u64;
    let needed = memory / MOST_PIECES;
    needed
        .max(pages)
        .checked_next_power_of_two()
        .unwrap_or(u64::MAX)
}

/// The pieces of a part of memory: guest physical address and length.
fn pieces_of(start: u64, bytes: u64, piece: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = start.saturating_add(bytes);
    let mut at = start;
    std::iter::from_fn(move || {
        let left = end - at;
        let to_next = piece - at % piece;
        let length = left.min(to_next);
        let here = at;
        at += length;
        (length > 0).then_some((here, length))
    })
}

impl Drop for DmaMap {
    fn drop(&mut self) {
        if let Err(error) = self.take_out(&BTreeSet::new(), Batch::ALL) {
            // Closing the container does it at last; its pages stay allocated until then.
            tracing::error!(%error, "guest memory stays in the IOMMU's map");
        }
    }
}

/// Why memory is not taken into the map.
fn refused(source: io::Error, needed: u64) -> VfioError {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    match (source.raw_os_error(), limit) {
        (Some(libc::ENOMEM), Some(limit)) if limit < needed => {
            VfioError::LockedMemory { needed, limit }
        }
        _ => VfioError::Host {
            what: "put guest memory into the IOMMU's map",
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::dma::tests::two_parts;

    #[test]
    fn all_of_the_memory_is_mapped_where_its_bytes_are() {
        let (file, space) = two_parts();
        let memory = DmaMemory::of_space(&space).unwrap();
        assert_eq!(memory.bytes(), 0x8000);
        for part in &memory.parts {
            space.write(part.guest + 8, b"seen").unwrap();
            let offset = if part.guest == 0 { 8 } else { 0x3008 };
            let mut seen = [0; 4];
            file.read_exact_at(&mut seen, offset).unwrap();
            assert_eq!(&seen, b"seen");
            // SAFETY: 12 bytes of a mapping of at least a page.
            let mapped = unsafe { part.host.cast::<[u8; 4]>().add(2).read_volatile() };
            assert_eq!(&mapped, b"seen");
        }
    }

    /// A large page needs the same place in its mapping as in its file.
    #[test]
    fn memory_is_mapped_where_it_can_be_in_large_pages() {
        for (offset, len) in [
            (0, 4 << 20),
            (0x3000, 0x1000),
            (0x20_1000, 5 << 20),
            (6 << 20, 0x1800),
        ] {
            let file = File::from(memfd_create("large", MemfdFlags::CLOEXEC).unwrap());
            file.set_len(16 << 20).unwrap();
            file.write_all_at(b"in the file", offset).unwrap();
            let region = DmaRegion {
                address: 0,
                len,
                file: Arc::new(file),
                offset,
            };
            let memory = Arc::new(DmaMemory::new(&[region]).unwrap());
            let part = &memory.parts[0];
            let place = part.host as usize % LARGE_PAGE;
            assert_eq!(place as u64, offset % LARGE_PAGE as u64);
            let other = memory.clone();
            other.populate();
            // SAFETY: 11 bytes of a mapping of at least a page.
            let seen = unsafe { part.host.cast::<[u8; 11]>().read_volatile() };
            assert_eq!(&seen, b"in the file");
        }
    }

    #[test]
    fn memory_is_cut_into_pieces_that_begin_at_multiples_of_one() {
        let piece = LARGE_PAGE as u64;
        assert_eq!(piece_bytes(256 << 20), piece);
        assert_eq!(piece_bytes(8 << 30), piece);
        assert_eq!(piece_bytes((8 << 30) + 1), piece);
        assert_eq!(piece_bytes(33 << 30), 16 << 20);
        let of = |start, bytes| pieces_of(start, bytes, piece).collect::<Vec<_>>();
        assert_eq!(
            of(0, 5 << 20),
            [(0, piece), (piece, piece), (2 * piece, 1 << 20)]
        );
        assert_eq!(
            of(0x1000, piece),
            [(0x1000, piece - 0x1000), (piece, 0x1000)]
        );
        assert_eq!(of(0, 0), []);
        let whole: Vec<_> = pieces_of(1 << 32, 8 << 30, u64::MAX).collect();
        assert_eq!(whole, [(1 << 32, 8 << 30)]);
        let near = [
            piece - 1..piece + 1,
            7 * piece..7 * piece,
            u64::MAX - 1..u64::MAX,
        ];
        let wanted = Wanted::Near(&near).pieces(piece).unwrap();
        assert_eq!(wanted.len(), 3);
        assert!(wanted.contains(&0) && wanted.contains(&piece));
        let long = Wanted::Near(&[0..u64::MAX]).pieces(piece).unwrap();
        assert_eq!(long.len() as u64, MOST_PIECES_OF_ONE + 1);
        assert!(Wanted::All.pieces(piece).is_none());
    }

    #[test]
    fn pieces_are_taken_out_in_batches_and_some_are_kept() {
        let all = (0..6).map(|number| (number * 10, 10)).collect();
        let kept = [20, 50].into();
        let mut batch = Batch { from: 0, most: 2 };
        assert_eq!(batch.of(&all, &kept), (vec![(0, 10), (10, 10)], Some(30)));
        batch.from = 30;
        assert_eq!(batch.of(&all, &kept), (vec![(30, 10), (40, 10)], None));
        let (some, next) = Batch::ALL.of(&all, &kept);
        assert_eq!((some.len(), next), (4, None));
    }

    #[test]
    fn memory_of_a_template_is_given_to_no_device() {
        let (_file, space) = two_parts();
        let guest_memory = space.memory();
        let first = guest_memory.iter().next().unwrap().get_mmap();
        first.bitmap().set_elsewhere(true);
        let error = DmaMemory::of_space(&space).unwrap_err();
        assert!(error.to_string().contains("--lazy"));
        let none = DmaMemory::of_space(&DmaSpace::empty()).unwrap();
        assert_eq!(none.bytes(), 0);
    }

    #[test]
    fn the_limit_of_locked_memory_is_said_only_where_it_is_the_reason() {
        let enomem = || io::Error::from_raw_os_error(libc::ENOMEM);
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        if let Some(limit) = limit {
            let text = refused(enomem(), limit + 1).to_string();
            assert!(text.contains(&format!("{} KiB", limit / 1024)), "{text}");
        }
        assert!(refused(enomem(), 0).to_string().contains("cannot put"));
        let other = refused(io::Error::from_raw_os_error(libc::EINVAL), u64::MAX);
        assert!(other.to_string().contains("cannot put"));
    }
}
