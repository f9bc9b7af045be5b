//! Reading guest memory at virtual addresses.

use super::{AddressSpace, WalkError};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::phys::{GuestPhys, OutsideMemory};

/// Why bytes at a virtual address could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VirtError {
    /// Not mapped.
    #[error("guest address {at}: {source}")]
    Walk {
        /// The first address that could not be translated.
        at: Gva,
        /// Why not.
        source: WalkError,
    },
    /// Mapped, but not to memory.
    #[error("guest address {at}: {source}")]
    Memory {
        /// The first address that is not memory.
        at: Gva,
        /// Where it leads.
        source: OutsideMemory,
    },
    /// The range runs past the end of the address space.
    #[error("guest address {at} (+{len} bytes) runs past the address space")]
    Wraps {
        /// First byte.
        at: Gva,
        /// Bytes asked for.
        len: usize,
    },
}

/// Guest memory as code of one address space sees it.
#[derive(Debug)]
pub struct VirtMemory<'a, M> {
    /// The address space.
    pub space: AddressSpace,
    /// Where its tables and pages are.
    pub memory: &'a M,
}

// Derived ones would ask the same of `M`.
impl<M> Clone for VirtMemory<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for VirtMemory<'_, M> {}

impl<M: GuestPhys> VirtMemory<'_, M> {
    /// Fills `data` from `at`, page by page. On an error `data` may be partly filled.
    pub fn read(&self, at: Gva, data: &mut [u8]) -> Result<(), VirtError> {
        let len = data.len();
        if len == 0 {
            return Ok(());
        }
        let range = GvaRange::new(at, len as u64).ok_or(VirtError::Wraps { at, len })?;
        let mut rest = data;
        for page in range.pages() {
            let at = page.max(range.first());
            let in_page = 0x1000 - (at.0 & 0xfff) as usize;
            let (part, later) = rest.split_at_mut(in_page.min(rest.len()));
            rest = later;
            let found = self
                .space
                .walk(self.memory, at)
                .map_err(|source| VirtError::Walk { at, source })?;
            self.memory
                .read(found.gpa, part)
                .map_err(|source| VirtError::Memory { at, source })?;
        }
        Ok(())
    }

    /// `len` bytes from `at`. The caller bounds `len`.
    pub fn read_vec(&self, at: Gva, len: usize) -> Result<Vec<u8>, VirtError> {
        let mut data = vec![0; len];
        self.read(at, &mut data)?;
        Ok(data)
    }

    /// The little-endian 64-bit word at `at`.
    pub fn read_u64(&self, at: Gva) -> Result<u64, VirtError> {
        if at.0.is_multiple_of(8) {
            let source = |source| VirtError::Walk { at, source };
            let found = self.space.walk(self.memory, at).map_err(source)?;
            let source = |source| VirtError::Memory { at, source };
            return self.memory.read_u64(found.gpa).map_err(source);
        }
        let mut word = [0; 8];
        self.read(at, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }
}
