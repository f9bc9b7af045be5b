//! Members behind pointers behind members.

use crate::guest::addr::{Gva, GvaRange};
use crate::guest::btf::{Btf, Kind, TypeId};
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
/// array, of its first element.
fn member(types: &Btf, of: TypeId, name: &str) -> Option<(u64, TypeId)> {
    name.split('.').try_fold((0, of), |(offset, of), name| {
        let (mut of, kind) = types.resolve(of)?;
        if let Kind::Array { element, .. } = kind {
            of = types.resolve(element)?.0;
        }
        let member = types.find_member(of, name)?;
        Some((offset + u64::from(member.bit_offset / 8), member.type_id))
    })
}
