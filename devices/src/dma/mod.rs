//! Guest memory as a bus-mastering device sees it.

use std::fs::File;
use std::sync::{Arc, PoisonError, Weak};

use self::changes::Listeners;
use vm_memory::atomic::GuestMemoryLoadGuard;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

pub mod bus_error;
mod changes;
mod dirty_log;
mod foreign;
mod missing;

pub use self::changes::DmaListener;
pub use self::dirty_log::DirtyLog;
pub use self::foreign::ForeignMapping;
pub use self::missing::{MissingPages, ViewToken};

/// Guest memory as this process reads and writes it. What it writes is marked where somebody wants
/// to know ([`DirtyLog`]), which is why nobody writes guest memory by another way without marking
/// it himself.
pub type GuestMemory = GuestMemoryMmap<DirtyLog>;

/// Why a device could not reach guest memory.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("DMA of {len} bytes at guest physical address {address:#x} is outside guest memory")]
pub struct DmaError {
    /// Guest physical address of the first byte.
    pub address: u64,
    /// Length in bytes.
    pub len: usize,
}

/// A contiguous part of guest memory and where it lies in a file.
#[derive(Debug, Clone)]
pub struct DmaRegion {
    /// Guest physical address of its first byte.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
    /// The file, which is mapped shared.
    pub file: Arc<File>,
    /// Where the first byte is in it.
    pub offset: u64,
}

/// A part of memory that another process has given, see [`ForeignMapping`].
#[derive(Debug, Clone)]
pub struct ForeignRegion(Arc<GuestRegionMmap<DirtyLog>>);

impl ForeignRegion {
    /// Maps `region`.
    ///
    /// # Errors
    /// Its file cannot be mapped so, or its addresses wrap around.
    pub fn new(region: DmaRegion) -> std::io::Result<Self> {
        let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        let len = usize::try_from(region.len).map_err(|_| invalid())?;
        let mapping = ForeignMapping::new(&region.file, region.offset, len)?;
        let at = mapping.as_ptr();
        let log = DirtyLog::of_foreign(mapping, len);
        // SAFETY: the mapping has so many bytes there, and lives in the region's log, which is
        // dropped with the region.
        let builder =
            unsafe { MmapRegionBuilder::new_with_bitmap(len, log).with_raw_mmap_pointer(at) };
        let builder = builder
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(region.file, region.offset));
        let mapped = builder.build().map_err(std::io::Error::other)?;
        let mapped = GuestRegionMmap::new(mapped, GuestAddress(region.address));
        Ok(Self(Arc::new(mapped.ok_or_else(invalid)?)))
    }

    /// Address of the first byte, and length.
    pub fn range(&self) -> (u64, u64) {
        (self.0.start_addr().0, self.0.len())
    }

    /// Whether its owner was found to have taken some of it away.
    pub fn has_shrunk(&self) -> bool {
        self.0.get_mmap().bitmap().has_shrunk()
    }

    /// The memory that consists of `regions`, which do not overlap and are in the order of their
    /// addresses.
    pub fn memory<'a>(regions: impl Iterator<Item = &'a Self>) -> GuestMemory {
        let regions = regions.map(|region| region.0.clone()).collect();
        // What fails is memory of no regions.
        GuestMemory::from_arc_regions(regions).unwrap_or_default()
    }
}

/// The guest physical memory that one device may read and write. Clones are the same space.
#[derive(Debug, Clone)]
pub struct DmaSpace {
    memory: GuestMemoryAtomic<GuestMemory>,
    listeners: Arc<Listeners>,
}

