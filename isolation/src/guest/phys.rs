//! Reading guest physical memory.

use std::sync::atomic::Ordering;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Physical addresses that are not backed by memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest physical address {:#x} (+{len} bytes) is not in guest memory", .at.0)]
pub struct OutsideMemory {
    /// First byte asked for.
    pub at: GuestAddress,
    /// Bytes asked for.
    pub len: usize,
}

/// Something that holds bytes at guest physical addresses: the guest's RAM, a private view of it,
/// or RAM together with a monitor area.
pub trait GuestPhys {
    /// Fills `data` from `at`. On an error `data` may be partly filled.
    fn read(&self, at: GuestAddress, data: &mut [u8]) -> Result<(), OutsideMemory>;

    /// The little-endian 64-bit word at `at`.
    fn read_u64(&self, at: GuestAddress) -> Result<u64, OutsideMemory> {
        let mut word = [0; 8];
        self.read(at, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }
}

impl<B: Bitmap + 'static> GuestPhys for GuestMemoryMmap<B> {
    fn read(&self, at: GuestAddress, data: &mut [u8]) -> Result<(), OutsideMemory> {
        let len = data.len();
        self.read_slice(data, at)
            .map_err(|_| OutsideMemory { at, len })
    }

    fn read_u64(&self, at: GuestAddress) -> Result<u64, OutsideMemory> {
        let outside = OutsideMemory { at, len: 8 };
        if !at.0.is_multiple_of(8) {
            let mut word = [0; 8];
            GuestPhys::read(self, at, &mut word)?;
            return Ok(u64::from_le_bytes(word));
        }
        // One access, as a processor reads an entry of a table. A walk is little else, so that the
        // region is asked: the memory as a whole would make an iterator for each word.
        let (region, offset) = self.to_region_addr(at).ok_or(outside)?;
        let word = region.load::<u64>(offset, Ordering::Relaxed);
        word.map(u64::from_le).map_err(|_| outside)
    }
}

impl<T: GuestPhys + ?Sized> GuestPhys for &T {
    fn read(&self, at: GuestAddress, data: &mut [u8]) -> Result<(), OutsideMemory> {
        (**self).read(at, data)
    }

    fn read_u64(&self, at: GuestAddress) -> Result<u64, OutsideMemory> {
        (**self).read_u64(at)
    }
}
