//! Long arrays of a driver's: the slots of its rings, hundreds of them, each with a packet or a
//! buffer.
//!
//! A walk looks into few elements of an array. Who looks for the owner of one object has its
//! address, and need only find a pointer to it: in the driver's own arrays, where their elements
//! have pointers by type.

use super::limits::{LOWEST, MAX_NESTING};
use super::{Reach, Start};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::FindAllocation;
use crate::guest::btf::{Kind, TypeId};
use crate::guest::phys::GuestPhys;

/// Most bytes of one array that are looked at: 4096 slots of 64 bytes.
const MAX_BYTES: u64 = 1 << 18;
/// Most pointers in one element.
const MAX_POINTERS: usize = 64;
/// Most members that are looked at for them.
const MAX_MEMBERS: usize = 1 << 10;
/// An array of a driver's structures, or of pointers in one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slots {
    /// Its first element.
    pub at: Gva,
    /// Type of an element.
    pub element: TypeId,
    /// Bytes of one.
    pub bytes: u64,
    /// How many there are.
    pub count: u64,
}

/// A pointer in an element.
struct Place {
    offset: u64,
    to: TypeId,
}

impl<M: GuestPhys, A: FindAllocation> Reach<'_, M, A> {
    /// What an element of one of these arrays points at, if that is in `object`; by the pointer's
    /// type.
    pub fn held_in(&self, arrays: &[Slots], object: GvaRange) -> Option<Start> {
        arrays
            .iter()
            .find_map(|slots| self.held_in_one(slots, object))
    }

    fn held_in_one(&self, slots: &Slots, object: GvaRange) -> Option<Start> {
        let mut places = Vec::new();
        let mut members_left = MAX_MEMBERS;
        let all = (&mut places, &mut members_left);
        self.pointers_in(slots.element, 0, MAX_NESTING, all);
        if places.is_empty() || slots.bytes == 0 {
            return None;
        }
        let count = slots.count.min(MAX_BYTES / slots.bytes);
        let bytes = usize::try_from(count * slots.bytes).ok()?;
        let all = self.virt.read_vec(slots.at, bytes).ok()?;
        let elements = all.chunks_exact(usize::try_from(slots.bytes).ok()?);
        for (index, element) in elements.enumerate() {
            for place in &places {
                let at = usize::try_from(place.offset).ok()?;
                let word = element.get(at..).and_then(|rest| rest.first_chunk::<8>());
                let Some(target) = word.map(|word| Gva(u64::from_le_bytes(*word))) else {
                    continue;
                };
                if target >= LOWEST && object.contains(target) {
                    return Some(Start {
                        at: target,
                        type_id: place.to,
                        name: format!("in slot {index} of an array of the driver's"),
                    });
                }
            }
        }
        None
    }

    /// Where an element of this type has pointers to structures.
    fn pointers_in(
        &self,
        id: TypeId,
        offset: u64,
        nesting: usize,
        (places, members_left): (&mut Vec<Place>, &mut usize),
    ) {
        let types = self.types;
        let (Some(nesting), Some(left)) = (nesting.checked_sub(1), members_left.checked_sub(1))
        else {
            return;
        };
        *members_left = left;
        if places.len() >= MAX_POINTERS {
            return;
        }
        match types.resolve(id) {
            Some((_, Kind::Pointer(to))) => {
                if matches!(types.resolve(to), Some((_, Kind::Struct { .. }))) {
                    places.push(Place { offset, to });
                }
            }
            // The kernel's structures inside the driver's hold the kernel's pointers.
            Some((id, Kind::Struct { members, .. } | Kind::Union { members, .. }))
                if self.is_own(id) =>
            {
                for member in members.iter() {
                    if member.bit_size == 0 && member.bit_offset.is_multiple_of(8) {
                        let at = offset.saturating_add(u64::from(member.bit_offset / 8));
                        let all = (&mut *places, &mut *members_left);
                        self.pointers_in(member.type_id, at, nesting, all);
                    }
                }
            }
            _ => {}
        }
    }

    /// Whether an array of this type has slots.
    pub(super) fn has_slots(&self, element: TypeId) -> bool {
        match self.types.resolve(element) {
            Some((_, Kind::Pointer(to))) => {
                matches!(self.types.resolve(to), Some((_, Kind::Struct { .. })))
            }
            Some((id, Kind::Struct { .. } | Kind::Union { .. })) => self.is_own(id),
            _ => false,
        }
    }
}
