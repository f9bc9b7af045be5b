//! Reading guest physical memory.

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

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
}

impl<T: GuestPhys + ?Sized> GuestPhys for &T {
    fn read(&self, at: GuestAddress, data: &mut [u8]) -> Result<(), OutsideMemory> {
        (**self).read(at, data)
    }
}
