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

pub mod after_fault;
pub mod device;
pub mod e1000;
pub mod fault;
pub mod plan;
mod platform;
pub mod report;
pub mod status;
mod supervisor;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devices::clock::monotonic_ns;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_sregs};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::trap::{TrapContext, TrapHandler, TrapOutcome};
use vmm::{Refused, VmHandle};

use crate::domain::error::DomainError;
use crate::domain::transaction::{CallEnd, CallRequest, CallResult};
use crate::domain::{Domain, DomainConfig};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::MemoryModel;
use crate::guest::btf::Btf;
use crate::guest::fault_tables::FaultTables;
use crate::guest::gate::{FTRACE_NOP, GATE_BYTES, GatePorts};
use crate::guest::modules::{ModuleError, ModuleLayout};
use crate::guest::paging::{AddressSpace, VirtError, VirtMemory};
use crate::guest::symbols::SymbolTable;
use crate::policy::abort_value::{AbortReturn, AbortValue};
use crate::policy::call::{CallMemory, DriverPolicy};
use after_fault::{AfterFault, FailedCall, FaultPolicy};
use device::IsolatedDevice;
use fault::{Fault, FaultCount, FaultOrder, InstructionAt};
use plan::{Plan, PlanError, Refusal, Wanted};
use platform::Platform;
use report::ViolationReport;
use status::{EntryStatus, ModuleStatus};
use supervisor::{CallPolicy, CallSupervisor, Knowledge};

/// Ports of the gates; the first two of [`vmm::trap::TRAP_PORTS`].
const GATE: GatePorts = GatePorts {
    entry: 0xe0,
    returning: 0xe1,
};
/// Size and alignment of a Linux kernel stack on x86-64 (`THREAD_SIZE`) in bytes.
const THREAD_SIZE: u64 = 16 * 1024;
/// Reports kept for each module.
const REPORTS_KEPT: usize = 32;
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
    /// The module's device, if it has one.
    pub device: Option<Arc<dyn IsolatedDevice>>,
    /// PCI slot of that device; its lock is the device's own.
    pub device_slot: Option<u8>,
    /// Time that a call may take before it is aborted.
    pub budget: Duration,
    /// Decides what becomes of calls that failed.
    pub policy: Box<dyn FaultPolicy>,
    /// Time that a call may wait for in all, with the guest standing still, and remain atomic.
    pub sleep_limit: Duration,
}

/// What was isolated.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Isolated {
    /// Gated functions.
    pub entries: Vec<String>,
    /// Functions that fit a pattern but cannot be gated.
    pub refused: Vec<Refusal>,
    /// Calls of kernel functions that were redirected to trampolines.
    pub redirected_calls: usize,
    /// Time that the guest was stopped, in microseconds.
    pub stopped_us: u64,
}

/// A gate in the guest.
struct Gate {
    gpa: u64,
    /// Where the function goes on behind the gate.
    body: u64,
    entry: EntryStatus,
    aborted: AbortReturn,
}

/// A module whose functions are gated.
struct Armed {
    domain: Domain,
    knowledge: Knowledge,
    /// What calls may write; `None` if the guest's types or memory management are not known.
    policy: Option<DriverPolicy>,
    physical_bits: u8,
    /// By address of the gate.
    gates: HashMap<u64, Gate>,
    /// Targets of calls out of the module, by the address of their displacement's opcode.
    calls: HashMap<u64, Gva>,
    fault_policy: Box<dyn FaultPolicy>,
    /// A fault that is put into calls on purpose.
    fault: Option<Fault>,
    /// What was decided about the call that failed just now.
    decided: Option<AfterFault>,
    /// Calls return their errors without being run.
    stopped: bool,
    device: Option<Arc<dyn IsolatedDevice>>,
    device_slot: Option<u8>,
    budget: Duration,
    sleep_limit: Duration,
    reports: VecDeque<ViolationReport>,
    violations: u64,
    /// When memory and device of a failed call were as before; taken when its caller runs again.
    rolled_back: Option<Instant>,
    /// Why the domain is not used any more.
    broken: Option<String>,
}

/// Isolates modules of one machine.
pub struct Isolator {
    vm: VmHandle,
    modules: Mutex<HashMap<String, Armed>>,
}

