//! The private VM of a module, made while the guest runs.

use std::sync::Arc;

use devices::dma::GuestMemory;
use kvm_ioctls::Kvm;

use super::AttachError;
use super::arm::prepare;
use super::kernel_functions::{LINUX, WaitsForOthers};
use super::plan::Plan;
use super::registers::Registers;
use super::request::{Contain, IsolateRequest};
use crate::domain::host_memory::HostMemory;
use crate::domain::waiting::Waiting;
use crate::domain::{Domain, DomainConfig};
use crate::guest::addr::GvaRange;
use crate::guest::btf::Btf;
use crate::guest::memory_model::mapping_of_memory;
use crate::guest::paging::VirtMemory;
use crate::guest::symbols::SymbolTable;
use crate::policy::handed_over;

/// The private VM with its copies of driver and kernel text patched.
pub(super) fn make_domain(
    (kvm, host_memory): (&Kvm, &HostMemory),
    request: &IsolateRequest,
    registers: &Registers,
    plan: &Plan,
    memory: &Arc<GuestMemory>,
) -> Result<Domain, AttachError> {
    let mut domain = Domain::new(DomainConfig {
        kvm,
        memory: memory.clone(),
        cpuid: &registers.cpuid,
        vcpus: registers.vcpus,
        sregs: &registers.sregs,
        monitor_gpa: vmm::layout::UNUSED.0,
        moving: match request.memory_moves {
            true => {
                let virt = VirtMemory {
                    space: registers.space,
                    memory: memory.as_ref(),
                };
                mapping_of_memory(&request.symbols, &virt)
            }
            false => None,
        },
        host_memory: host_memory.clone(),
        driver_text: plan.text_pages.iter().map(|page| page.0).collect(),
        each_store: request.contain == Contain::Exact,
        common: plan.common_pages.iter().map(|page| page.0).collect(),
        kick_signal: vmm::kick_signal(),
    })?;
    let types = request.types.as_ref();
    let answers = types.map(|types| handed_over::answers(types, &request.symbols));
    prepare(&mut domain, plan, answers.unwrap_or_default())?;
    if let Some(types) = &request.types {
        for waits in &LINUX.waits_for_others {
            if let Some(waiting) = waiting(waits, &request.symbols, types) {
                domain.wait_in_guest(&waiting)?;
            }
        }
    }
    for name in &request.guest_only {
        let symbol = request.symbols.kernel_symbol(name);
        let symbol = symbol.ok_or_else(|| AttachError::NoSuchFunction(name.clone()))?;
        domain.trap_function(symbol.at.0)?;
    }
    Ok(domain)
}

/// How the private VM has a function that waits for others, if this kernel has it so and there is
/// room for that.
fn waiting(waits: &WaitsForOthers, symbols: &SymbolTable, types: &Btf) -> Option<Waiting> {
    let function = symbols.kernel_symbol(waits.name)?.at;
    let room = GvaRange::new(function, Waiting::MAX_CODE_BYTES)?;
    symbols
        .extent(function, room)
        .filter(|extent| *extent == room)?;
    let [outer, inner] = waits.member;
    let outer = types.find_member(types.find_struct(waits.of)?, outer)?;
    let inner = types.find_member(outer.type_id, inner)?;
    types.size_of(inner.type_id).filter(|bytes| *bytes == 4)?;
    let offset = u64::from(outer.bit_offset / 8) + u64::from(inner.bit_offset / 8);
    let bit = u32::try_from(types.enum_value(waits.bit)?).ok()?;
    Waiting::new(function.0, offset, bit)
}
