//! Private data of drivers, behind structures of the kernel's or in them: what type it is.

use super::PrivateArea;
use super::walk::{Extent, Item, Walk};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::FindAllocation;
use crate::guest::btf::{Kind, TypeId};
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::ObjectKind;

/// Most elements of a list that are looked at.
const MAX_LISTED: usize = 64;

impl<M: GuestPhys, A: FindAllocation> Walk<'_, '_, M, A> {
    /// Private data behind a structure.
    pub(super) fn private_area(
        &mut self,
        item: &Item,
        id: TypeId,
        name: &str,
        bytes: u64,
        rest: Option<GvaRange>,
    ) {
        let areas = self.reach.rules.private_areas;
        let Some(rule) = areas.iter().find(|rule| rule.behind == name) else {
            return;
        };
        let Some(area) = private_range(item.at, bytes, rule, rest) else {
            return;
        };
        let path = format!("{}->private", item.path);
        self.add(area, ObjectKind::PrivateArea, id, &path);
        if self.extent == Extent::Near {
            return;
        }
        if let Some(type_id) = self.type_of_private(item.at, id, name, rule, area) {
            self.push(Item {
                at: area.first(),
                type_id,
                path,
                depth: item.depth + 1,
                kind: ObjectKind::PrivateArea,
            });
        }
    }

    /// What the private data in `area` is, behind the structure `id` of this name at `at`.
    fn type_of_private(
        &mut self,
        at: Gva,
        id: TypeId,
        name: &str,
        rule: &PrivateArea,
        area: GvaRange,
    ) -> Option<TypeId> {
        let kept = self.reach.own_too.private;
        if let Some((_, id)) = kept.filter(|(behind, _)| *behind == name) {
            return Some(id);
        }
        // Who made it said how much there is to be; often that is the size of one structure alone.
        if let Some(id) = self.only_one_of_size(at, id, rule) {
            return Some(id);
        }
        // Else it most often points back.
        if let Some(id) = self.structure_that_points_back(area, id, at) {
            return Some(id);
        }
        self.named_own(rule.is)
    }

    /// Private data in the middle of a structure.
    pub(super) fn area_inside(&mut self, item: &Item, name: &str) {
        if self.extent == Extent::Near {
            return;
        }
        let rules = self.reach.rules.inside.iter();
        for rule in rules.filter(|rule| rule.of == name) {
            let types = self.reach.types;
            let holder = self.reach.struct_named(rule.holder);
            let member = holder.and_then(|id| self.reach.member_named(id, rule.member));
            let (Some(member), Some(type_id)) = (member, self.named_own(rule.is)) else {
                continue;
            };
            let at = item.at.checked_add(u64::from(member.bit_offset / 8));
            let fits = types.size_of(type_id) <= types.size_of(member.type_id);
            if let Some(at) = at.filter(|_| fits) {
                self.push(Item {
                    at,
                    type_id,
                    path: format!("{}->{}", item.path, rule.member),
                    depth: item.depth + 1,
                    kind: ObjectKind::PrivateArea,
                });
            }
        }
    }

    /// What the structure `id` of the kernel's is embedded in (`container_of`), if in `all`, what
    /// was handed out with it, only one of the driver's structures can be that has it at this
    /// place.
    pub(super) fn container(&mut self, item: &Item, id: TypeId, all: GvaRange) {
        let types = self.reach.types;
        if self.extent == Extent::Near || types.base().is_none() {
            return;
        }
        let Some(offset) = item.at.0.checked_sub(all.first().0) else {
            return;
        };
        let holders = self.reach.names.holders_of(types, id);
        if let Some(type_id) = holders.only_one(offset, all.len_bytes()) {
            self.push(Item {
                at: all.first(),
                type_id,
                path: format!("container of {}", item.path),
                depth: item.depth + 1,
                kind: ObjectKind::PrivateArea,
            });
        }
    }