impl Isolator {
    /// An isolator for the machine behind `vm`, to which it attaches as trap handler.
    pub fn attach(vm: VmHandle) -> Result<Arc<Self>, Refused> {
        let isolator = Arc::new(Self {
            vm: vm.clone(),
            modules: Mutex::new(HashMap::new()),
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
            let physical_bits = cpuid
                .as_slice()
                .iter()
                .find(|leaf| leaf.function == 0x8000_0008)
                .map_or(36, |leaf| leaf.eax as u8);
            let mut sregs = vcpu
                .get_sregs()
                .map_err(|error| AttachError::Kvm("KVM_GET_SREGS", error))?;
            let space = kernel_space(&mut sregs, physical_bits, &request, &memory)?;
            let virt = VirtMemory {
                space,
                memory: &*memory,
            };
            let layout = ModuleLayout::new(&request.module, &request.sections, None, &virt)?;
            let text = layout.read_text(&virt)?;
            let plan = Plan::new(&request.wanted, &layout, &text, &request.symbols)?;
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
            let knowledge = Knowledge::new(
                &layout,
                request.symbols.clone(),
                fault_tables(&virt, &request.symbols),
            );
            let isolated = Isolated {
                entries: plan.gates.iter().map(|gate| gate.name.clone()).collect(),
                refused: plan.refused.clone(),
                redirected_calls: plan.redirects.len(),
                stopped_us: 0,
            };
            let policy = request
                .types
                .and_then(|types| driver_policy(types, &layout, &request.symbols, &virt));
            let gates = set_gates(&plan, &virt, &memory, policy.as_ref())?;
            let armed = Armed {
                domain,
                knowledge,
                policy,
                physical_bits,
                gates,
                calls: plan
                    .redirects
                    .iter()
                    .map(|(site, target)| (site.0, *target))
                    .collect(),
                fault_policy: request.policy,
                fault: None,
                decided: None,
                stopped: false,
                device: request.device,
                device_slot: request.device_slot,
                budget: request.budget,
                sleep_limit: request.sleep_limit,
                reports: VecDeque::new(),
                violations: 0,
                rolled_back: None,
                broken: None,
            };
            self.modules().insert(request.module, armed);
            Ok::<_, AttachError>(isolated)
        })??;
        isolated.stopped_us = start.elapsed().as_micros() as u64;
        Ok(isolated)
    }

    /// Takes the gates of a module out and its domain down. The guest's memory is as before.
    pub fn release(&self, module: &str) -> Result<ModuleStatus, AttachError> {
        let memory = self.vm.ram().memory().clone();
        let armed = self.vm.with_paused(|_| {
            let armed = self.modules().remove(module)?;
            for gate in armed.gates.values() {
                clear_gate(&memory, gate.gpa);
            }
            Some(armed)
        })?;
        let armed = armed.ok_or_else(|| AttachError::NotIsolated(module.to_owned()))?;
        Ok(armed.status(module))
    }

    /// Counters of all isolated modules.
    pub fn status(&self) -> Vec<ModuleStatus> {
        let modules = self.modules();
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
        // The guest is stopped so that no call is in the domain.
        self.vm.with_paused(|_| {
            let mut modules = self.modules();
            let armed = modules
                .get_mut(module)
                .ok_or_else(|| AttachError::NotIsolated(module.to_owned()))?;
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
        })?
    }

