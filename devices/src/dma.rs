//! Guest memory as a bus-mastering device sees it.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Why a device could not reach guest memory.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("DMA of {len} bytes at guest physical address {address:#x} is outside guest memory")]
pub struct DmaError {
    /// Guest physical address of the first byte.
    pub address: u64,
    /// Length in bytes.
    pub len: usize,
}

/// The guest physical memory that one device may read and write.
#[derive(Debug, Clone)]
pub struct DmaSpace {
    memory: Arc<GuestMemoryMmap>,
}

impl DmaSpace {
    /// A space that reaches all of `memory`.
    pub fn new(memory: Arc<GuestMemoryMmap>) -> Self {
        Self { memory }
    }

    /// The memory behind the space, for libraries that walk it themselves (`virtio-queue`).
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Fills `data` from guest physical `address`. On an error `data` may be partly filled.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let len = data.len();
        self.memory
            .read_slice(data, GuestAddress(address))
            .map_err(|_| DmaError { address, len })
    }

    /// Writes `data` to guest physical `address`. On an error a prefix may have been written.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        self.memory
            .write_slice(data, GuestAddress(address))
            .map_err(|_| DmaError {
                address,
                len: data.len(),
            })
    }
}
