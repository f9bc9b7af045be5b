//! Structures of the kernel's in chains: an argument has a pointer to the first, or is a list of them.

use super::walk::{Item, Walk};
use crate::guest::addr::Gva;
use crate::guest::allocations::FindAllocation;
use crate::guest::btf::TypeId;
use crate::guest::phys::GuestPhys;

/// Most structures of a chain that are looked at (twice `BLK_MAX_REQUEST_COUNT`, block/blk-mq.c).
const MAX_CHAINED: usize = 64;

impl<M: GuestPhys, A: FindAllocation> Walk<'_, '_, M, A> {
    /// Goes on with the structures in the list that the structure `id` of this name is, if it is an
    /// argument.
    pub(super) fn chain_of_list(&mut self, item: &Item, id: TypeId, name: &str) {
        let mut lists = self.reach.rules.chained.iter().filter_map(|rule| rule.list);
        let Some([_, first]) = lists.find(|[list, _]| *list == name) else {
            return;
        };
        let first = self
            .reach
            .member_named(id, first)
            .filter(|_| item.depth == 0);
        let first = first.and_then(|first| {
            let at = item.at.checked_add(u64::from(first.bit_offset / 8))?;
            Some((at, self.reach.types.pointee(first.type_id)?))
        });
        if let Some((at, to)) = first {
            self.push_chain(item, at, to);
        }
    }

    /// Goes on with the structure that the pointer at `first` points at, and those behind it.
    pub(super) fn push_chain(&mut self, item: &Item, first: Gva, to: TypeId) {
        let mut target = self.read_word(first);
        for _ in 0..MAX_CHAINED {
            let Some(at) = target.filter(|at| *at != 0).map(Gva) else {
                break;
            };
            self.push(Item {
                at,
                type_id: to,
                path: format!("*{}", item.path),
                depth: item.depth,
                kind: item.kind,
            });
            target = self.next_in_chain(at, to);
        }
    }

    /// What comes behind the structure of type `of` at `at`, if such structures are in chains.
    fn next_in_chain(&self, at: Gva, of: TypeId) -> Option<u64> {
        let (id, _) = self.reach.types.resolve(of)?;
        let name = self.reach.types.name(id);
        let mut rules = self.reach.rules.chained.iter();
        let rule = rules.find(|rule| rule.of == name)?;
        self.member_value(at, id, rule.next)
    }
}
