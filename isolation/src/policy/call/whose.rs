//! Whose memory something is, for reports.

use super::DriverPolicy;
use crate::guest::addr::Gva;
use crate::guest::allocations::{AllocationKind, Allocations, FindAllocation};
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;

impl DriverPolicy {
    /// Whose memory `at` is, as the guest's allocator has it: `kmalloc-512 object + 0x10`.
    pub fn whose<M: GuestPhys>(&self, virt: VirtMemory<'_, M>, at: Gva) -> Option<String> {
        let allocations = Allocations::new(&self.memory, virt);
        let found = allocations.allocation_at(at)?;
        let offset = at.0 - found.range.first().0;
        Some(match found.kind {
            AllocationKind::Slab => {
                let cache = allocations
                    .cache_name(&found)
                    .unwrap_or_else(|| "slab".into());
                format!("{cache} object + {offset:#x}")
            }
            AllocationKind::Pages => {
                format!("{} bytes of pages + {offset:#x}", found.range.len_bytes())
            }
            AllocationKind::Vmalloc => {
                format!(
                    "{} bytes of vmalloc area + {offset:#x}",
                    found.range.len_bytes()
                )
            }
            AllocationKind::PerCpu => {
                format!(
                    "{} bytes of a processor + {offset:#x}",
                    found.range.len_bytes()
                )
            }
        })
    }
}
