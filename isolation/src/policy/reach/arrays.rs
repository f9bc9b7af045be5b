//! What a driver keeps by number: in an xarray, or a radix tree, which is one by another name
//! (include/linux/xarray.h, lib/xarray.c). The kernel's functions put it there, and no type says
//! what it is.

use std::collections::HashSet;

use super::Reach;
use crate::guest::addr::Gva;
use crate::guest::allocations::{Allocation, FindAllocation};
use crate::guest::btf::{Kind, TypeId};
use crate::guest::phys::GuestPhys;

/// Most nodes that one question looks at: a million entries.
const MAX_NODES: usize = 1 << 14;
/// Most entries of a node that are believed (`XA_CHUNK_SIZE`).
const MAX_SLOTS: u64 = 64;
/// The two low bits of an entry: 0 for a pointer, this for what is the array's own.
const INTERNAL: u64 = 2;
/// Entries of the array's own up to here are no nodes.
const LAST_MARK: u64 = 4096;
/// As much of an object of an unknown type is looked at for pages that it has, in bytes.
const LOOKED_AT: usize = 128;

/// How a kernel has its arrays.
struct Layout {
    /// Offset of an array's first entry, in bytes.
    head: u64,
    /// Offset of a node's entries, in bytes.
    slots: u64,
    /// How many those are.
    count: u64,
}

impl<M: GuestPhys, A: FindAllocation> Reach<'_, M, A> {
    /// What the arrays at `arrays` hold, as allocations: objects, pages, and pages that an object
    /// has. As long as `wanted` says of one that more are.
    pub fn kept_in(&self, arrays: &[Gva], wanted: &mut dyn FnMut(Allocation) -> bool) {
        let Some(layout) = self.layout() else { return };
        let head = |array: &Gva| self.virt.read_u64(array.checked_add(layout.head)?).ok();
        let mut entries: Vec<u64> = arrays.iter().filter_map(head).collect();
        let mut nodes = HashSet::new();
        while let Some(entry) = entries.pop() {
            if entry & 3 == INTERNAL && entry > LAST_MARK {
                if nodes.len() >= MAX_NODES || !nodes.insert(entry) {
                    continue;
                }
                let slots = Gva(entry - INTERNAL).checked_add(layout.slots);
                let bytes = (layout.count * 8) as usize;
                if let Some(slots) = slots.and_then(|at| self.virt.read_vec(at, bytes).ok()) {
                    entries.extend(words(&slots).filter(|entry| *entry != 0));
                }
            } else if entry & 3 == 0 && !self.each_of(Gva(entry), wanted) {
                return;
            }
        }
    }

    /// Where the structure `id` at `at` has an xarray, if it is one in which drivers keep things.
    pub fn array(&self, at: Gva, id: TypeId) -> Option<Gva> {
        let name = self.types.name(id);
        let mut rules = self.rules.arrays.iter();
        match rules.find(|rule| rule.of == name)?.member {
            None => Some(at),
            Some(member) => {
                let member = self.member_named(id, member)?;
                at.checked_add(u64::from(member.bit_offset / 8))
            }
        }
    }

    /// What there is to know of the entry `at`; whether more is wanted.
    fn each_of(&self, at: Gva, wanted: &mut dyn FnMut(Allocation) -> bool) -> bool {
        if let Some(page) = self.page(at) {
            return wanted(page);
        }
        let Some(object) = self.allocations.allocation_at(at) else {
            return true;
        };
        if !wanted(object) {
            return false;
        }
        let left = object.range.last().0.saturating_sub(at.0).saturating_add(1);
        let looked_at = usize::try_from(left).map_or(LOOKED_AT, |left| left.min(LOOKED_AT));
        let inside = self.virt.read_vec(at, looked_at & !7).unwrap_or_default();
        let mut pages = words(&inside).filter_map(|word| self.page(Gva(word)));
        pages.all(wanted)
    }

    /// The pages that the `struct page` at `description` stands for.
    fn page(&self, description: Gva) -> Option<Allocation> {
        let page = self.allocations.page_address(description)?;
        self.allocations.allocation_at(page)
    }

    fn layout(&self) -> Option<Layout> {
        let types = self.types;
        let at = |of: TypeId, name: &str| {
            let member = types.find_member(of, name)?;
            Some((u64::from(member.bit_offset / 8), member.type_id))
        };
        let (head, _) = at(types.find_struct("xarray")?, "xa_head")?;
        let (slots, entries) = at(types.find_struct("xa_node")?, "slots")?;
        let Some((_, Kind::Array { count, .. })) = types.resolve(entries) else {
            return None;
        };
        Some(Layout {
            head,
            slots,
            count: u64::from(count).min(MAX_SLOTS),
        })
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_le_bytes(*word))
}
