//! What lies behind the bytes that were asked for: nobody's.
//!
//! ```text
//!   kmalloc-64   │ 40 bytes that the call asked for │ 24 that nobody did │ next object
//!                                                   └ a guard of the range table
//! ```
//!
//! How much was asked for is known of what the call was handed out itself, and until it gives it
//! back, has it made longer or goes on in the guest, where all that may happen unseen. Of memory
//! that is zeroed when it is handed out it is also known at the call's end whether somebody wrote
//! there.

use super::{CallMemory, DriverPolicy};
use crate::domain::monitor::Asked;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{AllocationKind, Allocations, FindAllocation};
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::{Lifetime, Object, ObjectId, ObjectKind, Permit};

/// `__GFP_ZERO` (include/linux/gfp_types.h).
const GFP_ZERO: u64 = 0x100;

/// A guard behind an object of this call.
#[derive(Debug, Clone, Copy)]
pub(super) struct RedZone {
    /// Where the object begins.
    object: Gva,
    guard: ObjectId,
    range: GvaRange,
    /// All of it was zero.
    zeroed: bool,
}

impl DriverPolicy {
    /// The call has asked for memory, or has given it back.
    pub fn asked_for<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>, asked: &[Asked]) {
        for Asked { at, bytes, flags } in asked {
            let at = Gva(*at);
            self.forget_red_zones(|zone| zone.object == at);
            let Some(bytes) = bytes.filter(|bytes| *bytes > 0) else {
                continue;
            };
            let allocations = Allocations::new(&self.memory, memory.private);
            let Some(found) = allocations.allocation_at(at) else {
                continue;
            };
            let is_whole = found.range.first() == at
                && matches!(found.kind, AllocationKind::Slab | AllocationKind::Vmalloc);
            let behind = at.checked_add(bytes).filter(|_| is_whole);
            let range = behind.and_then(|first| GvaRange::inclusive(first, found.range.last()));
            let Some(range) = range else { continue };
            let cache = allocations.cache_name(&found);
            let zeroed = flags.is_none_or(|flags| flags & GFP_ZERO != 0) || self.zeroes(memory);
            let guard = self.table.open(Object {
                range,
                kind: ObjectKind::Other,
                permit: Permit::Guard,
                lifetime: Lifetime::Call(self.number),
                label: format!(
                    "behind {bytes} bytes that were asked for of {}",
                    cache.as_deref().unwrap_or("memory")
                ),
            });
            // Without room for it nothing is known of it.
            if let Ok(guard) = guard {
                self.red_zones.push(RedZone {
                    object: at,
                    guard,
                    range,
                    zeroed,
                });
            }
        }
    }

    /// Of what lies behind the objects that the call asked for, what was zero when they were handed
    /// out.
    pub fn zeroed_behind(&self) -> impl Iterator<Item = GvaRange> {
        let zones = self.red_zones.iter().filter(|zone| zone.zeroed);
        zones.map(|zone| zone.range)
    }

    /// Whether `at` lies behind what was asked for.
    pub(super) fn is_in_red_zone(&self, at: Gva) -> bool {
        self.red_zones.iter().any(|zone| zone.range.contains(at))
    }

    /// Nothing is known any more of those objects that `which` picks.
    pub(super) fn forget_red_zones(&mut self, which: impl Fn(&RedZone) -> bool) {
        let table = &mut self.table;
        self.red_zones.retain(|zone| {
            let forgotten = which(zone);
            if forgotten {
                table.close(zone.guard);
            }
            !forgotten
        });
    }

    /// Whether the kernel zeroes all that it hands out (`init_on_alloc`, mm/page_alloc.c), but for
    /// caches that are poisoned.
    fn zeroes<M: GuestPhys>(&self, memory: &CallMemory<'_, M>) -> bool {
        let enabled = |key| {
            memory
                .private
                .read_u64(key)
                .map(|count| count as u32 as i32)
        };
        self.init_on_alloc
            .is_some_and(|key| enabled(key).is_ok_and(|count| count > 0))
    }
}
