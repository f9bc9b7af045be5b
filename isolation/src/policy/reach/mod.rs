//! Which objects a call reaches from its arguments, by type.
//!
//! ```text
//!  argument ─► kernel's structure ─ rules only: the private area behind it, a packet's data,
//!                     │             queues and counters that inline functions write
//!                     ▼
//!              driver's structure ─ every pointer in it ─► kernel's structure: itself
//!                                                      ─► driver's structure: as this one
//!                                                      ─► numbers, void: to the allocation's end
//! ```
//!
//! A structure is the driver's if the module's own BTF defines it. Pointers in it are followed,
//! because they are the driver's; pointers in the kernel's structures are not, because they lead
//! everywhere. What types do not say is data in [`Rules`]: the private area behind a `net_device`,
//! the packet of an `sk_buff`. The result is what the call may write, at most; it is meant to be
//! worked out when a call first stores to something unknown, not at every call.
//!
//! The pointers are the guest's and hostile: depth, objects and reads are bounded, and what is not
//! guest memory is left out.

mod answered;
mod arrays;
mod block_io;
mod chains;
mod counted;
mod leading;
mod limits;
mod listed;
mod members;
mod names;
mod own;
mod path;
mod per_cpu;
mod pools;
mod private;
mod queues;
mod rules;
mod slots;
mod tag_sets;
mod walk;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::Serialize;

use super::range_table::ObjectKind;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::FindAllocation;
use crate::guest::btf::{Btf, Function, Kind, Member, TypeId};
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;

pub(in crate::policy) use counted::{member_range, reference_counts};
pub(in crate::policy) use listed::MAX_LINKS;
pub use names::Names;
pub use path::Path;
pub use rules::{
    Answered, Chained, Counted, Embedded, Followed, InNamespace, InsideArea, KernelsMember, Listed,
    ModulesOwn, Numbered, OwnTypes, PacketData, PerCpuPointer, Pool, PrivateArea, Rules, TagSet,
    Untyped, Written,
};
pub use slots::Slots;
use walk::Extent;

/// Most objects that one question finds.
pub const MAX_OBJECTS: usize = 1024;

/// Most pointers in a row that are followed.
pub const MAX_DEPTH: usize = 6;

/// An object that a call reaches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reached {
    /// Where it is.
    pub range: GvaRange,
    /// What it is to the call.
    pub kind: ObjectKind,
    /// Type and path, for reports: `struct e1000_tx_ring (netdev->private->tx_ring)`.
    pub label: String,
    /// What lies there, one after the other, if that is known for sure.
    #[serde(skip)]
    pub layout: Option<TypeId>,
}

/// What a call reaches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Each object once, in the order found.
    pub objects: Vec<Reached>,
    /// Where the driver's structures among them keep things by number, see [`Reach::kept_in`].
    pub arrays: Vec<Gva>,
    /// Where they have queues of packets, see [`Reach::queued_in`].
    pub queues: Vec<Gva>,
    /// Their long arrays, see [`Reach::held_in`].
    pub slots: Vec<Slots>,
}

/// Something to start from besides the arguments: an object that is known to belong to the driver,
/// such as a network interface that it registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// Where it is.
    pub at: Gva,
    /// Its type, not that of a pointer to it.
    pub type_id: TypeId,
    /// What to call it in reports.
    pub name: String,
}

/// A call's view of memory.
#[derive(Debug)]
pub struct Reach<'a, M, A> {
    /// Types of the kernel and the module.
    pub types: &'a Btf,
    /// What names mean in them.
    pub names: &'a Names,
    /// Memory at the time of the call.
    pub virt: VirtMemory<'a, M>,
    /// Knows how far allocations go.
    pub allocations: &'a A,
    /// The stack that the call runs on: what lies on it is never taken for an array.
    pub stack: Option<GvaRange>,
    /// What to add to a per-CPU address for the processor that the call runs on: its GS base.
    pub per_cpu_base: Option<u64>,
    /// Per-CPU addresses below are the kernel's own variables, not handed out to anybody.
    pub per_cpu_handed_out: Option<u64>,
    /// What of the kernel's structures is this driver's own.
    pub own_too: &'a OwnTypes,
    /// What types do not say.
    pub rules: &'a Rules,
}

