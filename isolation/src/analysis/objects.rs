//! Members of structures by offset, and structures around structures.

use std::collections::HashMap;

use super::values::Shared;
use crate::guest::btf::{Btf, Kind, TypeId};
use crate::policy::reach::Rules;

/// Most structures in structures.
const MAX_NESTING: usize = 8;
/// Most members that are looked at for what is embedded.
const MAX_MEMBERS: usize = 1 << 18;

/// A module's types, with what can be asked of them often.
#[derive(Debug)]
pub struct Objects<'t> {
    types: &'t Btf,
    /// The one structure of the module that has a structure at an offset.
    around: HashMap<(TypeId, u32), Option<TypeId>>,
    /// The one structure of the module of a size.
    of_size: HashMap<u64, Option<TypeId>>,
}

/// A member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// The innermost structure that it is in, and its offset there.
    pub field: (TypeId, u32),
    /// Its type.
    pub type_id: TypeId,
    /// Bytes from there to the end of the outermost array that it is in, or of itself.
    pub room: u64,
}

impl<'t> Objects<'t> {
    /// Of a module's types.
    pub fn new(types: &'t Btf) -> Self {
        let mut objects = Self {
            types,
            around: HashMap::new(),
            of_size: HashMap::new(),
        };
        if types.base().is_none() {
            return objects;
        }
        let mut left = MAX_MEMBERS;
        for id in types.own_ids() {
            let Some(Kind::Struct { bytes, .. }) = types.kind(id) else {
                continue;
            };
            if types.name(id).is_empty() {
                continue;
            }
            let known = objects.of_size.entry(u64::from(bytes)).or_insert(Some(id));
            if known.is_some_and(|known| known != id) {
                *known = None;
            }
            objects.embedded(id, id, 0, MAX_NESTING, &mut left);
        }
        objects
    }

    fn embedded(&mut self, outer: TypeId, id: TypeId, base: u32, depth: usize, left: &mut usize) {
        let types = self.types;
        let Some((_, Kind::Struct { members, .. } | Kind::Union { members, .. })) =
            types.resolve(id)
        else {
            return;
        };
        let Some(depth) = depth.checked_sub(1) else {
            return;
        };
        for member in members.iter() {
            let Some(rest) = left.checked_sub(1) else {
                return;
            };
            *left = rest;
            let Some(offset) = base.checked_add(member.bit_offset / 8) else {
                return;
            };
            if let Some((inner, Kind::Struct { .. } | Kind::Union { .. })) =
                types.resolve(member.type_id)
            {
                let known = self.around.entry((inner, offset)).or_insert(Some(outer));
                if known.is_some_and(|known| known != outer) {
                    *known = None;
                }
                self.embedded(outer, inner, offset, depth, left);
            }
        }
    }

    /// The types.
    pub fn types(&self) -> &'t Btf {
        self.types
    }

    /// The structure that a pointer type points at.
    pub fn pointed_at(&self, id: TypeId) -> Option<TypeId> {
        let to = self.types.pointee(id)?;
        match self.types.resolve(to)? {
            (id, Kind::Struct { .. } | Kind::Union { .. }) => Some(id),
            _ => None,
        }
    }

    /// The only structure of the module of this size, if it is a large one.
    pub fn of_size(&self, bytes: u64) -> Option<TypeId> {
        self.of_size
            .get(&bytes)
            .copied()
            .flatten()
            .filter(|_| bytes >= 64)
    }

    /// The same address in the structure around it, if it is beyond an end of this one.
    pub fn settle(&self, shared: &Shared, id: TypeId, offset: i64) -> Option<(TypeId, u64)> {
        if let Ok(offset) = u64::try_from(offset) {
            let bytes = self.types.size_of(id)?;
            if offset < bytes {
                return Some((id, offset));
            }
            let area = Rules::linux()
                .private_areas
                .iter()
                .find(|area| area.behind == self.types.name(id))?;
            let inner = shared.private(id)?;
            let offset = offset.checked_sub(bytes.checked_next_multiple_of(area.align)?)?;
            return (offset < self.types.size_of(inner)?).then_some((inner, offset));
        }
        let back = u32::try_from(offset.checked_neg()?).ok()?;
        let outer = self.around.get(&(id, back)).copied().flatten()?;
        Some((outer, 0))
    }

    /// The member at an offset in a structure.
    pub fn member(&self, id: TypeId, offset: u64) -> Option<Member> {
        let (mut inside, mut offset) = (id, offset);
        let mut room = None;
        for _ in 0..MAX_NESTING {
            let (structure, Kind::Struct { members, .. } | Kind::Union { members, .. }) =
                self.types.resolve(inside)?
            else {
                return None;
            };
            let around = members.iter().find_map(|member| {
                let start = u64::from(member.bit_offset / 8);
                let bytes = self.types.size_of(member.type_id)?;
                let within = offset.checked_sub(start).filter(|within| *within < bytes)?;
                Some((member, within, bytes))
            });
            let (member, within, bytes) = around?;
            let (mut type_id, mut within_one) = (member.type_id, within);
            room = room.or(Some(bytes - within));
            if let Some((_, Kind::Array { element, .. })) = self.types.resolve(type_id) {
                let one = self.types.size_of(element).filter(|one| *one > 0)?;
                (type_id, within_one) = (element, within % one);
            }
            let (resolved, kind) = self.types.resolve(type_id)?;
            match kind {
                Kind::Struct { .. } | Kind::Union { .. } => {
                    (inside, offset) = (resolved, within_one)
                }
                _ => {
                    let at = u32::try_from(offset).ok()?;
                    return Some(Member {
                        field: (structure, at),
                        type_id,
                        room: room?,
                    });
                }
            }
        }
        None
    }
}
