//! What kernel functions answer a driver with: where the object is, and what of it is written.

use super::{Answered, Reach, Reached, Start};
use crate::domain::effects::Success;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::FindAllocation;
use crate::guest::btf::TypeId;
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::ObjectKind;

/// Most bytes of a buffer: the largest block of a file system (`PAGE_SIZE` where it is largest).
const MAX_BUFFER: u64 = 1 << 16;

impl<M: GuestPhys, A: FindAllocation> Reach<'_, M, A> {
    /// Where the object is that a function has answered with, which has returned `result` and was
    /// called with these `arguments`; `None` if it has failed.
    pub fn answer(&self, rule: &Answered, arguments: &[u64; 6], result: u64) -> Option<Gva> {
        let Some(argument) = rule.argument else {
            return Success::Pointer.is(result).then_some(Gva(result));
        };
        if !Success::NotNegative.is(result) {
            return None;
        }
        let place = Gva(*arguments.get(usize::from(argument))?);
        let place = match rule.member {
            None => place,
            Some([of, member]) => {
                let member = self.member_named(self.struct_named(of)?, member)?;
                place.checked_add(u64::from(member.bit_offset / 8))?
            }
        };
        let at = self.virt.read_u64(place).ok()?;
        Success::Pointer.is(at).then_some(Gva(at))
    }

    /// What is written of the object at `at`.
    pub fn answered(&self, rule: &Answered, at: Gva) -> Vec<Reached> {
        let Some(id) = self.struct_named(rule.is) else {
            return Vec::new();
        };
        if rule.whole {
            let held = Start {
                at,
                type_id: id,
                name: "answer".into(),
            };
            return self.objects_held(held).objects;
        }
        let written = rule.also.iter().filter_map(|path| {
            let range = self.find_path(id, path)?.range(self.types, self.virt, at)?;
            Some((range, *path))
        });
        let buffer = rule.buffer.and_then(|[address, bytes]| {
            let range = self.buffer(id, at, address, bytes)?;
            Some((range, address))
        });
        let found = written.chain(buffer).map(|(range, path)| Reached {
            range,
            kind: ObjectKind::Passing,
            label: format!("answer of type {}: {path}", rule.is),
            layout: None,
        });
        found.collect()
    }

    fn buffer(
        &self,
        id: TypeId,
        at: Gva,
        address: &'static str,
        bytes: &'static str,
    ) -> Option<GvaRange> {
        let begin = self.find_path(id, address)?.read(self.virt, at)?;
        let bytes = self.find_path(id, bytes)?.read(self.virt, at)?;
        let is_buffer = Success::Pointer.is(begin) && bytes <= MAX_BUFFER;
        GvaRange::new(Gva(begin), bytes).filter(|_| is_buffer)
    }
}
