//! Memory that a driver takes from a pool of its own (`dma_pool_alloc`, mm/dmapool.c): pages that
//! the pool has got long before, from which blocks are handed out again and again.

use super::walk::{Item, Walk};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::FindAllocation;
use crate::guest::btf::TypeId;
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::ObjectKind;

/// Most pages of one pool.
const MAX_PAGES: usize = 64;

/// Largest of them, in bytes.
const MAX_BYTES: u64 = 1 << 20;

impl<M: GuestPhys, A: FindAllocation> Walk<'_, '_, M, A> {
    /// The pages of the pool `item`, a structure `id` of this name, if it is one.
    pub(super) fn pooled(&mut self, item: &Item, id: TypeId, name: &str) {
        let mut rules = self.reach.rules.pools.iter();
        let Some(rule) = rules.find(|rule| rule.of == name) else {
            return;
        };
        let offset = |of: TypeId, name| {
            let member = self.reach.member_named(of, name)?;
            Some(u64::from(member.bit_offset / 8))
        };
        let page = self.reach.struct_named(rule.page);
        let link = page.and_then(|page| offset(page, rule.link));
        let memory = page.and_then(|page| offset(page, rule.memory));
        let head = offset(id, rule.pages).and_then(|offset| item.at.checked_add(offset));
        let bytes = self.member_value(item.at, id, rule.bytes);
        let (Some(link), Some(memory), Some(head)) = (link, memory, head) else {
            return;
        };
        let Some(bytes) = bytes.filter(|bytes| *bytes <= MAX_BYTES) else {
            return;
        };
        let mut at = head;
        for _ in 0..MAX_PAGES {
            let next = self.reach.virt.read_u64(at).ok().map(Gva);
            let Some(next) = next.filter(|next| *next != head) else {
                break;
            };
            at = next;
            let page = next.checked_sub(link);
            let memory = page.and_then(|page| page.checked_add(memory));
            let memory = memory.and_then(|at| self.reach.virt.read_u64(at).ok());
            let Some(range) = memory.and_then(|at| GvaRange::new(Gva(at), bytes)) else {
                break;
            };
            let path = format!("{}->{}[]", item.path, rule.pages);
            self.add(range, ObjectKind::Passing, id, &path);
        }
    }
}
