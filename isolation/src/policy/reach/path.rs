//! Members behind pointers behind members.

use crate::guest::addr::{Gva, GvaRange};
use crate::guest::btf::{Btf, Kind, Member, TypeId};
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;

/// Bytes of `endbr64`, which may stand before a gate.
const ENDBR_BYTES: u64 = 4;

/// A chain of pointers: offsets of members, each in what the one before it points at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    before: Vec<u64>,
    last: u64,
    /// The structure that has the last member.
    pub holder: TypeId,
    /// Type of the last member.
    pub type_id: TypeId,
}

impl Path {
    /// The member that `path`, members between `->`, leads to from structure `of`; `a.b` is member
    /// `b` of the structure that is member `a`.
    pub fn find(types: &Btf, of: TypeId, path: &str) -> Option<Self> {
        let (before, last) = match path.rsplit_once("->") {
            Some((before, last)) => (Some(before), last),
            None => (None, path),
        };
        let (mut offsets, mut holder) = (Vec::new(), of);
        for name in before.iter().flat_map(|before| before.split("->")) {
            let (offset, type_id) = member(types, holder, name)?;
            offsets.push(offset);
            let to = types.pointee(type_id);
            holder = to.and_then(|to| types.resolve(to))?.0;
        }
        let (last, type_id) = member(types, holder, last)?;
        Some(Self {
            before: offsets,
            last,
            holder,
            type_id,
        })
    }

    /// Where the structure with the last member is, beginning at the one at `start`.
    pub fn holder_at<M: GuestPhys>(&self, virt: VirtMemory<'_, M>, start: Gva) -> Option<Gva> {
        let step = |at: Gva, offset: &u64| virt.read_u64(at.checked_add(*offset)?).ok().map(Gva);
        self.before.iter().try_fold(start, step)
    }

    /// Where the last member is, beginning at the structure at `start`.
    pub fn range<M: GuestPhys>(
        &self,
        types: &Btf,
        virt: VirtMemory<'_, M>,
        start: Gva,
    ) -> Option<GvaRange> {
        let at = self.holder_at(virt, start)?.checked_add(self.last)?;
        GvaRange::new(at, types.size_of(self.type_id)?)
    }

    /// The pointer that is the last member.
    pub fn read<M: GuestPhys>(&self, virt: VirtMemory<'_, M>, start: Gva) -> Option<u64> {
        let at = self.holder_at(virt, start)?.checked_add(self.last)?;
        virt.read_u64(at).ok()
    }

    /// Whether that pointer is one to the function with its gate at `gate`.
    pub fn leads_to<M: GuestPhys>(&self, virt: VirtMemory<'_, M>, start: Gva, gate: u64) -> bool {
        let function = self.read(virt, start);
        function.is_some_and(|at| at == gate || at.checked_add(ENDBR_BYTES) == Some(gate))
    }
}

/// Offset and type of the member `name` of structure `of`, `.` between members of members; of an
/// array, of its first element, or of the one whose number is behind it (`a[2].b`).
fn member(types: &Btf, of: TypeId, name: &str) -> Option<(u64, TypeId)> {
    name.split('.').try_fold((0, of), |(offset, of), name| {
        let (mut of, kind) = types.resolve(of)?;
        if let Kind::Array { element, .. } = kind {
            of = types.resolve(element)?.0;
        }
        let (name, index) = match name.strip_suffix(']') {
            None => (name, 0),
            Some(name) => {
                let (name, index) = name.split_once('[')?;
                (name, index.parse().ok()?)
            }
        };
        let member = types.find_member(of, name)?;
        let at = offset + u64::from(member.bit_offset / 8) + element_at(types, &member, index)?;
        Some((at, member.type_id))
    })
}

/// Where the element of this number of an array begins; `None` if it has none of that number.
fn element_at(types: &Btf, member: &Member, index: u64) -> Option<u64> {
    match types.resolve(member.type_id)?.1 {
        Kind::Array { element, count } if index < u64::from(count) => {
            types.size_of(element)?.checked_mul(index)
        }
        _ => (index == 0).then_some(0),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;
    use crate::guest::btf::encode::Encoder;

    /// `sb_start_intwrite`.
    #[test]
    fn an_element_of_an_array_is_named_by_its_number() {
        let mut e = Encoder::new(None);
        let word = e.int("u64", 8, 0);
        let lock = e.structure("lock", 32, &[("count", word, 8)]);
        let locks = e.array(lock, 3);
        e.structure("writers", 128, &[("n", word, 0), ("locks", locks, 16)]);
        let types = Btf::parse(&e.bytes(), None).unwrap();
        let of = types.find_struct("writers").unwrap();
        let at = |path: &str| Path::find(&types, of, path).map(|path| path.last);
        assert_eq!(at("locks.count"), Some(24));
        assert_eq!(at("locks[0].count"), Some(24));
        assert_eq!(at("locks[2].count"), Some(88));
        assert_eq!(at("n[0]"), Some(0));
        for none in [
            "locks[3].count",
            "n[1]",
            "locks[].count",
            "locks]",
            "locks[-1].count",
        ] {
            assert_eq!(at(none), None, "{none}");
        }
    }
}
