//! The memory that a client has given: what the function's [`DmaSpace`] reaches. Whoever listens to
//! that has heard of a change before the client is answered.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::dma::{DmaRegion, DmaSpace, ForeignRegion, GuestMemory};
use crate::vfio_user::message::{DmaMap, DmaUnmap, MAP_READ, MAP_WRITE, UNMAP_ALL};

/// Most mappings of a client.
pub const MAX_MAPS: usize = 512;
/// Most bytes that a client maps: address space of this process, not memory.
const MAX_BYTES: u64 = 1 << 40;
const PAGE: u64 = 4096;

/// See the module.
pub struct Maps {
    dma: DmaSpace,
    /// In the order of their addresses.
    regions: Vec<ForeignRegion>,
}

impl Maps {
    pub fn new(dma: DmaSpace) -> Self {
        Self {
            dma,
            regions: Vec::new(),
        }
    }

    /// Maps what the client says, or gives `errno`.
    pub fn map(&mut self, map: &DmaMap, fds: Vec<OwnedFd>) -> Result<(), i32> {
        let Ok([file]) = <[OwnedFd; 1]>::try_from(fds) else {
            // Without a descriptor it would have to be asked for each byte.
            return Err(libc::EOPNOTSUPP);
        };
        if map.flags != MAP_READ | MAP_WRITE {
            return Err(libc::EOPNOTSUPP);
        }
        let places = [map.address, map.size, map.offset];
        let end = map.address.checked_add(map.size);
        let aligned = places.iter().all(|place| place.is_multiple_of(PAGE));
        let (true, true, Some(end)) = (aligned, map.size > 0, end) else {
            return Err(libc::EINVAL);
        };
        let ranges = || self.regions.iter().map(ForeignRegion::range);
        if ranges().any(|(start, len)| map.address < start + len && start < end) {
            return Err(libc::EEXIST);
        }
        let total: u64 = ranges().map(|(_, len)| len).sum();
        if self.regions.len() >= MAX_MAPS || map.size > MAX_BYTES.saturating_sub(total) {
            return Err(libc::ENOSPC);
        }
        let region = ForeignRegion::new(DmaRegion {
            address: map.address,
            len: map.size,
            file: Arc::new(File::from(file)),
            offset: map.offset,
        });
        let region = region.map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL))?;
        let place = self
            .regions
            .partition_point(|one| one.range().0 < map.address);
        self.regions.insert(place, region);
        self.show();
        Ok(())
    }

    /// Takes a mapping away, or all of them, or gives `errno`.
    pub fn unmap(&mut self, unmap: &DmaUnmap) -> Result<(), i32> {
        let range = (unmap.address, unmap.size);
        match unmap.flags {
            UNMAP_ALL if range == (0, 0) => self.regions.clear(),
            0 => {
                let mut regions = self.regions.iter();
                let found = regions.position(|region| region.range() == range);
                self.regions.remove(found.ok_or(libc::ENOENT)?);
            }
            _ => return Err(libc::EINVAL),
        }
        self.show();
        Ok(())
    }

    /// Takes all away.
    pub fn clear(&mut self) {
        self.regions.clear();
        self.dma.replace(GuestMemory::new());
    }

    /// Whether a file was found to be shorter than it was.
    pub fn have_shrunk(&self) -> bool {
        self.regions.iter().any(ForeignRegion::has_shrunk)
    }

    fn show(&self) {
        self.dma.replace(ForeignRegion::memory(self.regions.iter()));
    }
}
