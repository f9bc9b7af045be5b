//! What kernel functions have handed out to calls of a driver: to this one, and to earlier ones as
//! far back as there is room: the oldest is forgotten first.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use super::{CallMemory, DriverPolicy, PACKET_CACHES, PAGE_SIZE};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{Allocation, AllocationKind, Allocations, FindAllocation};
use crate::guest::phys::GuestPhys;

/// Objects begin at multiples of as many bytes (`ARCH_KMALLOC_MINALIGN`, arch/x86/include/asm).
const WORD: u64 = 8;

/// An allocation.
#[derive(Debug, Clone, Copy)]
struct HandedOut {
    /// Its last byte.
    last: u64,
    /// Number of the occasion on which it was handed out.
    at: u64,
}

/// Allocations of earlier calls. The driver may have given one back since; then somebody else's
/// object of the same place and size counts as the driver's.
#[derive(Debug, Clone, Default)]
pub(super) struct EarlierAllocations {
    /// By first byte.
    known: HashMap<u64, HandedOut>,
    /// First bytes and occasions, oldest first. One that was handed out again since is in it twice,
    /// and only the later occasion counts.
    order: VecDeque<(u64, u64)>,
    occasions: u64,
}

impl EarlierAllocations {
    /// Most allocations that are remembered.
    pub const CAPACITY: usize = 1 << 16;

    /// `range` was handed out just now.
    pub fn insert(&mut self, range: GvaRange) {
        let (first, at) = (range.first().0, self.occasions);
        self.occasions += 1;
        let last = range.last().0;
        self.known.insert(first, HandedOut { last, at });
        self.order.push_back((first, at));
        while self.known.len() > Self::CAPACITY {
            let Some((first, at)) = self.order.pop_front() else {
                break;
            };
            if self.is_latest(first, at) {
                self.known.remove(&first);
            }
        }
        if self.order.len() > 2 * Self::CAPACITY {
            let mut order = std::mem::take(&mut self.order);
            order.retain(|(first, at)| self.is_latest(*first, *at));
            self.order = order;
        }
    }

    /// Whether exactly `range` was handed out.
    pub fn contains(&self, range: GvaRange) -> bool {
        let known = self.known.get(&range.first().0);
        known.is_some_and(|known| known.last == range.last().0)
    }

    fn is_latest(&self, first: u64, at: u64) -> bool {
        self.known.get(&first).is_some_and(|known| known.at == at)
    }
}

