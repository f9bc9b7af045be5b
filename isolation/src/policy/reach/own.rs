//! Which of a module's own structures have a pointer to another one, or hold it.

use crate::guest::btf::{Btf, Kind, Member, TypeId};

/// Deepest nesting of structures that a member is looked for in.
const MAX_NESTING: usize = 4;

/// Most members that one question looks at.
const MAX_MEMBERS: usize = 1 << 16;

/// A structure of the module's with pointers to the one that was asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    pub id: TypeId,
    /// Size of the structure.
    pub bytes: u64,
    /// The pointers.
    pub pointers: Vec<Member>,
}

/// A structure of the module's that holds the one that was asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Containing {
    pub id: TypeId,
    /// Size of the structure.
    pub bytes: u64,
}

/// The module's structures that have a pointer of type `of *`, in order.
pub(super) fn pointing_at(types: &Btf, of: TypeId) -> Vec<Candidate> {
    let mut members_left = MAX_MEMBERS;
    let mut found = Vec::new();
    for id in types.own_ids() {
        let Some(Kind::Struct { bytes, members }) = types.kind(id) else {
            continue;
        };
        let Some(left) = members_left.checked_sub(members.len()) else {
            return found;
        };
        members_left = left;
        let points_at_it = |member: &Member| {
            let to = types.pointee(member.type_id);
            let to = to.and_then(|to| types.resolve(to));
            to.is_some_and(|(to, _)| to == of)
        };
        let pointers: Vec<Member> = members.iter().filter(points_at_it).collect();
        if !pointers.is_empty() {
            found.push(Candidate {
                id,
                bytes: bytes.into(),
                pointers,
            });
        }
    }
    found
}

/// The module's structures that have the structure `id` as a member at `offset`, in order.
pub(super) fn holders_of(types: &Btf, id: TypeId, offset: u64) -> Vec<Containing> {
    let mut members_left = MAX_MEMBERS;
    let mut found = Vec::new();
    for own in types.own_ids() {
        let Some(Kind::Struct { bytes, .. }) = types.kind(own) else {
            continue;
        };
        if has_at(types, own, offset, id, (MAX_NESTING, &mut members_left)) {
            found.push(Containing {
                id: own,
                bytes: bytes.into(),
            });
        }
    }
    found
}

/// Whether the structure `of` has the structure `id` as a member at `offset`.
fn has_at(
    types: &Btf,
    of: TypeId,
    offset: u64,
    id: TypeId,
    (nesting, members_left): (usize, &mut usize),
) -> bool {
    let (Some(nesting), Some((_, Kind::Struct { members, .. }))) =
        (nesting.checked_sub(1), types.resolve(of))
    else {
        return false;
    };
    for member in members.iter() {
        let Some(left) = members_left.checked_sub(1) else {
            return false;
        };
        *members_left = left;
        let at = u64::from(member.bit_offset / 8);
        let bytes = types.size_of(member.type_id).unwrap_or(0);
        let Some(inside) = offset.checked_sub(at).filter(|inside| *inside < bytes) else {
            continue;
        };
        let is = types
            .resolve(member.type_id)
            .is_some_and(|(is, _)| is == id);
        let left = (nesting, &mut *members_left);
        if is && inside == 0 || has_at(types, member.type_id, inside, id, left) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::guest::btf::encode::Encoder;

    #[test]
    fn structures_are_found_by_their_pointers_and_by_what_they_hold() {
        let mut e = Encoder::new(None);
        let long = e.int("unsigned long", 8, 0);
        let work = e.structure("work_struct", 16, &[("func", long, 0)]);
        let device = e.structure("net_device", 64, &[("mtu", long, 0)]);
        let base = Arc::new(Btf::parse(&e.bytes(), None).unwrap());
        let mut e = Encoder::new(Some(&base));
        let to_device = e.pointer(device);
        let to_work = e.pointer(work);
        let inner = e.structure("inner", 32, &[("work", work, 8)]);
        let outer = e.structure(
            "outer",
            96,
            &[
                ("dev", to_device, 0),
                ("inner", inner, 32),
                ("peer", to_device, 64),
            ],
        );
        let other = e.structure("other", 24, &[("work", to_work, 0), ("dev", to_device, 8)]);
        let types = Btf::parse(&e.bytes(), Some(base)).unwrap();

        let pointing = pointing_at(&types, device);
        let found: Vec<_> = pointing.iter().map(|own| (own.id, own.bytes)).collect();
        assert_eq!(found, [(outer, 96), (other, 24)]);
        let offsets = |at: usize| -> Vec<u32> {
            let pointers = pointing[at].pointers.iter();
            pointers.map(|member| member.bit_offset / 8).collect()
        };
        assert_eq!((offsets(0), offsets(1)), (vec![0, 64], vec![8]));
        assert!(pointing_at(&types, long).is_empty());

        let holders = |offset| -> Vec<TypeId> {
            let found = holders_of(&types, work, offset);
            found.iter().map(|own| own.id).collect()
        };
        assert_eq!((holders(8), holders(40)), (vec![inner], vec![outer]));
        assert!(holders(0).is_empty() && holders(9).is_empty());
        assert!(
            holders_of(&types, device, 0).is_empty(),
            "pointers hold nothing"
        );
    }
}
