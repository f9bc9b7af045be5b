//! Counts of references to the kernel's objects, which inline functions take and give back.

use super::walk::{Item, Walk};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::FindAllocation;
use crate::guest::btf::{Btf, Kind, TypeId};
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::ObjectKind;

/// What counts references.
const COUNT: &str = "refcount_struct";

/// Deepest nesting of structures that counts are looked for in.
const MAX_NESTING: usize = 4;

/// Most pointers of an array that are followed (`TCA_ACT_MAX_PRIO`, include/net/act_api.h).
const MAX_POINTERS: u64 = 32;

/// Where the member `name` of the structure `of` is, from its beginning; `a.b` is member `b` of the
/// structure that is member `a`.
pub(in crate::policy) fn member_range(types: &Btf, of: TypeId, name: &str) -> Option<GvaRange> {
    let (mut offset, mut id) = (0, of);
    for name in name.split('.') {
        let member = types.find_member(types.resolve(id)?.0, name)?;
        offset += u64::from(member.bit_offset / 8);
        id = member.type_id;
    }
    GvaRange::new(Gva(offset), types.size_of(id)?)
}

/// Where the structure `id` has counts of references, from its beginning.
pub(in crate::policy) fn reference_counts(types: &Btf, id: TypeId) -> Vec<GvaRange> {
    let mut found = Vec::new();
    counts(types, id, 0, MAX_NESTING, &mut found);
    found
}

fn counts(types: &Btf, id: TypeId, at: u64, nesting: usize, found: &mut Vec<GvaRange>) {
    let Some(nesting) = nesting.checked_sub(1) else {
        return;
    };
    let Some((id, Kind::Struct { bytes, members } | Kind::Union { bytes, members })) =
        types.resolve(id)
    else {
        return;
    };
    if types.name(id) == COUNT {
        found.extend(GvaRange::new(Gva(at), bytes.into()));
        return;
    }
    for member in members.iter() {
        let offset = at + u64::from(member.bit_offset / 8);
        counts(types, member.type_id, offset, nesting, found);
    }
}

impl<M: GuestPhys, A: FindAllocation> Walk<'_, '_, M, A> {
    /// The members of the kernel's objects that the rules say are written by who has the driver's
    /// structure `id` of this name.
    pub(super) fn written(&mut self, item: &Item, id: TypeId, name: &str) {
        let rules = self.reach.rules.written.iter();
        let members = rules.filter(|rule| rule.of == name);
        for member in members.flat_map(|rule| rule.members) {
            let Some(path) = self.reach.find_path(id, member) else {
                continue;
            };
            let found = path.range(self.reach.types, self.reach.virt, item.at);
            if let Some(range) = found {
                let label = format!("{}->{member}", item.path);
                self.add(range, ObjectKind::Other, path.type_id, &label);
            }
        }
    }

    /// The counts of references in what the rules say of the object at hand.
    pub(super) fn counted(&mut self, item: &Item, id: TypeId, name: &str) {
        let types = self.reach.types;
        let rules = self.reach.rules.counted.iter();
        for rule in rules.filter(|rule| rule.of == name) {
            let member = rule.member;
            let to = self
                .reach
                .member_named(id, member)
                .and_then(|member| types.pointee(member.type_id));
            let (Some(to), Some(at)) = (to, self.member_value(item.at, id, member)) else {
                continue;
            };
            let path = format!("{}->{member}", item.path);
            let Some(count) = rule.count else {
                self.counts_at(Gva(at), to, rule.also, &path);
                continue;
            };
            let count = self.member_value(item.at, id, count).unwrap_or(0);
            let Some(to) = types.pointee(to) else {
                continue;
            };
            for index in 0..count.min(MAX_POINTERS) {
                let object = Gva(at).checked_add(index * 8);
                let object = object.and_then(|at| self.reach.virt.read_u64(at).ok());
                if let Some(object) = object {
                    self.counts_at(Gva(object), to, rule.also, &path);
                }
            }
        }
    }

    /// The counts of the object at `at`, and its members `also`.
    fn counts_at(&mut self, at: Gva, to: TypeId, also: &[&str], path: &str) {
        let types = self.reach.types;
        let Some((id, _)) = types.resolve(to).filter(|_| at.0 != 0) else {
            return;
        };
        let also = also.iter().filter_map(|name| member_range(types, id, name));
        let also: Vec<GvaRange> = also.collect();
        let counts = self.reach.names.reference_counts(types, to);
        for count in counts.iter().copied().chain(also) {
            let first = at.checked_add(count.first().0);
            let range = first.and_then(|first| GvaRange::new(first, count.len_bytes()));
            if let Some(range) = range {
                self.add(range, ObjectKind::Other, to, path);
            }
        }
    }
}
