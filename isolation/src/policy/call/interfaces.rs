//! The network interfaces that are a driver's.

use super::super::abort_value::REGISTER_ARGUMENTS;
use super::super::reach::{Start, member_range};
use super::{CallMemory, DriverPolicy};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::btf::{Btf, TypeId};
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;
use crate::guest::symbols::SymbolTable;

/// Most interfaces of the guest that are looked at.
const MAX_LISTED: usize = 4096;

/// Most network interfaces that are remembered as the driver's.
const MAX_INTERFACES: usize = 64;

/// Bytes of a processor's count of references to an interface (`int`).
const REFERENCE_BYTES: u64 = 4;

/// Where the kernel lists its interfaces, and how an interface tells whose it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct InterfaceList {
    /// `struct net_device`.
    pub(super) type_id: TypeId,
    /// `init_net`.
    namespace: Gva,
    /// `net.dev_base_head`.
    head: u64,
    /// `net_device.dev_list`.
    link: u64,
    /// `net_device.netdev_ops`.
    operations: u64,
    /// `net_device.pcpu_refcnt`, a pointer to per-CPU data, where the kernel has it.
    references: Option<u64>,
    /// `net_device.priv_flags`.
    flags: Option<GvaRange>,
}

impl InterfaceList {
    /// `None` for a kernel without network, or with another list.
    pub(super) fn new(types: &Btf, symbols: &SymbolTable) -> Option<Self> {
        let offset = |of: TypeId, name: &str| {
            let member = types.find_member(of, name)?;
            Some(u64::from(member.bit_offset / 8))
        };
        let type_id = types.find_struct("net_device")?;
        Some(Self {
            type_id,
            namespace: symbols.kernel_symbol("init_net")?.at,
            head: offset(types.find_struct("net")?, "dev_base_head")?,
            link: offset(type_id, "dev_list")?,
            operations: offset(type_id, "netdev_ops")?,
            references: offset(type_id, "pcpu_refcnt"),
            flags: member_range(types, type_id, "priv_flags"),
        })
    }

    /// Whether the interface at `at` has its operations in one of `sections`.
    pub(super) fn is_drivers<M: GuestPhys>(
        &self,
        virt: VirtMemory<'_, M>,
        at: Gva,
        sections: &[GvaRange],
    ) -> bool {
        let operations = at
            .checked_add(self.operations)
            .and_then(|at| virt.read_u64(at).ok());
        operations.is_some_and(|at| sections.iter().any(|section| section.contains(Gva(at))))
    }

    /// The interfaces in the network `namespaces` (in the first one if they are not known) that
    /// have their operations in one of `sections`.
    fn find<M: GuestPhys>(
        &self,
        virt: VirtMemory<'_, M>,
        namespaces: &[Gva],
        sections: &[GvaRange],
    ) -> Vec<Gva> {
        let mut found = self.all(virt, namespaces);
        found.retain(|interface| self.is_drivers(virt, *interface, sections));
        found
    }

    /// All interfaces there. Stops in each namespace where its list is damaged.
    fn all<M: GuestPhys>(&self, virt: VirtMemory<'_, M>, namespaces: &[Gva]) -> Vec<Gva> {
        let first = [self.namespace];
        let namespaces = match namespaces.is_empty() {
            true => &first,
            false => namespaces,
        };
        let mut found = Vec::new();
        for head in namespaces.iter().filter_map(|at| at.checked_add(self.head)) {
            let mut at = head;
            while found.len() < MAX_LISTED {
                let Ok(next) = virt.read_u64(at) else { break };
                at = Gva(next);
                if at == head {
                    break;
                }
                let Some(interface) = at.checked_sub(self.link) else {
                    break;
                };
                found.push(interface);
            }
        }
        found
    }

