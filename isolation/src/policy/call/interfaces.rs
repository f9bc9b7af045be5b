//! The network interfaces that are a driver's.

use crate::guest::addr::{Gva, GvaRange};
use crate::guest::btf::{Btf, TypeId};
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;
use crate::guest::symbols::SymbolTable;

/// Most interfaces of the guest that are looked at.
const MAX_LISTED: usize = 4096;

/// Where the kernel lists its interfaces, and how an interface tells whose it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct InterfaceList {
    /// `struct net_device`.
    pub(super) type_id: TypeId,
    /// `init_net.dev_base_head`.
    head: Gva,
    /// `net_device.dev_list`.
    link: u64,
    /// `net_device.netdev_ops`.
    operations: u64,
}

impl InterfaceList {
    /// `None` for a kernel without network, or with another list.
    pub(super) fn new(types: &Btf, symbols: &SymbolTable) -> Option<Self> {
        let offset = |of: TypeId, name: &str| {
            let member = types.find_member(of, name)?;
            Some(u64::from(member.bit_offset / 8))
        };
        let type_id = types.find_struct("net_device")?;
        let namespace = symbols.kernel_symbol("init_net")?.at;
        Some(Self {
            type_id,
            head: namespace.checked_add(offset(types.find_struct("net")?, "dev_base_head")?)?,
            link: offset(type_id, "dev_list")?,
            operations: offset(type_id, "netdev_ops")?,
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

    /// The interfaces that have their operations in one of `sections`. Stops where the list is
    /// damaged.
    pub(super) fn find<M: GuestPhys>(
        &self,
        virt: VirtMemory<'_, M>,
        sections: &[GvaRange],
    ) -> Vec<Gva> {
        let mut found = Vec::new();
        let mut at = self.head;
        for _ in 0..MAX_LISTED {
            let Ok(next) = virt.read_u64(at) else { break };
            at = Gva(next);
            if at == self.head {
                break;
            }
            let Some(interface) = at.checked_sub(self.link) else {
                break;
            };
            if self.is_drivers(virt, interface, sections) {
                found.push(interface);
            }
        }
        found
    }
}