impl DriverPolicy {
    /// The call is about to be committed, and has changed `range`. On a page that was opened for
    /// something that was handed out, in this call or an earlier one, nobody is asked about the
    /// other objects: those that were handed out to this call are the driver's, too.
    pub fn committing<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>, range: GvaRange) {
        for call in &self.calls {
            self.habits.changed(&call.function, range);
        }
        let mut at = range.first();
        while range.contains(at) && self.opened_pages.contains(&(at.0 & !(PAGE_SIZE - 1))) {
            at = match self.new_allocation(memory, at) {
                Some(found) => {
                    if !self.handed_out.contains(&found.range) {
                        self.handed_out.push(found.range);
                    }
                    Gva(found.range.last().0.wrapping_add(1))
                }
                // Somebody else's, or what lies between objects.
                None => Gva(at.0.wrapping_add(WORD)),
            };
        }
    }

    /// The object at `at`, if it was handed out during the call and a driver can keep it.
    pub(super) fn new_allocation<M: GuestPhys>(
        &self,
        memory: &CallMemory<'_, M>,
        at: Gva,
    ) -> Option<Allocation> {
        let base = memory.per_cpu_base;
        let now = Allocations::new(&self.memory, memory.private).on_processor(base);
        let before = Allocations::new(&self.memory, memory.earlier()).on_processor(base);
        let found = now.allocation_at(at)?;
        let is_new = now.is_new(&found, &before);
        (is_new && !self.is_packet(memory, &found)).then_some(found)
    }

    /// A kernel function has returned `at` to the driver, and both views of memory have what it
    /// did: memory that begins there is the driver's, as if it had been handed out while they
    /// differed.
    pub fn hand_out<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>, at: Gva) {
        let allocations = Allocations::new(&self.memory, memory.private);
        let stack = memory.stack;
        for at in allocations.places_of(at) {
            let Some(found) = allocations.allocation_at(at) else {
                continue;
            };
            let on_stack = stack.is_some_and(|stack| stack.intersection(&found.range).is_some());
            if found.range.first() == at && !on_stack {
                Arc::make_mut(&mut self.owned).insert(found.range);
            }
        }
    }

    /// The call goes on in the guest, where memory changes in other ways too, with these `values`
    /// in the driver's registers and on its stack: what was handed out to it until now and lies at
    /// one of them is the driver's.
    pub fn leave<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>, values: &[u64]) {
        // What becomes of them there is not seen.
        self.forget_red_zones(|_| true);
        let allocations = Allocations::new(&self.memory, memory.private);
        let places = values
            .iter()
            .flat_map(|value| allocations.places_of(Gva(*value)));
        for at in places.collect::<Vec<_>>() {
            if !self.table.may_write(GvaRange::aligned(at, 1)) {
                self.open_new_allocation(memory, at);
            }
        }
    }

    /// The call has these `values` in its registers and on its stack: packets among them that
    /// kernel functions have handed out to it are its to write, with their data. Their heads may be
    /// pieces of pages that were handed out long before, which nothing else tells.
    pub fn hold<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>, values: &[u64]) {
        let mut seen = BTreeSet::new();
        let values = values.iter().filter(|value| seen.insert(**value));
        for at in values.copied().map(Gva) {
            let found = Allocations::new(&self.memory, memory.private).allocation_at(at);
            let is_object = |found: &Allocation| {
                found.kind == AllocationKind::Slab && found.range.first() == at
            };
            if let Some(found) = found.filter(is_object)
                && self.is_packet(memory, &found)
            {
                self.open_new_allocation(memory, at);
            }
        }
    }

    /// Whether the byte at `at` is of a packet that one of these `values` is, with its data.
    pub fn may_write_in<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        at: Gva,
        values: &[u64],
    ) -> bool {
        let one = GvaRange::aligned(at, 1);
        self.table.may_write(one)
            || values.iter().any(|value| {
                self.hold(memory, std::slice::from_ref(value));
                self.table.may_write(one)
            })
    }

    /// Whether `found` is a `struct sk_buff`.
    pub(super) fn is_packet<M: GuestPhys>(
        &self,
        memory: &CallMemory<'_, M>,
        found: &Allocation,
    ) -> bool {
        let name = Allocations::new(&self.memory, memory.private).cache_name(found);
        name.is_some_and(|name| PACKET_CACHES.contains(&name.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::addr::Gva;

    const CAPACITY: usize = EarlierAllocations::CAPACITY;
    const BASE: u64 = 0xffff_8880_0000_0000;

    fn object(number: u64) -> GvaRange {
        GvaRange::new(Gva(BASE + number * 64), 64).unwrap()
    }

    #[test]
    fn the_oldest_is_forgotten_whatever_its_address() {
        let mut earlier = EarlierAllocations::default();
        // From the highest address down: the oldest is the last by address.
        let all = CAPACITY as u64;
        for number in (1..=all).rev() {
            earlier.insert(object(number));
        }
        assert!((1..=all).all(|number| earlier.contains(object(number))));
        earlier.insert(object(0));
        assert!(!earlier.contains(object(all)));
        assert!((0..all).all(|number| earlier.contains(object(number))));
    }

    #[test]
    fn what_is_handed_out_again_is_not_old_any_more() {
        let mut earlier = EarlierAllocations::default();
        let all = CAPACITY as u64;
        // The same object over and over does not crowd out others, nor take up room.
        for number in 0..all {
            earlier.insert(object(number));
            earlier.insert(object(0));
            earlier.insert(object(0));
        }
        assert!(earlier.order.len() <= 2 * CAPACITY + 1);
        assert!((0..all).all(|number| earlier.contains(object(number))));
        earlier.insert(object(all));
        assert!(earlier.contains(object(0)) && !earlier.contains(object(1)));
    }

    #[test]
    fn another_size_at_the_same_place_is_another_object() {
        let mut earlier = EarlierAllocations::default();
        earlier.insert(object(1));
        let other = GvaRange::new(object(1).first(), 128).unwrap();
        assert!(!earlier.contains(other));
        earlier.insert(other);
        assert!(earlier.contains(other) && !earlier.contains(object(1)));
    }
}
