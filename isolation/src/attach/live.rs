//! Page tables that the guest uses now.
//!
//! Between two calls nothing is known of the tables that the last call ran on: the process that
//! they belong to may have ended, and their memory may be somebody else's. What is translated then
//! goes through the tables of a vCPU that is stopped, which nobody has given up, and of those only
//! ones that map what is asked for.

use devices::dma::GuestMemory;
use kvm_bindings::kvm_sregs;

use vmm::PausedVcpus;

use super::AttachError;
use crate::dispatch::armed::Armed;
use crate::guest::addr::Gva;
use crate::guest::paging::{AddressSpace, TABLE_BYTES};
use crate::guest::symbols::SymbolTable;

/// Bit of CR3 that tells the user's tables from the kernel's beside them where the kernel isolates
/// them from each other (`PTI_USER_PGTABLE_BIT`, arch/x86/include/asm/processor-flags.h).
const USER_TABLES: u64 = 0x1000;

/// The address space of a vCPU with these registers in which `probe`, an address of the kernel's or
/// a module's, is mapped, and the CR3 that it begins at.
pub(crate) fn tables_with(
    sregs: &kvm_sregs,
    physical_bits: u8,
    probe: Gva,
    memory: &GuestMemory,
) -> Option<(u64, AddressSpace)> {
    let spaces = [sregs.cr3, sregs.cr3 & !USER_TABLES].map(|cr3| {
        let space = AddressSpace::from_registers(cr3, sregs.cr4, sregs.efer, physical_bits);
        (cr3, space)
    });
    let is_paged = |(_, space): &(u64, AddressSpace)| space.walk(memory, probe).is_ok();
    spaces.into_iter().find(is_paged)
}

/// Registers of a vCPU with the kernel's tables, in which `probe` is mapped, and their address
/// space. The first of the stopped vCPUs that has any: one may be off, or have just been started.
pub(crate) fn kernel_tables(
    vcpus: &mut PausedVcpus<'_>,
    physical_bits: u8,
    probe: Gva,
    memory: &GuestMemory,
) -> Result<(kvm_sregs, AddressSpace), AttachError> {
    for vcpu in vcpus.iter_mut() {
        let mut sregs = vcpu
            .get_sregs()
            .map_err(|error| AttachError::Kvm("KVM_GET_SREGS", error))?;
        if let Some((cr3, space)) = tables_with(&sregs, physical_bits, probe, memory) {
            sregs.cr3 = cr3;
            return Ok((sregs, space));
        }
    }
    Err(AttachError::NoKernelTables)
}

impl Armed {
    /// Page tables of a vCPU that is stopped with the kernel and the module mapped.
    pub fn kernel_tables(
        &self,
        vcpus: &mut PausedVcpus<'_>,
        memory: &GuestMemory,
    ) -> Result<(kvm_sregs, AddressSpace), AttachError> {
        let probe = self
            .gates
            .keys()
            .next()
            .ok_or(AttachError::NoKernelTables)?;
        kernel_tables(vcpus, self.guest.physical_bits, Gva(*probe), memory)
    }

    /// Has the domain looked at between calls: through page tables that the guest uses now.
    pub fn follow_tables(
        &mut self,
        vcpus: &mut PausedVcpus<'_>,
        memory: &GuestMemory,
    ) -> Result<(), AttachError> {
        let (sregs, _) = self.kernel_tables(vcpus, memory)?;
        Ok(self.domain.follow_tables(sregs.cr3)?)
    }
}

/// The kernel's own top-level table, which is there as long as the kernel is
/// (arch/x86/include/asm/pgtable_64.h).
const BOOT_TABLES: &str = "init_top_pgt";

/// Where the kernel's own top-level table is, as the symbols say.
pub(crate) fn boot_tables_at(symbols: &SymbolTable) -> Option<Gva> {
    Some(symbols.kernel_symbol(BOOT_TABLES)?.at)
}

/// The kernel's own tables `at` that address of its as an address space, if they are found through
/// `space`, and lead to the same memory for `probe`. They stay when processes go.
pub(crate) fn boot_tables(
    at: Gva,
    space: AddressSpace,
    probe: Gva,
    memory: &GuestMemory,
) -> Option<AddressSpace> {
    let root = space.walk(memory, at).ok()?.gpa;
    let own = AddressSpace { root, ..space };
    let leads_to = |space: &AddressSpace| space.walk(memory, probe).ok().map(|found| found.gpa);
    (root.0.is_multiple_of(TABLE_BYTES) && leads_to(&own) == leads_to(&space)).then_some(own)
}
