//! A field of a kernel structure, as the kernel's types say where it is.

use super::addr::Gva;
use super::btf::{Btf, TypeId};
use super::paging::VirtMemory;
use super::phys::GuestPhys;

/// A field of a kernel structure: offset and size in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Field {
    pub(crate) offset: u64,
    pub(crate) bytes: usize,
}

/// Bits of a structure that are members of their own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bits {
    byte: usize,
    mask: u8,
}

impl Bits {
    /// The member of this name, which lies in one byte.
    pub(crate) fn find(types: &Btf, of: TypeId, name: &str) -> Option<Self> {
        let member = types.find_member(of, name)?;
        let (first, bits) = (member.bit_offset % 8, member.bit_size);
        let fits = (1..=8).contains(&bits) && first + bits <= 8;
        let mask = u8::try_from(((1u32 << bits.min(8)) - 1) << first).ok();
        Some(Self {
            byte: usize::try_from(member.bit_offset / 8).ok()?,
            mask: mask.filter(|_| fits)?,
        })
    }

    /// Whether any of them is set in a structure whose bytes are `object`.
    pub(crate) fn any(self, object: &[u8]) -> Option<bool> {
        object.get(self.byte).map(|byte| byte & self.mask != 0)
    }
}

impl Field {
    pub(crate) fn find(types: &Btf, of: TypeId, name: &str) -> Option<Self> {
        let member = types.find_member(of, name)?;
        let bytes = usize::try_from(types.size_of(member.type_id)?).ok()?;
        let whole = member.bit_size == 0 && member.bit_offset % 8 == 0 && bytes <= 8;
        whole.then_some(Self {
            offset: u64::from(member.bit_offset / 8),
            bytes,
        })
    }

    /// The field of the structure at `at`, as an unsigned number.
    pub(crate) fn read<M: GuestPhys>(self, virt: &VirtMemory<'_, M>, at: Gva) -> Option<u64> {
        let mut word = [0; 8];
        virt.read(at.checked_add(self.offset)?, word.get_mut(..self.bytes)?)
            .ok()?;
        Some(u64::from_le_bytes(word))
    }

    /// The same of a structure whose bytes are `object`.
    pub(crate) fn of(self, object: &[u8]) -> Option<u64> {
        let at = usize::try_from(self.offset).ok()?;
        let bytes = object.get(at..at.checked_add(self.bytes)?)?;
        let mut word = [0; 8];
        word.get_mut(..self.bytes)?.copy_from_slice(bytes);
        Some(u64::from_le_bytes(word))
    }
}
