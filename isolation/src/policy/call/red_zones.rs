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
//! there (who, says `domain/transaction/red_zones.rs`), and of the red zones that the kernel has
//! around objects itself (`slub_debug`).

use super::{CallMemory, DriverPolicy};
use crate::domain::monitor::Asked;
use crate::domain::supervisor::Behind;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{AllocationKind, Allocations, FindAllocation};
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::{Lifetime, Object, ObjectId, ObjectKind, Permit};

/// `__GFP_ZERO` (include/linux/gfp_types.h).
const GFP_ZERO: u64 = 0x100;
/// Most bytes behind an object that are looked at when the call ends: its slab may be of any size
/// that the guest says.
const MAX_LOOKED_AT: u64 = 4096;

/// An object of this call.
#[derive(Debug, Clone, Copy)]
pub(super) struct RedZone {
    /// Where it begins.
    object: Gva,
    /// What was handed out with it and not asked for, with its guard in the table.
    rest: Option<(GvaRange, ObjectId)>,
    /// All of that was zero.
    zeroed: bool,
    /// The red zone of the kernel's behind it.
    kernels: Option<GvaRange>,
}

impl DriverPolicy {
    /// The call has asked for memory, or has given it back.
    pub fn asked_for<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>, asked: &[Asked]) {
        for Asked { at, bytes, flags } in asked {
            let object = Gva(*at);
            self.forget_red_zones(|zone| zone.object == object);
            let Some(bytes) = bytes.filter(|bytes| *bytes > 0) else {
                continue;
            };
            let allocations = Allocations::new(&self.memory, memory.private);
            let found = allocations.allocation_at(object).filter(|found| {
                found.range.first() == object
                    && matches!(found.kind, AllocationKind::Slab | AllocationKind::Vmalloc)
            });
            let Some(found) = found.filter(|found| bytes <= found.range.len_bytes()) else {
                continue;
            };
            let cache = allocations.cache_name(&found);
            let kernels = allocations.red_zone(&found);
            let rest = object.checked_add(bytes);
            let rest = rest.and_then(|first| GvaRange::inclusive(first, found.range.last()));
            let rest = rest.and_then(|range| {
                let cache = cache.as_deref().unwrap_or("memory");
                // Without room for it nothing is known of it.
                let guard = self.table.open(Object {
                    range,
                    kind: ObjectKind::Other,
                    permit: Permit::Guard,
                    lifetime: Lifetime::Call(self.number),
                    label: format!("behind {bytes} bytes that were asked for of {cache}"),
                });
                Some((range, guard.ok()?))
            });
            let zeroed = allocations.is_plain(&found)
                && (flags.is_none_or(|flags| flags & GFP_ZERO != 0) || self.zeroes(memory));
            self.red_zones.push(RedZone {
                object,
                rest,
                zeroed,
                kernels,
            });
        }
    }

    /// What lies behind the objects that the call asked for and has a known content, as long as
    /// nobody writes there.
    pub fn behind_asked(&self) -> impl Iterator<Item = Behind> {
        self.red_zones.iter().flat_map(|zone| {
            let rest = zone.rest.filter(|_| zone.zeroed);
            let rest = rest.and_then(|(range, _)| {
                let bytes = range.len_bytes().min(MAX_LOOKED_AT);
                Some(Behind {
                    range: GvaRange::new(range.first(), bytes)?,
                    is_red_zone: false,
                })
            });
            let kernels = zone.kernels.map(|range| Behind {
                range,
                is_red_zone: true,
            });
            rest.into_iter().chain(kernels)
        })
    }

    /// Whether `at` lies behind what was asked for.
    pub(super) fn is_in_red_zone(&self, at: Gva) -> bool {
        let mut rests = self.red_zones.iter().filter_map(|zone| zone.rest);
        rests.any(|(range, _)| range.contains(at))
    }

    /// Nothing is known any more of those objects that `which` picks.
    pub(super) fn forget_red_zones(&mut self, which: impl Fn(&RedZone) -> bool) {
        let table = &mut self.table;
        self.red_zones.retain(|zone| {
            let forgotten = which(zone);
            if let Some((_, guard)) = zone.rest.filter(|_| forgotten) {
                table.close(guard);
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