    /// What the driver keeps in the network namespace that its structure `id` of this name is in.
    pub(super) fn in_namespace(&mut self, item: &Item, id: TypeId, name: &str) {
        let rules = self.reach.rules.in_namespaces.iter();
        for rule in rules.filter(|rule| rule.of == name) {
            let generic = self.reach.find_path(id, rule.generic);
            let generic = generic.and_then(|path| path.read(self.reach.virt, item.at));
            let number = self.member_value(item.at, id, rule.number);
            let (Some(generic), Some(number)) = (generic, number) else {
                continue;
            };
            let slot = number.checked_mul(8);
            let slot = slot.and_then(|offset| Gva(generic).checked_add(offset));
            let at = slot.and_then(|slot| self.reach.virt.read_u64(slot).ok());
            if let (Some(at), Some(type_id)) = (at, self.named_own(&[rule.is])) {
                self.push(Item {
                    at: Gva(at),
                    type_id,
                    path: format!("{} in its namespace", item.path),
                    depth: item.depth + 1,
                    kind: ObjectKind::PrivateArea,
                });
            }
        }
    }

    /// What is in lists of the driver's structure `id` of this name.
    pub(super) fn listed(&mut self, item: &Item, id: TypeId, name: &str) {
        if self.extent == Extent::Near {
            return;
        }
        for rule in self
            .reach
            .rules
            .listed
            .iter()
            .filter(|rule| rule.of == name)
        {
            let offset = |of: TypeId, name| {
                let member = self.reach.member_named(of, name)?;
                Some(u64::from(member.bit_offset / 8))
            };
            let element = self.named_own(&[rule.element]);
            let link = element.and_then(|id| offset(id, rule.link));
            let head = offset(id, rule.member).and_then(|offset| item.at.checked_add(offset));
            let (Some(type_id), Some(link), Some(head)) = (element, link, head) else {
                continue;
            };
            let mut at = head;
            for _ in 0..MAX_LISTED {
                let next = self.reach.virt.read_u64(at).ok().map(Gva);
                let Some(next) = next.filter(|next| *next != head) else {
                    break;
                };
                let Some(object) = next.checked_sub(link) else {
                    break;
                };
                at = next;
                self.push(Item {
                    at: object,
                    type_id,
                    path: format!("{}->{}[]", item.path, rule.member),
                    depth: item.depth + 1,
                    kind: ObjectKind::Allocated,
                });
            }
        }
    }

    /// The first of the structures with these names that is the driver's.
    pub(super) fn named_own(&self, names: &[&'static str]) -> Option<TypeId> {
        let found = names
            .iter()
            .find_map(|name| self.reach.struct_named(name))?;
        self.reach.is_own(found).then_some(found)
    }

    /// The driver's structure that is as large as the private data of the structure `id` at `at`
    /// was to be, if only one is.
    fn only_one_of_size(&mut self, at: Gva, id: TypeId, rule: &PrivateArea) -> Option<TypeId> {
        let types = self.reach.types;
        types.base()?;
        let path = self.reach.find_path(id, rule.size?)?;
        let mask = match types.size_of(path.type_id)? {
            8 => u64::MAX,
            4 => u64::from(u32::MAX),
            _ => return None,
        };
        let wanted = path.read(self.reach.virt, at)? & mask;
        let mut found = None;
        for id in types.own_ids() {
            let is_it = matches!(types.kind(id), Some(Kind::Struct { bytes, .. })
                if u64::from(bytes) == wanted);
            if is_it && found.replace(id).is_some() {
                return None;
            }
        }
        found
    }

    /// The largest of the driver's structures that fits into `area` and there has a pointer of type
    /// `of *` that points at `at`.
    pub(super) fn structure_that_points_back(
        &mut self,
        area: GvaRange,
        of: TypeId,
        at: Gva,
    ) -> Option<TypeId> {
        let types = self.reach.types;
        types.base()?;
        let pointing = self.reach.names.pointing_at(types, of);
        let too_large = pointing.partition_point(|own| own.bytes > area.len_bytes());
        for own in pointing.iter().skip(too_large) {
            self.members_left = self.members_left.checked_sub(own.pointers.len())?;
            let mut pointers = own.pointers.iter();
            if pointers.any(|member| self.word_at(area.first(), member) == Some(at.0)) {
                return Some(own.id);
            }
        }
        None
    }
}

/// The private data behind the structure of `bytes` bytes at `at`: to the end of the allocation.
fn private_range(
    at: Gva,
    bytes: u64,
    rule: &PrivateArea,
    rest: Option<GvaRange>,
) -> Option<GvaRange> {
    let end = at.checked_add(bytes)?;
    let first = Gva(end.checked_add(rule.align - 1)?.0 & !(rule.align - 1));
    GvaRange::inclusive(first, rest?.last())
}
