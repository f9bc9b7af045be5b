//! Data of the processor that a call runs on.

use super::limits::LOWEST;
use super::members::Trail;
use super::walk::{Extent, Item, Walk};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{AllocationKind, FindAllocation};
use crate::guest::btf::TypeId;
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::ObjectKind;

impl<M: GuestPhys, A: FindAllocation> Walk<'_, '_, M, A> {
    /// Data of the current processor that the rules know of.
    pub(super) fn per_cpu(&mut self, item: &Item, id: TypeId, name: &str) {
        let types = self.reach.types;
        let wanted = self.reach.per_cpu_base;
        let Some(base) = wanted.filter(|_| self.extent == Extent::All) else {
            return;
        };
        for rule in
            self.reach.rules.per_cpu.iter().filter(|rule| {
                rule.of == name && (rule.from_const || !types.is_const(item.type_id))
            })
        {
            let members = rule
                .members
                .iter()
                .filter_map(|name| Some((*name, self.reach.find_path(id, name)?)));
            let sized = members.filter_map(|(name, path)| {
                let to = types.pointee(path.type_id)?;
                Some((types.size_of(to)?, name, path, to))
            });
            let Some((bytes, member, path, to)) = sized.max_by_key(|(bytes, ..)| *bytes) else {
                continue;
            };
            let pointer = path.read(self.reach.virt, item.at);
            let Some(pointer) = pointer.filter(|pointer| *pointer != 0) else {
                continue;
            };
            if let Some(range) = GvaRange::new(Gva(base.wrapping_add(pointer)), bytes) {
                let path = format!("{}->{member}", item.path);
                self.add(range, ObjectKind::Other, to, &path);
            }
        }
    }

    /// Data of the current processor that was handed out to the driver (`alloc_percpu`), if
    /// `pointer`, which the driver has, is a per-CPU address.
    pub(super) fn per_cpu_data(&mut self, pointer: u64, to: TypeId, trail: Trail<'_>) {
        let reach = self.reach;
        let (Some(base), Some(first)) = (reach.per_cpu_base, reach.per_cpu_handed_out) else {
            return;
        };
        if !(first..LOWEST.0).contains(&pointer) {
            return;
        }
        let at = Gva(base.wrapping_add(pointer));
        let one = reach.types.size_of(to);
        let one = one.and_then(|bytes| GvaRange::new(at, bytes));
        let all = self.allocation(at);
        let all = all.filter(|all| all.kind == AllocationKind::PerCpu);
        let rest = all.and_then(|all| GvaRange::inclusive(at, all.range.last()));
        let range = rest.or(one);
        if let Some(range) = range.filter(|range| range.first() >= LOWEST) {
            self.add(range, ObjectKind::Other, to, &trail.to_string());
        }
    }
}
