//! Puts functions of a live guest's module into a domain, and takes them out again.
//!
//! ```text
//!   isolate: symbols, sections ─► Plan ─► (guest stopped) Domain, patches in P ─► gates in K
//!   call:    gate ─► trap ─► others held, device held ─► Domain::call ─► registers ─► guest
//!   release: (guest stopped) original bytes in K ─► domain gone
//! ```
//!
//! While the guest is stopped for arming or release no call is in a domain: calls run to their end
//! inside the trap handler. Threads that are in the middle of a gated function stay there; only the
//! function's first instruction is replaced.

pub(crate) mod arm;
pub(crate) mod live;
pub mod plan;
mod release;
pub(crate) mod removal;
pub(crate) mod returning;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_sregs};
use vm_memory::GuestMemoryMmap;
use vmm::{Refused, VmHandle};

use crate::compensation::call_loop::CallLoop;
use crate::compensation::effects::KernelModel;
use crate::compensation::transmit_queues::TransmitQueues;
use crate::dispatch::after_fault::FaultPolicy;
use crate::dispatch::armed::Armed;
use crate::dispatch::fault::{Fault, FaultCount, FaultOrder, InstructionAt};
use crate::dispatch::supervisor::Knowledge;
use crate::domain::error::DomainError;
use crate::domain::{Domain, DomainConfig};
use crate::guest::btf::Btf;
use crate::guest::gate::GatePorts;
use crate::guest::modules::{ModuleError, ModuleLayout};
use crate::guest::paging::{AddressSpace, VirtError, VirtMemory};
use crate::guest::symbols::SymbolTable;
use crate::status::ModuleStatus;
use crate::status::report::ViolationReport;
use crate::suspend_resume::{SuspendError, SuspendResume};
use arm::{driver_policy, fault_tables, prepare, set_gates, text_of};
use devices::hold::Holdable;
use plan::{Plan, PlanError, Refusal, Wanted};
use removal::RemovalWatch;

/// Ports of the gates; the first two of [`vmm::trap::TRAP_PORTS`].
pub(crate) const GATE: GatePorts = GatePorts {
    entry: 0xe0,
    returning: 0xe1,
};
/// Length of `out imm8, al`.
pub(crate) const OUT_BYTES: u64 = 2;
/// Size and alignment of a Linux kernel stack on x86-64 (`THREAD_SIZE`) in bytes.
pub(crate) const THREAD_SIZE: u64 = 16 * 1024;
/// How long a release waits for calls that are being taken back or have yet to give things back.
const RELEASE_WAIT: Duration = Duration::from_secs(2);
/// Between two looks at them.
const RELEASE_POLL: Duration = Duration::from_millis(5);
/// Reports kept for each module.
pub(crate) const REPORTS_KEPT: usize = 32;
/// Time that a call may take unless said otherwise.
pub const DEFAULT_BUDGET: Duration = Duration::from_millis(10);

/// Time that a call may wait for and remain atomic unless said otherwise: the waits of an `open` or a reset
/// of the adapter add up to a third of it.
pub const DEFAULT_SLEEP_LIMIT: Duration = Duration::from_millis(100);

