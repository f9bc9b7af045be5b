//! Objects in lists (`struct list_head`, include/linux/list.h) whose heads are variables of the
//! driver's.

use super::Reach;
use crate::guest::addr::Gva;
use crate::guest::allocations::{Allocation, FindAllocation};
use crate::guest::phys::GuestPhys;

/// Most links of one list that are looked at.
const MAX_LISTED: usize = 1024;
/// Most links that one question may look at, of all lists together: the guest stands still meanwhile.
pub const MAX_LINKS: usize = 4096;
/// Offset of the pointer to the previous one in a link, in bytes.
const PREVIOUS: u64 = 8;

impl<M: GuestPhys, A: FindAllocation> Reach<'_, M, A> {
    /// Whether `object` is in a list with one of these `heads`, by a link where one of the driver's
    /// structures has one, of a size for which it could have been handed out. Each link on the way
    /// points back at the one before. Takes the links that it looks at from `budget`.
    pub fn is_listed(&self, heads: &[Gva], object: &Allocation, budget: &mut usize) -> bool {
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
                    *budget = budget.checked_sub(1)?;
                    let next = self.virt.read_u64(at).ok().map(Gva)?;
                    let leads_back = self.word(next.checked_add(PREVIOUS)) == Some(at);
                    at = next;
                    (leads_back && next != *head).then_some(next)
                })
                .any(|link| object.range.contains(link) && may_be_in(link))
        })
    }

    /// Whether something is in a list with its head at `at`, and points back at it.
    fn is_head(&self, at: Gva) -> bool {
        let back = at.checked_add(PREVIOUS);
        let (Some(first), Some(last)) = (self.word(Some(at)), self.word(back)) else {
            return false;
        };
        first != at
            && self.word(first.checked_add(PREVIOUS)) == Some(at)
            && self.word(Some(last)) == Some(at)
    }

    /// The pointer at `at`.
    fn word(&self, at: Option<Gva>) -> Option<Gva> {
        self.virt.read_u64(at?).ok().map(Gva)
    }
}
