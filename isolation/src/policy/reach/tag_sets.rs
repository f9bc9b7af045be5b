//! Requests that a driver finds by number (`blk_mq_tag_to_rq`, include/linux/blk-mq.h): those under
//! way of a set of its own.
//!
//! ```text
//!   driver's structure ─ struct blk_mq_tag_set ─ tags[] ─► struct blk_mq_tags ─ rqs[] ─►
//!       pages with requests, what is behind each among them
//! ```

use super::walk::{Item, Walk};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{AllocationKind, FindAllocation};
use crate::guest::btf::TypeId;
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::ObjectKind;

/// Most hardware queues of one set.
const MAX_QUEUES: u64 = 64;
/// Most requests of one queue (`BLK_MQ_MAX_DEPTH`, include/linux/blk-mq.h).
const MAX_DEPTH: u64 = 10_240;
/// Most pieces of memory with requests of one queue, most of which have 64 KiB.
const MAX_PIECES: usize = 64;

impl<M: GuestPhys, A: FindAllocation> Walk<'_, '_, M, A> {
    /// The memory of the requests of `item`, a structure `id` of this name, if it is a set of them.
    pub(super) fn tag_set(&mut self, item: &Item, id: TypeId, name: &str) {
        let mut rules = self.reach.rules.tag_sets.iter();
        let Some(rule) = rules.find(|rule| rule.of == name) else {
            return;
        };
        let array = self.member_value(item.at, id, rule.tags);
        let count = self.member_value(item.at, id, rule.count);
        let each = self.reach.struct_named(rule.each);
        let (Some(array), Some(count), Some(each)) = (array, count, each) else {
            return;
        };
        let path = format!("{}->{}[]", item.path, rule.tags);
        for index in 0..count.min(MAX_QUEUES) {
            let at = Gva(array).checked_add(index * 8);
            let Some(tags) = at.and_then(|at| self.read_word(at)).map(Gva) else {
                return;
            };
            let requests = self.member_value(tags, each, rule.requests);
            let depth = self.member_value(tags, each, rule.depth);
            if let (Some(requests), Some(depth)) = (requests, depth) {
                self.requests((Gva(requests), depth.min(MAX_DEPTH)), each, &path);
            }
        }
    }

    /// The pages of the requests that an array has pointers to.
    fn requests(&mut self, (array, depth): (Gva, u64), each: TypeId, path: &str) {
        let all = usize::try_from(depth * 8).ok();
        let all = all.and_then(|bytes| self.reach.virt.read_vec(array, bytes).ok());
        let mut pieces: Vec<GvaRange> = Vec::new();
        for word in all.unwrap_or_default().chunks_exact(8) {
            let at = word
                .first_chunk()
                .map_or(0, |word| u64::from_le_bytes(*word));
            let at = Gva(at);
            if at.0 == 0 || pieces.iter().any(|piece| piece.contains(at)) {
                continue;
            }
            let piece = self.allocation(at);
            let Some(piece) = piece.filter(|piece| piece.kind == AllocationKind::Pages) else {
                continue;
            };
            if pieces.len() >= MAX_PIECES {
                return;
            }
            pieces.push(piece.range);
            self.add(piece.range, ObjectKind::Allocated, each, path);
        }
    }
}