/// Why a module could not be isolated or released.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It is isolated already.
    #[error("module {0} is isolated already; release it first")]
    AlreadyIsolated(String),
    /// It is not isolated.
    #[error("module {0} is not isolated")]
    NotIsolated(String),
    /// A function that is not gated.
    #[error("{0} is not an isolated function of the module")]
    NotAnEntry(String),
    /// A function that the guest's kernel does not have, or has twice.
    #[error("the guest's kernel has no function {0}, or several")]
    NoSuchFunction(String),
    /// The machine refused.
    #[error(transparent)]
    Machine(#[from] Refused),
    /// The module's sections.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// What was asked for.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The domain.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] VirtError),
    /// The driver's own functions.
    #[error(transparent)]
    Suspend(#[from] SuspendError),
    /// KVM.
    #[error("KVM refused {0}: {1}")]
    Kvm(&'static str, kvm_ioctls::Error),
    /// The kernel's page tables could not be found.
    #[error("no vCPU of the guest has the kernel's page tables loaded; is the guest up?")]
    NoKernelTables,
}

/// What to isolate.
pub struct IsolateRequest {
    /// Name of the module.
    pub module: String,
    /// Sections and addresses that the guest reports for it.
    pub sections: Vec<(String, u64)>,
    /// The guest's symbols.
    pub symbols: Arc<SymbolTable>,
    /// Types of the kernel and the module. Without them calls may write to all of the heap, and
    /// aborted ones return `-EIO` whatever they are.
    pub types: Option<Arc<Btf>>,
    /// Which functions.
    pub wanted: Wanted,
    /// What is known of the kernel's functions. Without it, or without types, a call that went on in the guest
    /// before it failed cannot be taken back.
    pub model: Option<KernelModel>,
    /// Further kernel functions that only the guest may run.
    pub guest_only: Vec<String>,
    /// The module's device, if it has one; all of them as one if it has several.
    pub device: Option<Arc<dyn Holdable>>,
    /// PCI slots of these devices; the functions' locks are the devices' own.
    pub device_slots: Vec<u8>,
    /// Time that a call may take before it is aborted.
    pub budget: Duration,
    /// Decides what becomes of calls that failed.
    pub policy: Box<dyn FaultPolicy>,
    /// Time that a call may wait for in all, with the guest standing still, and remain atomic.
    pub sleep_limit: Duration,
}

/// What was isolated.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Isolated {
    /// Gated functions.
    pub entries: Vec<String>,
    /// Functions that fit a pattern but cannot be gated.
    pub refused: Vec<Refusal>,
    /// Calls of kernel functions that were redirected to trampolines.
    pub redirected_calls: usize,
    /// The kernel functions that these call, each with all its names.
    pub imports: Vec<Vec<String>>,
    /// Time that the guest was stopped, in microseconds.
    pub stopped_us: u64,
}

/// Isolates modules of one machine.
pub struct Isolator {
    pub(crate) vm: VmHandle,
    modules: Mutex<HashMap<String, Armed>>,
    /// In place as long as there are modules. Taken while `modules` is.
    watch: Mutex<Option<RemovalWatch>>,
    /// Functions of a driver that are being called in the guest. Taken last.
    pub(crate) suspending: Mutex<Option<SuspendResume>>,
}

impl Isolator {
    /// An isolator for the machine behind `vm`, to which it attaches as trap handler.
    pub fn attach(vm: VmHandle) -> Result<Arc<Self>, Refused> {
        let isolator = Arc::new(Self {
            vm: vm.clone(),
            modules: Mutex::new(HashMap::new()),
            watch: Mutex::new(None),
            suspending: Mutex::new(None),
        });
        vm.attach_trap_handler(isolator.clone())?;
        Ok(isolator)
    }

    /// Puts functions of a module into a domain of their own.
    pub fn isolate(&self, request: IsolateRequest) -> Result<Isolated, AttachError> {
        if self.modules().contains_key(&request.module) {
            return Err(AttachError::AlreadyIsolated(request.module));
        }
        let memory = self.vm.ram().memory().clone();
        let start = Instant::now();
        let mut isolated = self.vm.with_paused(|vcpus| {
            let vcpu = vcpus.get(0).ok_or(AttachError::NoKernelTables)?;
            let cpuid = vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(|error| AttachError::Kvm("KVM_GET_CPUID2", error))?;
            let physical_bits = physical_bits(&cpuid);
            let text = text_of(&request.module, &request.sections)?;
            let (sregs, space) = live::kernel_tables(vcpus, physical_bits, text, &memory)?;
            let virt = VirtMemory {
                space,
                memory: &*memory,
            };
            let layout = ModuleLayout::new(&request.module, &request.sections, None, &virt)?;
            let text = layout.read_text(&virt)?;
            let types = request.types;
            let policy = types
                .clone()
                .and_then(|types| driver_policy(types, &layout, &request.symbols, &virt));
            // Only calls that can be taken back keep packets out.
            let may_keep_out = policy.as_ref().filter(|_| request.model.is_some());
            let is_guarded =
                |name: &str| may_keep_out.is_some_and(|policy| policy.is_transmit(name));
            let (wanted, symbols) = (&request.wanted, &request.symbols);
            let plan = Plan::new(wanted, &layout, &text, symbols, &is_guarded)?;
            let mut domain = Domain::new(DomainConfig {
                kvm: self.vm.kvm(),
                memory: memory.clone(),
                cpuid: &cpuid,
                sregs: &sregs,
                monitor_gpa: 1 << (u32::from(physical_bits.clamp(36, 52)) - 1),
                driver_text: plan.text_pages.iter().map(|page| page.0).collect(),
                thunks: plan.thunk_pages.iter().map(|page| page.0).collect(),
                kick_signal: vmm::kick_signal(),
            })?;
            prepare(&mut domain, &plan)?;
            for name in &request.guest_only {
                let symbol = request.symbols.kernel_symbol(name);
                let symbol = symbol.ok_or_else(|| AttachError::NoSuchFunction(name.clone()))?;
                domain.trap_function(symbol.at.0)?;
            }
            let knowledge = Knowledge::new(
                &layout,
                request.symbols.clone(),
                fault_tables(&virt, &request.symbols),
            );
            let isolated = Isolated {
                entries: plan.gates.iter().map(|gate| gate.name.clone()).collect(),
                refused: plan.refused.clone(),
                redirected_calls: plan.redirects.len(),
                imports: knowledge.names_of(plan.redirects.iter().map(|(_, target)| *target)),
                stopped_us: 0,
            };
            let effects = request.model.as_ref().zip(types.as_deref());
            let effects = effects.map(|(model, types)| model.resolve(&request.symbols, types));
            let gates = set_gates(&plan, &virt, &memory, policy.as_ref())?;
            let armed = Armed {
                domain,
                knowledge,
                policy,
                physical_bits,
                gates,
                guarding: false,
                spilled: HashMap::new(),
                guest_calls: HashMap::new(),
                returning: Vec::new(),
                queues: types
                    .as_deref()
                    .map_or_else(TransmitQueues::default, |types| {
                        TransmitQueues::new(types, &request.symbols)
                    }),
                call_loop: effects
                    .is_some()
                    .then(|| CallLoop::place(&layout, &virt))
                    .flatten(),
                effects,
                calls: plan
                    .redirects
                    .iter()
                    .map(|(site, target)| (site.0, *target))
                    .collect(),
                fault_policy: request.policy,
                fault: None,
                again: None,
                stopped: false,
                device: request.device,
                device_slots: request.device_slots,
                budget: request.budget,
                sleep_limit: request.sleep_limit,
                withholding: false,
                outside_kept: false,
                reports: VecDeque::new(),
                violations: 0,
                rolled_back: None,
                broken: None,
            };
            self.modules().insert(request.module, armed);
            let mut watch = self.watch();
            if let (None, Some(types)) = (*watch, types) {
                *watch = RemovalWatch::set(&types, &request.symbols, &virt);
            }
            Ok::<_, AttachError>(isolated)
        })??;
        isolated.stopped_us = start.elapsed().as_micros() as u64;
        Ok(isolated)
    }

    /// Takes the gates of a module out and its domain down. The guest's memory is as before.
    pub fn release(&self, module: &str) -> Result<ModuleStatus, AttachError> {
        let memory = self.vm.ram().memory().clone();
        let deadline = Instant::now() + RELEASE_WAIT;
        let armed = loop {
            let armed = self.vm.with_paused(|vcpus| {
                let is_busy = self.modules().get(module).is_some_and(Armed::is_busy);
                if is_busy && Instant::now() < deadline {
                    return Err(());
                }
                let Some(mut armed) = self.modules().remove(module) else {
                    return Ok(None);
                };
                let space = armed.kernel_tables(vcpus, &memory).ok();
                let space = space.map(|(_, space)| space);
                let returning = armed.disarm(&memory, space);
                for vcpu in vcpus.iter_mut() {
                    let regs = vcpu.get_regs().ok();
                    let next = regs
                        .and_then(|regs| returning.iter().find_map(|thread| thread.turn(&regs)));
                    if let Some(next) = next
                        && let Err(error) = vcpu.set_regs(&next)
                    {
                        tracing::error!("a vCPU at a gate cannot be moved on: {error}");
                    }
                }
                self.unwatch_if_idle(&memory);
                Ok(Some(armed))
            })?;
            match armed {
                Ok(armed) => break armed,
                Err(()) => std::thread::sleep(RELEASE_POLL),
            }
        };
        let armed = armed.ok_or_else(|| AttachError::NotIsolated(module.to_owned()))?;
        Ok(armed.status(module))
    }

    /// Counters of all isolated modules.
    pub fn status(&self) -> Vec<ModuleStatus> {
        let mut modules = self.modules();
        modules.values_mut().for_each(Armed::give_up_hanging);
        let mut all: Vec<_> = modules
            .iter()
            .map(|(name, armed)| armed.status(name))
            .collect();
        all.sort_by(|a, b| a.module.cmp(&b.module));
        all
    }

    /// The last violations of a module's calls, oldest first.
    pub fn reports(&self, module: &str) -> Result<Vec<ViolationReport>, AttachError> {
        let modules = self.modules();
        let armed = modules.get(module);
        let armed = armed.ok_or_else(|| AttachError::NotIsolated(module.to_owned()))?;
        Ok(armed.reports.iter().cloned().collect())
    }

    /// Puts `code` over the instructions at `function` + `offset` in the domain's copy of the module
    /// only, and returns what was there: a fault to be caught. The guest's text stays as it is.
    pub fn inject(
        &self,
        module: &str,
        function: &str,
        offset: u64,
        code: &[u8],
    ) -> Result<Vec<u8>, AttachError> {
        self.with_domain(module, |armed| {
            let not_an_entry = || AttachError::NotAnEntry(format!("{function}+{offset:#x}"));
            let at = armed
                .knowledge
                .driver_function(function)
                .ok_or_else(not_an_entry)?;
            let at = at.checked_add(offset).ok_or_else(not_an_entry)?;
            if !armed.knowledge.in_text(at, code.len() as u64) {
                return Err(not_an_entry());
            }
            let mut before = vec![0; code.len()];
            armed.domain.code(at, &mut before)?;
            armed.domain.patch(at, code)?;
            Ok(before)
        })
    }

    /// Has all isolated functions of a module return errors without being run, and silences its device.
    pub fn stop(&self, module: &str) -> Result<(), AttachError> {
        self.with_module(module, |armed| {
            armed.stopped = true;
            armed.silence_device();
            Ok(())
        })
    }

    /// Puts a fault into calls of an isolated function, in place of the one ordered before.
    pub fn order_fault(&self, module: &str, order: FaultOrder) -> Result<(), AttachError> {
        let not_an_entry = || AttachError::NotAnEntry(order.entry.clone());
        self.with_module(module, |armed| {
            let function = armed
                .knowledge
                .driver_function(&order.entry)
                .filter(|_| {
                    armed
                        .gates
                        .values()
                        .any(|gate| !gate.is_guard && gate.entry.name == order.entry)
                })
                .ok_or_else(not_an_entry)?;
            let at = function.checked_add(order.offset);
            at.filter(|at| armed.knowledge.in_text(*at, order.code.len() as u64))
                .ok_or_else(not_an_entry)?;
            armed.fault = Some(Fault::new(order.clone(), function));
            Ok(())
        })
    }

    /// What became of the fault that was ordered last.
    pub fn fault_count(&self, module: &str) -> Result<FaultCount, AttachError> {
        self.with_module(module, |armed| {
            Ok(armed.fault.as_ref().map(Fault::count).unwrap_or_default())
        })
    }

    /// The instructions of a function of an isolated module, as the domain has them.
    pub fn instructions(
        &self,
        module: &str,
        function: &str,
    ) -> Result<Vec<InstructionAt>, AttachError> {
        self.with_domain(module, |armed| {
            let start = armed.knowledge.driver_function(function);
            let start = start.ok_or_else(|| AttachError::NotAnEntry(function.to_owned()))?;
            let (knowledge, domain) = (&armed.knowledge, &armed.domain);
            Ok(crate::dispatch::fault::instructions(
                start,
                knowledge,
                &armed.calls,
                domain,
            )?)
        })
    }

    /// Does something with an isolated module while none of its calls is in the domain.
    fn with_module<T>(
        &self,
        module: &str,
        with: impl FnOnce(&mut Armed) -> Result<T, AttachError>,
    ) -> Result<T, AttachError> {
        let mut modules = self.modules();
        let armed = modules.get_mut(module);
        with(armed.ok_or_else(|| AttachError::NotIsolated(module.to_owned()))?)
    }

    /// Looks at the domain of an isolated module, or changes it, while the guest is stopped and none of its calls is
    /// in there.
    fn with_domain<T>(
        &self,
        module: &str,
        with: impl FnOnce(&mut Armed) -> Result<T, AttachError>,
    ) -> Result<T, AttachError> {
        let memory = self.vm.ram().memory().clone();
        self.vm.with_paused(|vcpus| {
            self.with_module(module, |armed| {
                armed.follow_tables(vcpus, &memory)?;
                with(armed)
            })
        })?
    }

    /// Forgets `module` if it is isolated but its text is not at `text` any more: it was removed, and
    /// perhaps loaded again elsewhere, in the meantime.
    pub fn forget_stale(&self, module: &str, text: Option<u64>) {
        let mut modules = self.modules();
        let stale = modules
            .get(module)
            .is_some_and(|armed| text.is_none_or(|text| !armed.knowledge.in_text(text, 1)));
        if stale {
            modules.remove(module);
        }
    }

    /// Takes the gate of the watch out when nothing is isolated any more.
    fn unwatch_if_idle(&self, memory: &GuestMemoryMmap) {
        if self.modules().is_empty()
            && let Some(watch) = self.watch().take()
        {
            watch.clear(memory);
        }
    }

    /// The guest frees the module whose `struct module` is the first argument: it is not isolated any
    /// more.
    pub(crate) fn module_freed(&self, watch: RemovalWatch, regs: &kvm_regs, sregs: &kvm_sregs) {
        let memory = self.vm.ram().memory().clone();
        {
            let mut modules = self.modules();
            // All isolated modules are the same guest's, on the same processor.
            let Some(physical_bits) = modules.values().next().map(|armed| armed.physical_bits)
            else {
                return;
            };
            let space =
                AddressSpace::from_registers(sregs.cr3, sregs.cr4, sregs.efer, physical_bits);
            let virt = VirtMemory {
                space,
                memory: &*memory,
            };
            let name = watch.name(&virt, regs.rdi);
            let Some(mut armed) = name.as_ref().and_then(|name| modules.remove(name)) else {
                return;
            };
            armed.disarm(&memory, Some(space));
            tracing::info!(
                "module {} was removed and is not isolated any more",
                name.unwrap_or_default()
            );
        }
        self.unwatch_if_idle(&memory);
    }

    pub(crate) fn watch(&self) -> MutexGuard<'_, Option<RemovalWatch>> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all modules without touching the guest's memory: the guest was reset and holds
    /// nothing of them.
    pub fn forget(&self) {
        self.modules().clear();
        *self.watch() = None;
        *self.suspending() = None;
    }

    pub(crate) fn modules(&self) -> MutexGuard<'_, HashMap<String, Armed>> {
        // A panic inside a call leaves counters behind that are off by one at worst.
        self.modules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bits of a guest physical address.
pub(crate) fn physical_bits(cpuid: &CpuId) -> u8 {
    let leaf = cpuid
        .as_slice()
        .iter()
        .find(|leaf| leaf.function == 0x8000_0008);
    leaf.map_or(36, |leaf| leaf.eax as u8)
}
