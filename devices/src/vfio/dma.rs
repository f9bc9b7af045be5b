//! Guest memory in the IOMMU's map.
//!
//! ```text
//!   DmaRegion (file) ── mapped in this process ──► DmaMemory ── at guest physical addresses ──► DmaMap (IOMMU)
//! ```
//!
//! What is in the map is locked: the function may reach it at any time. Memory that a guest has not
//! touched yet is allocated by that.

mod map;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

pub use self::map::{Batch, DmaMap};
pub(super) use self::map::{Container, Wanted};
use super::error::VfioError;
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
    /// By guest physical address. What stays at a change is part of both.
    parts: Vec<Arc<Part>>,
}

// SAFETY: the addresses are only passed on to the kernel, never followed.
unsafe impl Send for Part {}
// SAFETY: as above.
unsafe impl Sync for Part {}

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
            memory.parts.push(Arc::new(part));
        }
        memory.parts.sort_by_key(|part| part.guest);
        Ok(memory)
    }

    /// This memory without the regions that have gone, and with those that have come. What stays is
    /// not mapped anew.
    ///
    /// # Errors
    /// What has come cannot be mapped.
    pub fn changed(&self, removed: &[DmaRegion], added: &[DmaRegion]) -> Result<Self, VfioError> {
        let has_gone = |part: &Part| {
            let mut removed = removed.iter();
            removed.any(|gone| (gone.address, gone.len) == (part.guest, part.bytes as u64))
        };
        let mut memory = Self::new(added)?;
        let stay = self.parts.iter().filter(|part| !has_gone(part)).cloned();
        memory.parts.extend(stay);
        memory.parts.sort_by_key(|part| part.guest);
        Ok(memory)
    }

    /// Bytes of the pieces that it goes into the map in.
    pub(super) fn piece_bytes(&self) -> u64 {
        map::piece_bytes(self.bytes())
    }

    /// Bytes of memory in all.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes as u64).sum()
    }

    /// Allocates the memory and maps all of it here, in large pages where the host has some, so
    /// that a function can be given it without a fault and an entry for each small one. Ends early
    /// where it is not wanted any more. What fails is left to the function's map, which does the
    /// same.
    pub fn populate(&self, is_wanted: impl Fn() -> bool) {
        for part in &self.parts {
            for start in (0..part.bytes).step_by(LARGE_PAGE) {
                if !is_wanted() {
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

impl Drop for Part {
    fn drop(&mut self) {
        // SAFETY: the range is a mapping of ours that nobody refers to: memory of which this was a
        // part, and what that became, have gone.
        unsafe { libc::munmap(self.host, self.bytes) };
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

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Mutex;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::dma::tests::two_parts;

    /// A host whose functions reach what is noted here.
    #[derive(Debug, Default)]
    pub(in crate::vfio) struct Host(Mutex<Noted>);

    #[derive(Debug, Default)]
    struct Noted {
        reached: BTreeMap<u64, u64>,
        takes: usize,
        keeps: bool,
        gives_up: usize,
    }

    impl Host {
        /// It puts so many more pieces into the map.
        pub(in crate::vfio) fn takes(&self, pieces: usize) {
            self.0.lock().unwrap().takes = pieces;
        }

        /// It takes none out, or all.
        pub(in crate::vfio) fn keeps(&self, keeps: bool) {
            self.0.lock().unwrap().keeps = keeps;
        }

        /// It takes so many out, though it keeps the others.
        pub(in crate::vfio) fn gives_up(&self, pieces: usize) {
            self.0.lock().unwrap().gives_up = pieces;
        }

        /// Bytes that are reached.
        pub(in crate::vfio) fn reached(&self) -> u64 {
            self.0.lock().unwrap().reached.values().sum()
        }
    }

    impl Container for Host {
        unsafe fn map_dma(&self, guest: u64, _host: u64, bytes: u64) -> io::Result<()> {
            let mut noted = self.0.lock().unwrap();
            noted.takes = noted
                .takes
                .checked_sub(1)
                .ok_or(io::ErrorKind::OutOfMemory)?;
            assert_eq!(noted.reached.insert(guest, bytes), None, "twice");
            Ok(())
        }

        fn unmap_dma(&self, guest: u64, bytes: u64) -> io::Result<()> {
            let mut noted = self.0.lock().unwrap();
            if noted.keeps {
                noted.gives_up = noted.gives_up.checked_sub(1).ok_or(io::ErrorKind::Other)?;
            }
            assert_eq!(noted.reached.remove(&guest), Some(bytes), "not there");
            Ok(())
        }
    }

    /// So much memory, from address 0 on.
    pub(in crate::vfio) fn memory_of(bytes: u64) -> DmaMemory {
        let file = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        let region = DmaRegion {
            address: 0,
            len: bytes,
            file: Arc::new(file),
            offset: 0,
        };
        DmaMemory::new(&[region]).unwrap()
    }

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
            let memory = DmaMemory::new(&[region]).unwrap();
            let part = &memory.parts[0];
            let place = part.host as usize % LARGE_PAGE;
            assert_eq!(place as u64, offset % LARGE_PAGE as u64);
            memory.populate(|| true);
            // SAFETY: 11 bytes of a mapping of at least a page.
            let seen = unsafe { part.host.cast::<[u8; 11]>().read_volatile() };
            assert_eq!(&seen, b"in the file");
        }
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

    fn region(address: u64) -> DmaRegion {
        let file = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(1 << 20).unwrap();
        DmaRegion {
            address,
            len: 1 << 20,
            file: Arc::new(file),
            offset: 0,
        }
    }

    /// Where its parts are in the guest; all of them are mapped here.
    #[track_caller]
    fn mapped(memory: &DmaMemory) -> Vec<u64> {
        for part in &memory.parts {
            part.populate(0).unwrap();
        }
        memory.parts.iter().map(|part| part.guest).collect()
    }

    #[test]
    fn what_stays_is_mapped_as_long_as_somebody_has_it_and_all_is_in_order() {
        let [low, middle, high] = [0, 1 << 32, 1 << 33].map(region);
        let first = DmaMemory::new(&[high.clone(), low.clone()]).unwrap();
        assert_eq!(mapped(&first), [0, 1 << 33]);
        let second = first.changed(&[], std::slice::from_ref(&middle)).unwrap();
        drop(first);
        assert_eq!(mapped(&second), [0, 1 << 32, 1 << 33]);
        let third = second.changed(std::slice::from_ref(&low), &[]).unwrap();
        let gone = Arc::downgrade(&second.parts[0]);
        drop(second);
        assert_eq!(mapped(&third), [1 << 32, 1 << 33]);
        assert!(gone.upgrade().is_none());
    }
}