    /// Has all isolated functions of a module return errors without being run, and silences its device.
    pub fn stop(&self, module: &str) -> Result<(), AttachError> {
        self.with_module(module, |armed| {
            armed.stopped = true;
            if let Some(device) = &armed.device {
                device.hold(&mut |held| held.silence());
            }
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
                        .any(|gate| gate.entry.name == order.entry)
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
        self.with_module(module, |armed| {
            let start = armed.knowledge.driver_function(function);
            let start = start.ok_or_else(|| AttachError::NotAnEntry(function.to_owned()))?;
            let (knowledge, domain) = (&armed.knowledge, &armed.domain);
            Ok(fault::instructions(start, knowledge, &armed.calls, domain)?)
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

    /// Forgets all modules without touching the guest's memory: the guest was reset and holds
    /// nothing of them.
    pub fn forget(&self) {
        self.modules().clear();
    }

    fn modules(&self) -> MutexGuard<'_, HashMap<String, Armed>> {
        // A panic inside a call leaves counters behind that are off by one at worst.
        self.modules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TrapHandler for Isolator {
    fn on_trap(&self, context: &mut TrapContext<'_>) -> TrapOutcome {
        if context.port != u16::from(GATE.entry) {
            return TrapOutcome::Resume;
        }
        let (Ok(regs), Ok(sregs)) = (context.vcpu.get_regs(), context.vcpu.get_sregs()) else {
            tracing::error!("cannot read a vCPU's registers at an entry gate");
            return TrapOutcome::Resume;
        };
        let _others = self.vm.hold_others(context.index);
        let mut modules = self.modules();
        let gate = regs.rip.wrapping_sub(2);
        let Some(armed) = modules
            .values_mut()
            .find(|armed| armed.gates.contains_key(&gate))
        else {
            // User code that may use I/O ports wrote to this one.
            return TrapOutcome::Resume;
        };
        let functions = match armed.device_slot {
            Some(slot) => self.vm.pci_bus().functions_except(slot),
            None => self.vm.pci_bus().functions_except(u8::MAX),
        };
        let _devices: Vec<_> = functions
            .iter()
            .map(|function| function.lock().unwrap_or_else(PoisonError::into_inner))
            .collect();
        let mut next = armed.carry_out(gate, 1, &regs, &sregs, context.vcpu, self.vm.vm_fd());
        let mut attempts = 1;
        while armed.decided.take() == Some(AfterFault::Retry) {
            attempts += 1;
            next = armed.carry_out(gate, attempts, &regs, &sregs, context.vcpu, self.vm.vm_fd());
        }
        if let Err(error) = context.vcpu.set_regs(&next) {
            tracing::error!("cannot set a vCPU's registers after an isolated call: {error}");
            return TrapOutcome::PowerOff;
        }
        armed.caller_runs_again();
        TrapOutcome::Resume
    }
}

impl Armed {
    /// Runs the function behind `gate` and returns the registers to go on with.
    fn carry_out(
        &mut self,
        gate: u64,
        attempts: u32,
        regs: &kvm_bindings::kvm_regs,
        sregs: &kvm_sregs,
        vcpu: &VcpuFd,
        vm: &VmFd,
    ) -> kvm_bindings::kvm_regs {
        let start = Instant::now();
        let Some(Gate {
            body,
            aborted,
            entry,
            ..
        }) = self.gates.get_mut(&gate)
        else {
            return *regs;
        };
        let unisolated = kvm_bindings::kvm_regs {
            rip: *body,
            ..*regs
        };
        if self.broken.is_some() {
            return unisolated;
        }
        let space =
            AddressSpace::from_registers(sregs.cr3, sregs.cr4, sregs.efer, self.physical_bits);
        let arguments = [regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.r8, regs.r9];
        if self.stopped {
            entry.refused += 1;
            let memory = self.domain.memories().1;
            let virt = VirtMemory {
                space,
                memory: &memory,
            };
            return returned(regs, virt, aborted.value.rax(&arguments)).unwrap_or(unisolated);
        }
        let request = CallRequest {
            regs: *regs,
            sregs,
            clock: Some(vcpu),
            function: *body,
            budget: self.budget,
            sleep_limit: self.sleep_limit,
        };
        let (domain, knowledge) = (&mut self.domain, &self.knowledge);
        if let Some(fault) = &mut self.fault
            && let Err(error) = fault.begin(&entry.name, domain)
        {
            tracing::error!("a fault cannot be put into {}: {error}", entry.name);
        }
        let (private, shared) = domain.memories();
        if let Some(policy) = &mut self.policy {
            policy.begin(&entry.name, arguments);
        }
        let mut policy = self.policy.as_mut().map(|policy| CallPolicy {
            policy,
            memory: CallMemory {
                private: VirtMemory {
                    space,
                    memory: &private,
                },
                shared: VirtMemory {
                    space,
                    memory: &shared,
                },
                stack: Some(GvaRange::aligned(Gva(regs.rsp), THREAD_SIZE)),
                per_cpu_base: sregs.gs.base,
            },
        });
        let mut platform = Some(Platform::new(vm, vcpu));
        let mut result: Option<Result<CallResult, DomainError>> = None;
        match &self.device {
            Some(device) => device.hold(&mut |held| {
                let Some(platform) = platform.take() else {
                    return;
                };
                let mut supervisor =
                    CallSupervisor::new(knowledge, policy.take(), Some(held), platform);
                result = Some(domain.call(&request, &mut supervisor));
            }),
            None => {
                let platform = Platform::new(vm, vcpu);
                let mut supervisor = CallSupervisor::new(knowledge, policy, None, platform);
                result = Some(domain.call(&request, &mut supervisor));
            }
        }
        if let Some(policy) = &mut self.policy {
            policy.end(
                matches!(&result, Some(Ok(result)) if matches!(result.end, CallEnd::Committed)),
            );
        }
        let ended = Instant::now();
        let ended_ns = monotonic_ns();
        let failed =
            matches!(&result, Some(Ok(result)) if matches!(result.end, CallEnd::Aborted(_)));
        let next = match result {
            Some(Ok(result)) => {
                entry.count(&result, start.elapsed());
                match result.end {
                    CallEnd::Committed => result.regs,
                    CallEnd::PassThrough(_) => unisolated,
                    CallEnd::Aborted(violation) => {
                        let name = entry.name.clone();
                        let next = kvm_bindings::kvm_regs {
                            rax: aborted.value.rax(&arguments),
                            ..result.regs
                        };
                        let mut report = self.knowledge.report(&name, *violation, &self.domain);
                        if let (None, Some(policy)) = (&report.touched, &self.policy) {
                            let virt = VirtMemory {
                                space,
                                memory: &shared,
                            };
                            report.touched = report
                                .violation
                                .touched()
                                .and_then(|at| policy.whose(virt, Gva(at)));
                        }
                        let phases = result.phases;
                        let took = phases.detect_ns + phases.memory_ns + phases.device_ns;
                        report.at_ns = ended_ns.saturating_sub(took);
                        report.phases = phases;
                        tracing::warn!("{report}");
                        let call = FailedCall {
                            report: &report,
                            attempts,
                            returns_nothing: aborted.value == AbortValue::Nothing,
                        };
                        let decided = self.fault_policy.after_fault(&call);
                        entry.retries += u64::from(decided == AfterFault::Retry);
                        self.stopped |= decided == AfterFault::Stop;
                        self.decided = Some(decided);
                        self.violations += 1;
                        self.rolled_back = Some(ended);
                        if self.reports.len() >= REPORTS_KEPT {
                            self.reports.pop_front();
                        }
                        self.reports.push_back(report);
                        next
                    }
                }
            }
            Some(Err(error)) => {
                tracing::error!("the domain is not used any more: {error}");
                self.broken = Some(error.to_string());
                unisolated
            }
            None => unisolated,
        };
        if let Some(fault) = &mut self.fault
            && let Err(error) = fault.end(failed, &mut self.domain)
        {
            tracing::error!("the domain is not used any more: {error}");
            self.broken = Some(error.to_string());
        }
        if let (Some(AfterFault::Stop), Some(device)) = (self.decided, &self.device) {
            device.hold(&mut |held| held.silence());
        }
        next
    }

    /// Completes the report of a call that failed just now.
    fn caller_runs_again(&mut self) {
        if let (Some(since), Some(report)) = (self.rolled_back.take(), self.reports.back_mut()) {
            report.phases.returned_ns =
                u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        }
    }

    fn status(&self, module: &str) -> ModuleStatus {
        let mut entries: Vec<_> = self.gates.values().map(|gate| gate.entry.clone()).collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        ModuleStatus {
            module: module.to_owned(),
            entries,
            violations: self.violations,
            stopped: self.stopped,
            warm_pages: self.domain.warm_pages(),
            broken: self.broken.clone(),
        }
    }
}

/// The address space with the kernel mapped: that of `sregs`, or with page-table isolation the one
/// next to the user's (bit 12 of CR3, `PTI_USER_PGTABLE_BIT`).
fn kernel_space(
    sregs: &mut kvm_sregs,
    physical_bits: u8,
    request: &IsolateRequest,
    memory: &GuestMemoryMmap,
) -> Result<AddressSpace, AttachError> {
    let probe = request.sections.iter().find(|(name, _)| name == ".text");
    let probe = probe.ok_or_else(|| ModuleError::NoSections(request.module.clone()))?;
    for cr3 in [sregs.cr3, sregs.cr3 & !0x1000] {
        let space = AddressSpace::from_registers(cr3, sregs.cr4, sregs.efer, physical_bits);
        if space.walk(memory, Gva(probe.1)).is_ok() {
            sregs.cr3 = cr3;
            return Ok(space);
        }
    }
    Err(AttachError::NoKernelTables)
}

/// Tables of the kernel's expected faults; where they cannot be read, no fault is expected.
fn fault_tables(virt: &VirtMemory<'_, GuestMemoryMmap>, symbols: &SymbolTable) -> FaultTables {
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

/// What the driver's calls may write. A kernel whose memory management is unknown is isolated without.
fn driver_policy(
    types: Arc<Btf>,
    layout: &ModuleLayout,
    symbols: &SymbolTable,
    virt: &VirtMemory<'_, GuestMemoryMmap>,
) -> Option<DriverPolicy> {
    let memory = MemoryModel::new(&types, symbols, virt)
        .inspect_err(|error| tracing::warn!("calls may write to all of the heap: {error}"))
        .ok()?;
    DriverPolicy::new(types, memory, layout, symbols)
        .inspect_err(|error| tracing::warn!("calls may write to all of the heap: {error}"))
        .ok()
}

/// The registers after a function returned `rax` to its caller without having been run.
fn returned(
    regs: &kvm_bindings::kvm_regs,
    virt: VirtMemory<'_, GuestMemoryMmap>,
    rax: u64,
) -> Option<kvm_bindings::kvm_regs> {
    let mut address = [0; 8];
    virt.read(Gva(regs.rsp), &mut address).ok()?;
    Some(kvm_bindings::kvm_regs {
        rax,
        rip: u64::from_le_bytes(address),
        rsp: regs.rsp.wrapping_add(8),
        ..*regs
    })
}

/// Patches P's copies of driver and kernel text.
fn prepare(domain: &mut Domain, plan: &Plan) -> Result<(), DomainError> {
    for gate in &plan.gates {
        domain.patch(gate.site.gate.0, &FTRACE_NOP)?;
    }
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
    for function in &plan.fatal {
        domain.forbid_function(function.0)?;
    }
    Ok(())
}

/// Writes the gates into the guest's text; all or none.
fn set_gates(
    plan: &Plan,
    virt: &VirtMemory<'_, GuestMemoryMmap>,
    memory: &GuestMemoryMmap,
    policy: Option<&DriverPolicy>,
) -> Result<HashMap<u64, Gate>, AttachError> {
    let mut gates = HashMap::new();
    for gate in &plan.gates {
        let mut now = [0; GATE_BYTES];
        virt.read(gate.site.gate, &mut now)?;
        let translation = virt.space.walk(virt.memory, gate.site.gate);
        let gpa = translation
            .map_err(|_| DomainError::TextNotMapped(gate.site.gate.0))?
            .gpa
            .0;
        // A NOP that crosses a page would need two translations; functions are 16-byte aligned.
        if now != FTRACE_NOP || gpa & 0xfff > 0x1000 - GATE_BYTES as u64 {
            return Err(DomainError::TextNotMapped(gate.site.gate.0).into());
        }
        gates.insert(
            gate.site.gate.0,
            Gate {
                gpa,
                body: gate.site.body().0,
                entry: EntryStatus::new(&gate.name),
                aborted: policy.map_or(AbortReturn::UNKNOWN, |policy| {
                    policy.abort_return(&gate.name)
                }),
            },
        );
    }
    for (written, gate) in gates.values().enumerate() {
        if memory
            .write_slice(&GATE.bytes(), GuestAddress(gate.gpa))
            .is_err()
        {
            for gate in gates.values().take(written) {
                clear_gate(memory, gate.gpa);
            }
            return Err(DomainError::TextNotMapped(gate.gpa).into());
        }
    }
    Ok(gates)
}

/// Puts the NOP back, if the gate is still there: the module may be gone and its memory another's.
fn clear_gate(memory: &GuestMemoryMmap, gpa: u64) {
    let mut now = [0; GATE_BYTES];
    let there = memory.read_slice(&mut now, GuestAddress(gpa)).is_ok() && now == GATE.bytes();
    if there && memory.write_slice(&FTRACE_NOP, GuestAddress(gpa)).is_err() {
        tracing::error!("cannot take a gate out of guest memory at {gpa:#x}");
    }
}