    /// Whether `at` is what drivers write of the interfaces of others: this processor's count of
    /// references to one (`dev_hold`), or what one is to others (`IFF_MACVLAN_PORT`, which the
    /// driver of the upper interface sets).
    pub(super) fn is_anybodys<M: GuestPhys>(
        &self,
        virt: VirtMemory<'_, M>,
        namespaces: &[Gva],
        per_cpu_base: u64,
        at: Gva,
    ) -> bool {
        let count = |interface: &Gva| {
            let pointer = virt
                .read_u64(interface.checked_add(self.references?)?)
                .ok()?;
            GvaRange::new(Gva(per_cpu_base.wrapping_add(pointer)), REFERENCE_BYTES)
        };
        let flags = |interface: &Gva| {
            let flags = self.flags?;
            GvaRange::new(interface.checked_add(flags.first().0)?, flags.len_bytes())
        };
        let all = self.all(virt, namespaces);
        let mut shared = all.iter().flat_map(|at| [count(at), flags(at)]);
        shared.any(|range| range.is_some_and(|range| range.contains(at)))
    }
}

impl DriverPolicy {
    /// Looks, once in a call, for interfaces of the driver.
    pub(super) fn list_interfaces<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>) {
        let Some(list) = self.list.filter(|_| !self.listed) else {
            return;
        };
        self.listed = true;
        let namespaces = self.namespaces.as_ref();
        let nets = namespaces.map_or_else(Vec::new, |all| all.all(memory.private));
        for at in list.find(memory.private, &nets, &self.sections) {
            self.add_interface(Start {
                at,
                type_id: list.type_id,
                name: "interface".into(),
            });
        }
    }

    /// The interfaces of the driver that are known, and still its.
    pub(super) fn known_interfaces<M: GuestPhys>(&self, memory: &CallMemory<'_, M>) -> Vec<Start> {
        let is_drivers = |start: &&Start| {
            self.list
                .is_some_and(|list| list.is_drivers(memory.private, start.at, &self.sections))
        };
        self.interfaces.iter().filter(is_drivers).cloned().collect()
    }

    /// Interrupt handlers, timers and work get pointers whose types say nothing; the interfaces
    /// that earlier calls were about tell what they may write.
    pub(super) fn remember_interfaces(
        &mut self,
        function: &str,
        arguments: &[u64; REGISTER_ARGUMENTS],
    ) {
        self.know_interface_arguments(function);
        let which = self.interface_arguments.get(function).into_iter().flatten();
        let found: Vec<Gva> = which
            .filter_map(|index| arguments.get(*index))
            .filter(|at| **at != 0)
            .map(|at| Gva(*at))
            .collect();
        if found.is_empty() {
            return;
        }
        let Some(type_id) = self.names.find_struct(&self.types, "net_device") else {
            return;
        };
        for at in found {
            self.add_interface(Start {
                at,
                type_id,
                name: "interface".into(),
            });
        }
    }

    /// Finds out, once, which arguments of `function` are pointers to interfaces.
    pub(super) fn know_interface_arguments(&mut self, function: &str) {
        if !self.interface_arguments.contains_key(function) {
            let which = self.find_interface_arguments(function);
            self.interface_arguments.insert(function.to_owned(), which);
        }
    }

    /// Which arguments of `function` are pointers to interfaces.
    pub(super) fn find_interface_arguments(&self, function: &str) -> Vec<usize> {
        let function = self.types.find_function(function);
        let Some((function, interface)) = function.zip(self.types.find_struct("net_device")) else {
            return Vec::new();
        };
        let points_to_one = |type_id| {
            let to = self.types.pointee(type_id);
            let to = to.and_then(|to| self.types.resolve(to));
            to.is_some_and(|(id, _)| id == interface)
        };
        let params = function.params.iter().take(REGISTER_ARGUMENTS).enumerate();
        params
            .filter(|(_, param)| points_to_one(param.type_id))
            .map(|(index, _)| index)
            .collect()
    }

    /// Remembers an object of the driver's that every call may start from.
    pub(super) fn add_interface(&mut self, start: Start) {
        if !self.interfaces.iter().any(|known| known.at == start.at) {
            if self.interfaces.len() >= MAX_INTERFACES {
                self.interfaces.remove(0);
            }
            self.interfaces.push(start);
        }
    }
}
