//! Which of a module's own structures have a pointer to another one, or hold it.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use crate::guest::btf::{Btf, Kind, Member, TypeId};

/// Deepest nesting of structures that a member is looked for in.
const MAX_NESTING: usize = 4;

/// Most places of one structure in others that are looked for and kept: types, which may be made
/// up, nest a few structures into ever so many places.
const MAX_PLACES: usize = 1 << 14;

/// A structure of the module's with pointers to the one that was asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    pub id: TypeId,
    /// Size of the structure.
    pub bytes: u64,
    /// The pointers.
    pub pointers: Vec<Member>,
}

/// Where the module's structures hold one structure: by place, and the smallest holder of each
/// place first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Holders(Vec<(u64, u64, TypeId)>);

impl Holders {
    /// The only one of those that have it at `offset` (in bytes) that is no larger than `room`
    /// bytes.
    pub(super) fn only_one(&self, offset: u64, room: u64) -> Option<TypeId> {
        let from = self.0.partition_point(|(at, ..)| *at < offset);
        let there = self.0.iter().skip(from);
        let mut fitting = there.take_while(|(at, bytes, _)| *at == offset && *bytes <= room);
        let (.., id) = fitting.next()?;
        fitting.next().is_none().then_some(*id)
    }

    /// Whether one has it at `offset` (in bytes) for which an allocator may well have handed out
    /// `room` bytes: it takes more than half of them.
    pub(super) fn may_be_one(&self, offset: u64, room: u64) -> bool {
        let from = self.0.partition_point(|(at, ..)| *at < offset);
        let mut there = self
            .0
            .iter()
            .skip(from)
            .take_while(|(at, ..)| *at == offset);
        there.any(|(_, bytes, _)| *bytes <= room && bytes.saturating_mul(2) > room)
    }
}

/// The module's structures that have a pointer of type `of *`, the largest first, those of one size
/// in order.
pub(super) fn pointing_at(types: &Btf, of: TypeId) -> Vec<Candidate> {
    let mut found = Vec::new();
    for id in types.own_ids() {
        let Some(Kind::Struct { bytes, members }) = types.kind(id) else {
            continue;
        };
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
    found.sort_by_key(|own| Reverse(own.bytes));
    found
}

/// Where the module's structures have the structure `id` as a member. Each structure is looked at
/// once for each depth. If there are more than [`MAX_PLACES`] nothing is said of any of them: who
/// has not seen all does not know of one that it is the only one.
pub(super) fn holders_of(types: &Btf, id: TypeId) -> Holders {
    let mut search = Places {
        types,
        id,
        known: HashMap::new(),
        left: MAX_PLACES,
    };
    let mut found = Vec::new();
    for own in types.own_ids() {
        let Some(Kind::Struct { bytes, .. }) = types.kind(own) else {
            continue;
        };
        let Some(places) = search.of(own, MAX_NESTING) else {
            tracing::debug!("too many structures of a module hold {}", types.name(id));
            return Holders::default();
        };
        found.extend(places.iter().map(|at| (*at, u64::from(bytes), own)));
        if found.len() > MAX_PLACES {
            return Holders::default();
        }
    }
    found.sort_unstable();
    Holders(found)
}

/// Looks for the places of the structure `id`.
struct Places<'a> {
    types: &'a Btf,
    id: TypeId,
    /// Those in each structure that was looked into, by how deep it may go there: sorted, no
    /// duplicates.
    known: HashMap<(TypeId, usize), Arc<[u64]>>,
    /// How many more may be found.
    left: usize,
}

impl Places<'_> {
    /// The places in the structure `of`; `None` if there are too many.
    fn of(&mut self, of: TypeId, nesting: usize) -> Option<Arc<[u64]>> {
        let Some((of, Kind::Struct { members, .. })) = self.types.resolve(of) else {
            return Some(Arc::default());
        };
        let Some(deeper) = nesting.checked_sub(1) else {
            return Some(Arc::default());
        };
        if let Some(known) = self.known.get(&(of, nesting)) {
            return Some(known.clone());
        }
        let mut found = Vec::new();
        for member in members.iter() {
            let at = u64::from(member.bit_offset / 8);
            let bytes = self.types.size_of(member.type_id).unwrap_or(0);
            if bytes == 0 {
                continue;
            }
            let is = self.types.resolve(member.type_id);
            let is = is.is_some_and(|(is, _)| is == self.id);
            let before = found.len();
            found.extend(is.then_some(at));
            let inside = self.of(member.type_id, deeper)?;
            let inside = inside.iter().take_while(|inside| **inside < bytes);
            found.extend(inside.map(|inside| at.saturating_add(*inside)));
            self.left = self.left.checked_sub(found.len() - before)?;
        }
        found.sort_unstable();
        found.dedup();
        let found: Arc<[u64]> = found.into();
        self.known.insert((of, nesting), found.clone());
        Some(found)
    }
}

