//! The registers and tables of a stopped guest that a domain is made with.

use devices::dma::GuestMemory;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_sregs};

use vmm::PausedVcpus;

use super::arm::text_of;
use super::live;
use super::request::IsolateRequest;
use super::{AttachError, physical_bits};
use crate::guest::addr::Gva;
use crate::guest::paging::AddressSpace;

/// A vCPU's control registers and the tables that the guest is looked at through.
pub(super) struct Registers {
    pub cpuid: CpuId,
    /// How many vCPUs there are.
    pub vcpus: u8,
    pub physical_bits: u8,
    pub sregs: kvm_sregs,
    pub space: AddressSpace,
}

/// Where things are that are looked up before the guest is stopped.
pub(super) struct KnownPlaces {
    /// The module's text.
    text: Gva,
    /// The kernel's own tables.
    boot_tables: Option<Gva>,
}

impl KnownPlaces {
    pub fn of(request: &IsolateRequest) -> Result<Self, AttachError> {
        Ok(Self {
            text: text_of(&request.module, &request.sections)?,
            boot_tables: live::boot_tables_at(&request.symbols),
        })
    }
}

impl Registers {
    pub fn of(
        vcpus: &mut PausedVcpus<'_>,
        known: &KnownPlaces,
        memory: &GuestMemory,
    ) -> Result<Self, AttachError> {
        // Their numbers are bytes, too.
        let count = u8::try_from(vcpus.count()).unwrap_or(u8::MAX);
        let vcpu = vcpus.get(0).ok_or(AttachError::NoKernelTables)?;
        let cpuid = vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| AttachError::Kvm("KVM_GET_CPUID2", error))?;
        let physical_bits = physical_bits(&cpuid);
        let text = known.text;
        let (mut sregs, space) = live::kernel_tables(vcpus, physical_bits, text, memory)?;
        // Tables that stay while the guest runs, if there are any.
        let boot_tables = known.boot_tables;
        let lasting = boot_tables.and_then(|at| live::boot_tables(at, space, text, memory));
        let space = match lasting {
            Some(lasting) => {
                sregs.cr3 = lasting.root.0;
                lasting
            }
            None => space,
        };
        Ok(Self {
            cpuid,
            vcpus: count,
            physical_bits,
            sregs,
            space,
        })
    }
}
