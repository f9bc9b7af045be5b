//! Objects in lists of the driver's variables: there may be nothing else that leads to them, and no
//! type says what is in a list.

use super::{CallMemory, DriverPolicy};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{AllocationKind, Allocations, FindAllocation};
use crate::guest::modules::ModuleLayout;
use crate::guest::phys::GuestPhys;
use crate::guest::symbols::SymbolTable;
use crate::policy::range_table::ObjectKind;
use crate::policy::reach::MAX_LINKS;

/// Bytes of a `struct list_head`, and the most from one variable of that size to the next.
const HEAD_BYTES: std::ops::RangeInclusive<u64> = 16..=64;
/// Most variables that may be heads of lists.
const MAX_HEADS: usize = 1024;

/// The module's variables that are of a size to be the heads of lists.
pub(super) fn heads(layout: &ModuleLayout, symbols: &SymbolTable) -> Vec<Gva> {
    let variables = symbols
        .in_module(&layout.name)
        .filter(|symbol| !symbol.is_code() && symbol.at.0.is_multiple_of(8));
    let may_be = variables.filter(|symbol| {
        let mut sections = layout.data();
        let section = sections.find(|section| section.range.contains(symbol.at));
        let extent = section.and_then(|section| symbols.extent(symbol.at, section.range));
        extent.is_some_and(|extent| HEAD_BYTES.contains(&extent.len_bytes()))
    });
    may_be.map(|symbol| symbol.at).take(MAX_HEADS).collect()
}

impl DriverPolicy {
    /// Opens the object that the byte at `at` is in, if it is in a list of a variable of the
    /// driver's, or was when the call began.
    pub(super) fn open_listed<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        at: Gva,
    ) -> bool {
        let allocations = Allocations::new(&self.memory, memory.private);
        let Some(object) = allocations.allocation_at(at) else {
            return false;
        };
        let stack = memory.stack;
        let is_object = matches!(object.kind, AllocationKind::Slab | AllocationKind::Vmalloc)
            && stack.is_none_or(|stack| stack.intersection(&object.range).is_none());
        let heads = &self.list_heads;
        let mut budget = MAX_LINKS;
        let is_listed = is_object
            && (self.reach(memory.private, memory, |reach| {
                reach.is_listed(heads, &object, &mut budget)
            }) || self.reach(memory.earlier(), memory, |reach| {
                reach.is_listed(heads, &object, &mut budget)
            }));
        let label = "in a list of the driver's".into();
        is_listed
            && self.open(object.range, ObjectKind::Allocated, label)
            && self.table.may_write(GvaRange::aligned(at, 1))
    }
}