#[cfg(test)]
mod tests {
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

        let holders = holders_of(&types, work);
        assert_eq!(holders.only_one(8, 32), Some(inner));
        assert_eq!(holders.only_one(40, u64::MAX), Some(outer));
        assert_eq!(
            (holders.only_one(8, 31), holders.only_one(40, 95)),
            (None, None)
        );
        assert!(
            [0, 9, u64::MAX]
                .into_iter()
                .all(|offset| holders.only_one(offset, u64::MAX).is_none())
        );
        assert_eq!(
            holders_of(&types, device),
            Holders::default(),
            "pointers hold nothing"
        );
    }

    /// Of two that have it there the larger one is no answer where the smaller one fits, too.
    #[test]
    fn two_that_fit_are_no_answer() {
        let (base, work) = base();
        let mut e = Encoder::new(Some(&base));
        let large = e.structure("large", 96, &[("work", work, 8)]);
        let small = e.structure("small", 32, &[("work", work, 8), ("other", work, 8)]);
        let types = Btf::parse(&e.bytes(), Some(base)).unwrap();
        let holders = holders_of(&types, work);
        assert!(large < small, "they are not in order of size");
        assert_eq!(holders.only_one(8, 95), Some(small));
        assert_eq!(holders.only_one(8, 96), None);
    }

    #[test]
    fn of_all_members_that_a_module_may_have_none_is_left_out() {
        let (base, work) = base();
        let mut e = Encoder::new(Some(&base));
        let long = e.int("long", 8, 0);
        let to_work = e.pointer(work);
        // One with as many members as there can be, and behind it two that are asked about.
        let names: Vec<String> = (0..u16::MAX).map(|index| format!("m{index}")).collect();
        let members = names
            .iter()
            .zip(0..)
            .map(|(name, at)| (name.as_str(), long, at * 8));
        e.structure(
            "full",
            8 * u32::from(u16::MAX),
            &members.collect::<Vec<_>>(),
        );
        let members = [("work", work, 8), ("to", to_work, 24)];
        let holders: Vec<TypeId> = ["one", "two"]
            .map(|name| e.structure(name, 32, &members))
            .into();
        let types = Btf::parse(&e.bytes(), Some(base)).unwrap();
        assert_eq!(holders_of(&types, work).0.len(), 2);
        assert_eq!(holders_of(&types, work).only_one(8, 32), None);
        let pointing = pointing_at(&types, work);
        let found: Vec<_> = pointing.iter().map(|own| own.id).collect();
        assert_eq!(found, holders);
    }

    /// Each holds the one before forty times: two and a half million places.
    #[test]
    fn of_a_structure_that_is_in_ever_so_many_places_nothing_is_said() {
        let (base, work) = base();
        let mut e = Encoder::new(Some(&base));
        let names: Vec<String> = (0..40).map(|index| format!("m{index}")).collect();
        let (mut inner, mut bytes) = (work, 16);
        let mut holders = Vec::new();
        for name in ["a", "b", "c", "d"] {
            let members = names
                .iter()
                .zip(0..)
                .map(|(name, at)| (name.as_str(), inner, at * bytes));
            let members: Vec<_> = members.collect();
            bytes *= 40;
            inner = e.structure(name, bytes, &members);
            holders.push(inner);
        }
        let types = Btf::parse(&e.bytes(), Some(base)).unwrap();
        assert_eq!(holders_of(&types, work), Holders::default());
        let few = holders_of(&types, holders[2]);
        assert_eq!(few.only_one(0, u64::MAX), Some(holders[3]));
    }

    fn base() -> (Arc<Btf>, TypeId) {
        let mut e = Encoder::new(None);
        let long = e.int("unsigned long", 8, 0);
        let work = e.structure("work_struct", 16, &[("func", long, 0)]);
        (Arc::new(Btf::parse(&e.bytes(), None).unwrap()), work)
    }
}
