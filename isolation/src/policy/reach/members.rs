//! The pointers in a driver's own structures, which are followed by their types.

use std::fmt;

use super::limits::{MAX_ELEMENTS, MAX_NESTING};
use super::walk::{Extent, Item, Walk};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::FindAllocation;
use crate::guest::btf::{Btf, Kind, TypeId};
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::ObjectKind;

/// Most elements of an array at the end of a structure whose length its allocation says
/// (`struct tc_u_hnode`).
const MAX_FLEXIBLE: u64 = 64;

/// How a pointer was come to, for reports. Most of what is looked at is nothing, so that this is
/// written out only for what is kept.
#[derive(Clone, Copy)]
pub(super) enum Trail<'a> {
    Object(&'a str),
    Member(&'a Trail<'a>, &'a Btf, u32),
    Element(&'a Trail<'a>, u64),
}

impl fmt::Display for Trail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Object(path) => f.write_str(path),
            Self::Member(before, types, name_at) => {
                write!(f, "{before}->{}", types.string(*name_at))
            }
            Self::Element(before, index) => write!(f, "{before}[{index}]"),
        }
    }
}

impl<M: GuestPhys, A: FindAllocation> Walk<'_, '_, M, A> {
    /// Follows the pointers in the first elements of an array of a driver's structures.
    pub(super) fn follow_elements(&mut self, item: &Item, id: TypeId, bytes: u64, range: GvaRange) {
        if self.extent == Extent::Near {
            return;
        }
        let count = range.len_bytes().checked_div(bytes).unwrap_or(0);
        self.note_slots(item.at, id, (bytes, count));
        let count = if count > MAX_ELEMENTS { 1 } else { count };
        for element in 0..count {
            let Some(at) = item.at.checked_add(element * bytes) else {
                return;
            };
            let object = Trail::Object(&item.path);
            let trail = match element {
                0 => object,
                n => Trail::Element(&object, n),
            };
            self.follow_members(item, id, at, trail, MAX_NESTING);
        }
    }

    pub(super) fn follow_members(
        &mut self,
        item: &Item,
        id: TypeId,
        at: Gva,
        trail: Trail<'_>,
        nesting: usize,
    ) {
        let types = self.reach.types;
        let Some(nesting) = nesting.checked_sub(1) else {
            return;
        };
        for member in &*self.reach.leading_members(id) {
            let Some(here) = at.checked_add(u64::from(member.bit_offset / 8)) else {
                return;
            };
            let trail = match types.is_string(member.name_at, "") {
                true => trail,
                false => Trail::Member(&trail, types, member.name_at),
            };
            self.follow(item, member.type_id, here, trail, nesting);
        }
    }

    /// Follows what is in a driver's structure at `at`: a pointer, an array of them, or a structure
    /// of the driver's.
    pub(super) fn follow(
        &mut self,
        item: &Item,
        type_id: TypeId,
        at: Gva,
        trail: Trail<'_>,
        nesting: usize,
    ) {
        let types = self.reach.types;
        let Some(left) = self.members_left.checked_sub(1) else {
            return;
        };
        self.members_left = left;
        match types.resolve(type_id) {
            Some((_, Kind::Pointer(to))) => self.follow_pointer(item, to, at, trail),
            Some((_, Kind::Array { element, count })) => {
                self.follow_array(item, (element, count), at, trail, nesting);
            }
            Some((id, Kind::Struct { .. } | Kind::Union { .. })) if self.reach.is_own(id) => {
                self.follow_members(item, id, at, trail, nesting);
            }
            // The kernel's structures inside the driver's hold the kernel's pointers.
            Some((id, Kind::Struct { .. })) => self.look_at_embedded(item, id, at, trail),
            _ => {}
        }
    }

    /// Goes on with what the pointer at `at` points at.
    fn follow_pointer(&mut self, item: &Item, to: TypeId, at: Gva, trail: Trail<'_>) {
        let types = self.reach.types;
        let is_code = matches!(types.resolve(to), Some((_, Kind::FunctionType { .. })));
        let target = (!is_code).then(|| self.read_word(at)).flatten();
        if let Some(target) = target {
            self.per_cpu_data(target, to, trail);
            let depth = item.depth + 1;
            if self.is_wanted(Gva(target), to, depth) {
                self.queue.push_back(Item {
                    at: Gva(target),
                    type_id: to,
                    path: trail.to_string(),
                    depth,
                    kind: ObjectKind::Allocated,
                });
            }
        }
    }

    /// Follows the first elements of an array, all of which are of a type.
    fn follow_array(
        &mut self,
        item: &Item,
        (element, count): (TypeId, u32),
        at: Gva,
        trail: Trail<'_>,
        nesting: usize,
    ) {
        let types = self.reach.types;
        let Some(bytes) = types.size_of(element) else {
            return;
        };
        let Some(nesting) = nesting.checked_sub(1) else {
            return;
        };
        // The last member of a structure may go on to the end of what was allocated.
        let count = match count {
            0 => self.elements_behind(at, bytes),
            count => {
                self.note_slots(at, element, (bytes, count.into()));
                u64::from(count).min(MAX_ELEMENTS)
            }
        };
        for index in 0..count {
            let offset = index.checked_mul(bytes);
            let Some(here) = offset.and_then(|offset| at.checked_add(offset)) else {
                return;
            };
            self.follow(item, element, here, Trail::Element(&trail, index), nesting);
        }
    }

    /// Looks at a structure of the kernel's inside one of the driver's.
    fn look_at_embedded(&mut self, item: &Item, id: TypeId, at: Gva, trail: Trail<'_>) {
        let types = self.reach.types;
        let name = types.name(id);
        let rules = self.reach.rules;
        let is_followed = rules.followed.iter().any(|rule| rule.of == name);
        let is_counted = rules.counted.iter().any(|rule| rule.of == name);
        let is_tag_set = rules.tag_sets.iter().any(|rule| rule.of == name);
        if is_followed
            || is_counted
            || is_tag_set
            || rules.per_cpu.iter().any(|rule| rule.of == name)
        {
            let embedded = Item {
                at,
                type_id: id,
                path: trail.to_string(),
                depth: item.depth,
                kind: item.kind,
            };
            self.followed(&embedded, id, name);
            self.per_cpu(&embedded, id, name);
            self.counted(&embedded, id, name);
            self.tag_set(&embedded, id, name);
        }
        self.arrays.extend(self.reach.array(at, id));
        if self.reach.rules.queues.contains(&name) {
            self.queues.push(at);
        }
    }

    /// How many elements of as many `bytes` there are from `at` on to the end of what was
    /// allocated.
    pub(super) fn elements_behind(&self, at: Gva, bytes: u64) -> u64 {
        let rest = self.rest(at).filter(|_| !self.on_stack(at));
        let count = rest.and_then(|rest| rest.len_bytes().checked_div(bytes));
        count.unwrap_or(0).min(MAX_FLEXIBLE)
    }
}