impl<M: GuestPhys, A: FindAllocation> Reach<'_, M, A> {
    /// What a call of `function` with these arguments, as many as are known, reaches, and what is reached from
    /// `starts`.
    pub fn objects(&self, function: &Function<'_>, arguments: &[u64], starts: &[Start]) -> Found {
        let mut walk = walk::Walk::new(self, Extent::All);
        self.enter_arguments(&mut walk, function, arguments, |_| true);
        for start in starts {
            walk.enter(start.at, start.type_id, start.name.clone());
        }
        walk.run()
    }

    /// The objects alone that a call of `function` with these arguments is about: those
    /// that the arguments which `wanted` picks by name point at, with what belongs to them. Part of
    /// what [`Self::objects`] finds, and far quicker.
    pub fn near_objects(
        &self,
        function: &Function<'_>,
        arguments: &[u64],
        wanted: impl Fn(&str) -> bool,
    ) -> Vec<Reached> {
        let mut walk = walk::Walk::new(self, Extent::Near);
        self.enter_arguments(&mut walk, function, arguments, wanted);
        walk.run().objects
    }

    /// Whether the structure `id` is the driver's.
    fn is_own(&self, id: TypeId) -> bool {
        self.types.is_own(id) || self.own_too.all.contains(&id)
    }

    fn struct_named(&self, name: &'static str) -> Option<TypeId> {
        self.names.find_struct(self.types, name)
    }

    fn find_path(&self, of: TypeId, path: &'static str) -> Option<Arc<Path>> {
        self.names.find_path(self.types, of, path)
    }

    fn member_named(&self, of: TypeId, name: &'static str) -> Option<Member> {
        self.names.find_member(self.types, of, name)
    }

    fn enter_arguments(
        &self,
        walk: &mut walk::Walk<'_, '_, M, A>,
        function: &Function<'_>,
        arguments: &[u64],
        wanted: impl Fn(&str) -> bool,
    ) {
        let names = function
            .params
            .iter()
            .map(|p| (p.type_id, self.types.string(p.name_at)));
        for (index, ((type_id, name), value)) in names.zip(arguments).enumerate() {
            // A structure passed by value takes two registers or the stack: no telling from here.
            if self.types.size_of(type_id).is_some_and(|bytes| bytes > 8) {
                break;
            }
            if let Some(to) = self.types.pointee(type_id) {
                let to = self.untyped(function, index, to).unwrap_or(to);
                let name = match name {
                    "" => format!("argument {index}"),
                    name => name.to_owned(),
                };
                if wanted(&name) {
                    walk.enter(Gva(*value), to, name);
                }
            }
        }
    }

    /// The driver's structure that an argument points at whose type says only that it points
    /// somewhere, `to`.
    fn untyped(&self, function: &Function<'_>, index: usize, to: TypeId) -> Option<TypeId> {
        if !matches!(self.types.resolve(to), Some((_, Kind::Void))) {
            return None;
        }
        let returns = self.types.names_of(function.returns);
        let rules = self.rules.untyped.iter();
        let mut rules = rules
            .filter(|rule| usize::from(rule.argument) == index && returns.contains(&rule.returns));
        rules.find_map(|rule| {
            let ids = rule.is.iter().filter_map(|name| self.struct_named(name));
            ids.into_iter().find(|id| self.is_own(*id))
        })
    }

    /// What is reached from an object that the driver has a pointer to.
    pub fn objects_held(&self, held: Start) -> Found {
        let mut walk = walk::Walk::new(self, Extent::All);
        walk.enter_held(held);
        walk.run()
    }

    /// What is reached from `starts` alone.
    pub fn objects_from(&self, starts: &[Start]) -> Found {
        let mut walk = walk::Walk::new(self, Extent::All);
        for start in starts {
            walk.enter(start.at, start.type_id, start.name.clone());
        }
        walk.run()
    }
}
