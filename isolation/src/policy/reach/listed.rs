//! Objects in lists (`struct list_head`, include/linux/list.h) whose heads are variables of the
//! driver's.

use super::Reach;
use crate::guest::addr::Gva;
use crate::guest::allocations::{Allocation, FindAllocation};
use crate::guest::phys::GuestPhys;

/// Most objects of a list that are looked at.
const MAX_LISTED: usize = 1024;
/// Offset of the pointer to the previous one in a link, in bytes.
const PREVIOUS: u64 = 8;

impl<M: GuestPhys, A: FindAllocation> Reach<'_, M, A> {
    /// Whether `object` is in a list with one of these `heads`, by a link where one of the driver's
    /// structures has one, of a size for which it could have been handed out.
    pub fn is_listed(&self, heads: &[Gva], object: &Allocation) -> bool {
        let Some(link) = self.struct_named("list_head") else {
            return false;
        };
        let holders = self.names.holders_of(self.types, link);
        let bytes = object.range.len_bytes();
        let may_be_in = |link: Gva| {
            let offset = link.0.checked_sub(object.range.first().0);
            offset.is_some_and(|offset| holders.may_be_one(offset, bytes))
        };
        let mut heads = heads.iter().filter(|head| self.is_head(**head));
        heads.any(|head| {
            let mut at = *head;
            (0..MAX_LISTED)
                .map_while(|_| {
                    let next = self.virt.read_u64(at).ok().map(Gva)?;
                    at = next;
                    (next != *head).then_some(next)
                })
                .any(|link| object.range.contains(link) && may_be_in(link))
        })
    }

    /// Whether something is in a list with its head at `at`, and points back at it.
    fn is_head(&self, at: Gva) -> bool {
        let word = |at: Option<Gva>| self.virt.read_u64(at?).ok().map(Gva);
        let back = at.checked_add(PREVIOUS);
        let (Some(first), Some(last)) = (word(Some(at)), word(back)) else {
            return false;
        };
        first != at && word(first.checked_add(PREVIOUS)) == Some(at) && word(Some(last)) == Some(at)
    }
}
