//! The guest's network namespaces: what inline functions of the kernel write in them, and what a
//! driver keeps in each.

use super::interfaces::InterfaceList;
use super::{CallMemory, DriverPolicy};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{Allocations, FindAllocation};
use crate::guest::btf::Btf;
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;
use crate::guest::symbols::SymbolTable;
use crate::policy::range_table::ObjectKind;
use crate::policy::reach::reference_counts;

/// Most namespaces that are looked at.
const MAX_NAMESPACES: usize = 1024;

/// Most kinds of data of each namespace that one driver has.
const MAX_KINDS: usize = 64;

/// Most of what all drivers together keep in a namespace that is believed (`max_gen_ptrs`,
/// net/core/net_namespace.c).
const MAX_NUMBER: u64 = 4096;

/// What a driver's variables end with that have the number of what it keeps in each namespace
/// (`net_generic`, include/net/netns/generic.h).
const NUMBERS: &str = "_net_id";

/// Where a namespace has what is set for all its interfaces together, which inline functions write
/// (`IPV4_DEVCONF_ALL`, include/linux/inetdevice.h).
const SETTINGS: &[(&str, &str)] = &[("ipv4", "devconf_all"), ("ipv6", "devconf_all")];

/// Where the guest's kernel has its network namespaces.
#[derive(Debug)]
pub(super) struct Namespaces {
    /// `init_net`.
    first: Gva,
    /// `net_namespace_list`, if it is known.
    list: Option<Gva>,
    /// Bytes of a `struct net`.
    bytes: u64,
    /// `net.list`.
    link: u64,
    /// `net.gen`.
    generic: u64,
    /// Counts of references, in a `struct net`.
    references: Vec<GvaRange>,
    /// Pointers to settings in a `struct net`, and how many bytes these have.
    settings: Vec<(u64, u64)>,
    /// The driver's variables with numbers of what it keeps in each.
    numbers: Vec<Gva>,
}

impl Namespaces {
    /// `None` for a kernel without network, or with other namespaces.
    pub(super) fn new(types: &Btf, symbols: &SymbolTable, module: &str) -> Option<Self> {
        let net = types.find_struct("net")?;
        let offset = |name| {
            let member = types.find_member(net, name)?;
            Some(u64::from(member.bit_offset / 8))
        };
        let references = reference_counts(types, net);
        let numbers = symbols.in_module(module);
        let numbers = numbers.filter(|symbol| symbol.name.ends_with(NUMBERS));
        let list = symbols.kernel_symbol("net_namespace_list");
        let settings = SETTINGS.iter().filter_map(|(of, member)| {
            let outer = types.find_member(net, of)?;
            let inner = types.find_member(types.resolve(outer.type_id)?.0, member)?;
            let bits = u64::from(outer.bit_offset) + u64::from(inner.bit_offset);
            Some((bits / 8, types.size_of(types.pointee(inner.type_id)?)?))
        });
        Some(Self {
            first: symbols.kernel_symbol("init_net")?.at,
            list: list.map(|symbol| symbol.at),
            bytes: types.size_of(net)?,
            link: offset("list")?,
            generic: offset("gen")?,
            references,
            settings: settings.collect(),
            numbers: numbers.map(|symbol| symbol.at).take(MAX_KINDS).collect(),
        })
    }

    /// All namespaces. Stops where the list is damaged.
    pub(super) fn all<M: GuestPhys>(&self, virt: VirtMemory<'_, M>) -> Vec<Gva> {
        let mut found = vec![self.first];
        let Some(head) = self.list else { return found };
        let mut at = head;
        while found.len() < MAX_NAMESPACES {
            let Some(next) = virt.read_u64(at).ok().map(Gva).filter(|at| *at != head) else {
                break;
            };
            at = next;
            let Some(net) = at.checked_sub(self.link) else {
                break;
            };
            if net != self.first {
                found.push(net);
            }
        }
        found
    }

    /// The count of references that `at` is part of, in one of `all`.
    fn reference_count(&self, all: &[Gva], at: Gva) -> Option<GvaRange> {
        let net = all
            .iter()
            .find(|net| at.0.wrapping_sub(net.0) < self.bytes)?;
        let offset = Gva(at.0 - net.0);
        let count = self
            .references
            .iter()
            .find(|count| count.contains(offset))?;
        GvaRange::new(net.checked_add(count.first().0)?, count.len_bytes())
    }

    /// The settings that `at` is part of, of one of `all`.
    fn settings<M: GuestPhys>(
        &self,
        virt: VirtMemory<'_, M>,
        all: &[Gva],
        at: Gva,
    ) -> Option<GvaRange> {
        let mut settings = all.iter().flat_map(|net| {
            self.settings.iter().filter_map(|(offset, bytes)| {
                let settings = virt.read_u64(net.checked_add(*offset)?).ok()?;
                GvaRange::new(Gva(settings), *bytes)
            })
        });
        settings.find(|settings| settings.contains(at))
    }

    /// Where what the driver keeps in each of `all` begins.
    fn kept<'a, M: GuestPhys>(
        &'a self,
        virt: VirtMemory<'a, M>,
        all: &'a [Gva],
    ) -> impl Iterator<Item = Gva> + 'a {
        let read = move |at: Gva, offset: u64| virt.read_u64(at.checked_add(offset)?).ok();
        let numbers = self.numbers.iter().filter_map(move |at| {
            let number = read(*at, 0)? & u64::from(u32::MAX);
            (number < MAX_NUMBER).then_some(number)
        });
        numbers.flat_map(move |number| {
            all.iter().filter_map(move |net| {
                let generic = Gva(read(*net, self.generic)?);
                read(generic, number * 8).map(Gva)
            })
        })
    }
}

impl DriverPolicy {
    /// Opens the count of references to a namespace, what drivers write of the interfaces in it, or
    /// what the driver keeps in one, if `at` lies there.
    pub(super) fn open_in_namespace<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        at: Gva,
    ) -> bool {
        let Some(namespaces) = &self.namespaces else {
            return false;
        };
        let all = namespaces.all(memory.private);
        let base = memory.per_cpu_base;
        let of_interface = |list: InterfaceList| list.is_anybodys(memory.private, &all, base, at);
        if self.list.is_some_and(of_interface) {
            let label = "references to an interface, or its flags".into();
            return self.open(GvaRange::aligned(at, 1), ObjectKind::Other, label);
        }
        if let Some(count) = namespaces.reference_count(&all, at) {
            let label = "references to a network namespace".into();
            return self.open(count, ObjectKind::Other, label);
        }
        if let Some(settings) = namespaces.settings(memory.private, &all, at) {
            let label = "settings of a network namespace".into();
            return self.open(settings, ObjectKind::Other, label);
        }
        let allocations = Allocations::new(&self.memory, memory.private);
        let found = namespaces.kept(memory.private, &all).find_map(|kept| {
            let found = allocations.allocation_at(kept)?.range;
            found.contains(at).then_some(found)
        });
        let Some(range) = found else { return false };
        let label = "what the driver keeps in a network namespace".into();
        self.open(range, ObjectKind::Allocated, label)
    }
}
