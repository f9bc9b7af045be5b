//! Which members of a driver's structure lead anywhere: most are numbers, and are not looked at
//! each time.

use std::sync::Arc;

use super::Reach;
use super::limits::MAX_NESTING;
use crate::guest::addr::Gva;
use crate::guest::allocations::FindAllocation;
use crate::guest::btf::{Kind, Member, TypeId};
use crate::guest::phys::GuestPhys;

/// Most types that are looked at for one structure. Where there are more, what is left counts as
/// leading somewhere.
const MAX_TYPES: usize = 1 << 16;

impl<M: GuestPhys, A: FindAllocation> Reach<'_, M, A> {
    /// The members of the driver's structure `id` that have a pointer in them, or what the rules
    /// know of.
    pub(super) fn leading_members(&self, id: TypeId) -> Arc<[Member]> {
        self.names.leading_members(id, || {
            let Some((_, Kind::Struct { members, .. } | Kind::Union { members, .. })) =
                self.types.resolve(id)
            else {
                return Vec::new();
            };
            let mut types_left = MAX_TYPES;
            let mut leads = |member: &Member| {
                let is_whole = member.bit_size == 0 && member.bit_offset.is_multiple_of(8);
                is_whole && self.leads(member.type_id, MAX_NESTING, &mut types_left)
            };
            members.iter().filter(|member| leads(member)).collect()
        })
    }

    /// Whether something of this type leads anywhere. What is nested deeper than is followed does
    /// not.
    fn leads(&self, id: TypeId, nesting: usize, types_left: &mut usize) -> bool {
        let types = self.types;
        let Some(left) = types_left.checked_sub(1) else {
            return true;
        };
        *types_left = left;
        let Some(nesting) = nesting.checked_sub(1) else {
            return false;
        };
        match types.resolve(id) {
            Some((_, Kind::Pointer(to))) => {
                !matches!(types.resolve(to), Some((_, Kind::FunctionType { .. })))
            }
            Some((_, Kind::Array { element, .. })) => self.leads(element, nesting, types_left),
            Some((id, Kind::Struct { members, .. } | Kind::Union { members, .. }))
                if self.is_own(id) =>
            {
                let mut members = members.iter();
                members.any(|member| self.leads(member.type_id, nesting, types_left))
            }
            Some((id, Kind::Struct { .. })) => self.rules_know(id),
            _ => false,
        }
    }

    /// Whether a rule is about the kernel's structure `id` where it is in one of the driver's.
    fn rules_know(&self, id: TypeId) -> bool {
        let (name, rules) = (self.types.name(id), self.rules);
        rules.followed.iter().any(|rule| rule.of == name)
            || rules.counted.iter().any(|rule| rule.of == name)
            || rules.per_cpu.iter().any(|rule| rule.of == name)
            || rules.queues.contains(&name)
            || rules.tag_sets.iter().any(|rule| rule.of == name)
            || self.array(Gva(0), id).is_some()
    }
}