impl DmaSpace {
    /// A space that reaches all of `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            memory: memory.into(),
            listeners: Arc::default(),
        }
    }

    /// A space that reaches nothing yet.
    pub fn empty() -> Self {
        Self::new(Arc::new(GuestMemory::new()))
    }

    /// Has the space reach `memory` from now on, and nothing else. An access that is under way on
    /// another thread may still reach what it reached before. Whoever listens has heard of it when
    /// this returns; until then what the space reached is there.
    pub fn replace(&self, memory: GuestMemory) {
        self.listeners.around(self, || {
            let lock = self.memory.lock();
            lock.unwrap_or_else(PoisonError::into_inner).replace(memory);
        });
    }

    /// Tells `listener`, as long as it is there, which regions come and go from now on.
    pub fn listen(&self, listener: Weak<dyn DmaListener>) {
        self.listeners.add(listener);
    }

    /// The memory behind the space at this moment, for libraries that walk it themselves
    /// (`virtio-queue`).
    pub fn memory(&self) -> GuestMemoryLoadGuard<GuestMemory> {
        self.memory.memory()
    }

    /// The parts of the space with the file behind each: for a device in another process, or one
    /// that the kernel gives a map of addresses. A part that no file is behind, or that began as a
    /// template's bytes and is not in its file yet, is left out; nobody else can reach it.
    pub fn regions(&self) -> Vec<DmaRegion> {
        let memory = self.memory();
        let regions = memory.iter().filter_map(|region| {
            let file = region.file_offset()?;
            if region.get_mmap().bitmap().is_elsewhere() {
                return None;
            }
            Some(DmaRegion {
                address: region.start_addr().0,
                len: region.len(),
                file: file.arc().clone(),
                offset: file.start(),
            })
        });
        regions.collect()
    }

    /// Fills `data` from guest physical `address`. On an error `data` may be partly filled.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let len = data.len();
        self.memory()
            .read_slice(data, GuestAddress(address))
            .map_err(|_| DmaError { address, len })
    }

    /// Writes `data` to guest physical `address`. On an error a prefix may have been written.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        self.memory()
            .write_slice(data, GuestAddress(address))
            .map_err(|_| DmaError {
                address,
                len: data.len(),
            })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// A space of two parts, 0x3000 bytes from 0 and 0x5000 from 4 GiB on, one behind the other in
    /// a file.
    pub(crate) fn two_parts() -> (Arc<File>, DmaSpace) {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(0x8000).unwrap();
        let part = |address: u64, len: usize, offset: u64| {
            let file = FileOffset::from_arc(file.clone(), offset);
            (GuestAddress(address), len, Some(file))
        };
        let parts = [part(0, 0x3000, 0), part(1 << 32, 0x5000, 0x3000)];
        let memory = GuestMemory::from_ranges_with_files(parts).unwrap();
        (file.clone(), DmaSpace::new(Arc::new(memory)))
    }

    #[test]
    fn whoever_has_the_files_sees_what_the_device_writes() {
        let (_file, dma) = two_parts();
        let regions = dma.regions();
        let places: Vec<_> = regions
            .iter()
            .map(|region| (region.address, region.len, region.offset))
            .collect();
        assert_eq!(places, [(0, 0x3000, 0), (1 << 32, 0x5000, 0x3000)]);
        for region in &regions {
            let at = region.address + region.len - 4;
            dma.write(at, &at.to_le_bytes()[..4]).unwrap();
            let mut seen = [0; 4];
            let offset = region.offset + region.len - 4;
            region.file.read_exact_at(&mut seen, offset).unwrap();
            assert_eq!(seen, at.to_le_bytes()[..4]);
        }
        let first = dma.memory().iter().next().unwrap().get_mmap();
        first.bitmap().set_elsewhere(true);
        assert_eq!(dma.regions().len(), 1, "a file without the bytes");
    }

    #[test]
    fn all_copies_of_a_space_reach_what_it_was_given_last() {
        let dma = DmaSpace::empty();
        let of_a_device = dma.clone();
        assert!(of_a_device.write(0x1000, b"x").is_err());
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0x1000), 0x1000)]).unwrap();
        dma.replace(memory);
        of_a_device.write(0x1000, b"x").unwrap();
        dma.replace(GuestMemory::new());
        assert!(of_a_device.read(0x1000, &mut [0]).is_err());
    }
}
