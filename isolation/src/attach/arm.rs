//! Arming and disarming: what has to be known of the guest, and the patches in P and in the guest.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use devices::dma::GuestMemory;
use vm_memory::{Address, Bytes};

use super::AttachError;
use super::plan::Plan;
use super::request::Strength;
use crate::dispatch::armed::Gate;
use crate::domain::Domain;
use crate::domain::error::DomainError;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::btf::Btf;
use crate::guest::fault_tables::FaultTables;
use crate::guest::gate::{FTRACE_NOP, GATE_BYTES, clear_gate, set_gate};
use crate::guest::memory_model::MemoryModel;
use crate::guest::modules::{ModuleError, ModuleLayout};
use crate::guest::paging::VirtMemory;
use crate::guest::symbols::SymbolTable;
use crate::policy::abort_value::{AbortReturn, abort_return_named, is_transmit_named};
use crate::policy::call::DriverPolicy;
use crate::status::EntryStatus;

/// Where the text of a module with these sections begins.
pub(crate) fn text_of(module: &str, sections: &[(String, u64)]) -> Result<Gva, ModuleError> {
    let text = sections.iter().find(|(name, _)| name == ".text");
    let text = text.ok_or_else(|| ModuleError::NoSections(module.to_owned()))?;
    Ok(Gva(text.1))
}

/// Tables of the kernel's expected faults; where they cannot be read, no fault is expected.
pub(crate) fn fault_tables(
    virt: &VirtMemory<'_, GuestMemory>,
    symbols: &SymbolTable,
) -> FaultTables {
    let range = |first: &str, end: &str| {
        let at = |name: &str| symbols.kernel_symbol(name).map(|symbol| symbol.at);
        GvaRange::until(at(first)?, at(end)?)
    };
    let mut tables = FaultTables::default();
    if let Some(range) = range("__start___ex_table", "__stop___ex_table")
        && let Err(error) = tables.add_exceptions(virt, range)
    {
        tracing::warn!("the guest's exception table cannot be read: {error}");
    }
    if let Some(range) = range("__start___bug_table", "__stop___bug_table")
        && let Err(error) = tables.add_bugs(virt, range)
    {
        tracing::warn!("the guest's bug table cannot be read: {error}");
    }
    tables
}

/// What the driver's calls may write; otherwise what is not known of the guest that it takes.
pub(crate) fn driver_policy(
    types: Arc<Btf>,
    layout: &ModuleLayout,
    symbols: &SymbolTable,
    virt: &VirtMemory<'_, GuestMemory>,
) -> Result<DriverPolicy, String> {
    let memory = MemoryModel::new(&types, symbols, virt).map_err(|error| error.to_string())?;
    let text = layout.read_text(virt);
    let text = text.map_err(|error| format!("its text cannot be read: {error}"))?;
    DriverPolicy::new(types, memory, layout, symbols)
        .map(|policy| policy.with_variables(&text.parts(), layout, symbols, *virt))
        .map_err(|error| error.to_string())
}

/// Patches P's copies of driver and kernel text. Functions that can wait until a call has ended are
/// `waiting`, with what their callers are told.
pub(crate) fn prepare(
    domain: &mut Domain,
    plan: &Plan,
    waiting: HashMap<u64, u32>,
) -> Result<(), DomainError> {
    for gate in plan.gates.iter().chain(&plan.guards) {
        domain.patch(gate.site.gate.0, &FTRACE_NOP)?;
    }
    domain.let_wait(waiting);
    let measured = plan.measured.iter();
    domain.measure(measured.map(|(at, measure)| (at.0, *measure)).collect());
    domain.call_directly(plan.modest.iter().map(|function| function.0));
    for (site, target) in &plan.redirects {
        domain.redirect(site.0, target.0)?;
    }
    for function in &plan.guest_only {
        domain.trap_function(function.0)?;
    }
    for (function, unit) in &plan.sleeps {
        domain.sleep_function(function.0, *unit)?;
    }
    for function in &plan.skipped {
        domain.skip_function(function.0)?;
    }
    if let Some(console) = &plan.console {
        domain.defer_console(console)?;
    }
    for function in &plan.fatal {
        domain.forbid_function(function.0)?;
    }
    Ok(())
}

/// The gates and guards of a plan, with what failed calls return; where they are in the guest's
/// memory is not looked up yet.
pub(crate) fn gates_of(
    plan: &Plan,
    types: Option<&Btf>,
    strength: &mut Strength,
) -> HashMap<u64, Gate> {
    let isolated = plan.gates.iter().map(|gate| (gate, false));
    let guards = plan.guards.iter().map(|gate| (gate, true));
    let mut gates = HashMap::new();
    for (gate, is_guard) in isolated.chain(guards) {
        let aborted = types.and_then(|types| abort_return_named(types, &gate.name));
        if aborted.is_none() && !is_guard {
            strength.untyped.push(gate.name.clone());
        }
        gates.insert(
            gate.site.gate.0,
            Gate {
                gpa: 0,
                body: gate.site.body().0,
                entry: EntryStatus::new(&gate.name),
                aborted: aborted.unwrap_or(AbortReturn::UNKNOWN),
                rests: false,
                is_guard,
                transmits: types.is_some_and(|types| is_transmit_named(types, &gate.name)),
                failed_last: false,
            },
        );
    }
    strength.untyped.sort_unstable();
    gates
}

/// Writes the gates into the guest's text; all or none. Guards are looked up, and set later.
pub(crate) fn set_gates(
    gates: &mut HashMap<u64, Gate>,
    virt: &VirtMemory<'_, GuestMemory>,
    memory: &GuestMemory,
) -> Result<(), AttachError> {
    // A hundred of them are on a dozen pages.
    let mut pages = HashMap::new();
    for (at, gate) in gates.iter_mut() {
        let not_mapped = || DomainError::TextNotMapped(*at);
        let page = Gva(*at).page();
        let frame = match pages.entry(page) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(place) => {
                let translation = virt.space.walk(virt.memory, page);
                *place.insert(translation.map_err(|_| not_mapped())?.gpa)
            }
        };
        let offset = *at - page.0;
        // A NOP that crosses a page would need two translations; functions are 16-byte aligned.
        let fits = offset <= 0x1000 - GATE_BYTES as u64;
        let gpa = frame.checked_add(offset).filter(|_| fits);
        let gpa = gpa.ok_or_else(not_mapped)?;
        let mut now = [0; GATE_BYTES];
        let read = virt.memory.read_slice(&mut now, gpa);
        if read.is_err() || now != FTRACE_NOP {
            return Err(not_mapped().into());
        }
        gate.gpa = gpa.0;
    }
    let isolated = || gates.values().filter(|gate| !gate.is_guard);
    for (written, gate) in isolated().enumerate() {
        if !set_gate(memory, gate.gpa) {
            for gate in isolated().take(written) {
                clear_gate(memory, gate.gpa);
            }
            return Err(DomainError::TextNotMapped(gate.gpa).into());
        }
    }
    Ok(())
}
