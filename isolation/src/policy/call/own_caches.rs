//! Objects of slab caches that are the driver's alone (`kmem_cache_create`), whenever they were
//! handed out: all of them are its own but those that are free, in which the allocator keeps its
//! lists.

use super::{CallMemory, DriverPolicy};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{Allocations, FindAllocation};
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::ObjectKind;

/// A cache, and how many have asked for it: the kernel gives those who ask for caches of one size
/// the same (`mm/slab_common.c`, `__kmem_cache_alias`).
const CACHE: &str = "kmem_cache";
const USERS: &str = "refcount";

impl DriverPolicy {
    /// Opens the object that the byte at `at` is in, if it is of a cache that only the driver has.
    pub(super) fn open_in_own_cache<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        at: Gva,
    ) -> bool {
        let virt = memory.private;
        let earlier = memory.earlier();
        let allocations = Allocations::new(&self.memory, virt).on_processor(memory.per_cpu_base);
        let Some(object) = allocations.allocation_at(at) else {
            return false;
        };
        let Some(cache) = object.cache else {
            return false;
        };
        let mut variables = self.own_variables.caches.iter();
        // The call may have had its variable point at another one.
        let leads_there = variables.any(|variable| {
            virt.read_u64(*variable).ok() == Some(cache.0)
                && earlier.read_u64(*variable).ok() == Some(cache.0)
        });
        if !leads_there || allocations.is_free(object.range.first()) == Some(true) {
            return false;
        }
        let users = self.names.find_struct(&self.types, CACHE);
        let users = users.and_then(|id| self.names.find_member(&self.types, id, USERS));
        let users = users.and_then(|users| cache.checked_add(u64::from(users.bit_offset / 8)));
        let mut count = [0; 4];
        let is_read = users.is_some_and(|users| virt.read(users, &mut count).is_ok());
        if !is_read || u32::from_le_bytes(count) != 1 {
            return false;
        }
        let name = allocations.cache_name(&object).unwrap_or_default();
        let label = format!("{name}, a cache of the driver's");
        self.open(object.range, ObjectKind::Allocated, label)
            && self.table.may_write(GvaRange::aligned(at, 1))
    }
}
