//! Puts functions of a live guest's module into a domain, and takes them out again.
//!
//! ```text
//!   isolate: symbols, sections ─► Plan ─► Domain, patches in P ─► (guest stopped) still so? ─► gates in K
//!   call:    gate ─► trap ─► others held, device held ─► Domain::call ─► registers ─► guest
//!   release: (guest stopped) original bytes in K ─► domain gone
//! ```
//!
//! While the guest is stopped for arming or release no call is in a domain: calls run to their end
//! inside the trap handler. Threads that are in the middle of a gated function stay there; only the
//! function's first instruction is replaced.

pub(crate) mod arm;
mod bystanders;
pub mod clean;
mod isolate;
mod kept;
pub mod kernel_functions;
pub mod kernel_image;
mod leaving;
pub(crate) mod live;
mod made_domain;
pub mod plan;
mod registers;
mod release;
pub(crate) mod removal;
pub mod request;
mod rest;
mod suspending;
pub mod text_fault;
mod traces;
mod trap;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devices::dma::GuestMemory;
use kvm_bindings::CpuId;

use vmm::{Refused, VmHandle, VmState};

use crate::compensation::guest_time::GuestTime;
use crate::dispatch::armed::Armed;
use crate::dispatch::fault::{FaultCount, FaultOrder, InstructionAt};
use crate::dispatch::reporter::Reporter;
use crate::dispatch::returning::turn_vcpus;
use crate::domain::error::DomainError;
use crate::domain::host_memory::HostMemory;
use crate::fault_image::FaultImageError;
use crate::guest::modules::ModuleError;
use crate::guest::paging::VirtError;
use crate::status::ModuleStatus;
use crate::status::report::ViolationReport;
use crate::suspend_resume::{SuspendError, SuspendResume};
use leaving::AllLeaving;
use plan::PlanError;
use removal::RemovalWatch;
use text_fault::TextFault;

/// How long a release waits for calls that are being taken back or have yet to give things back.
const RELEASE_WAIT: Duration = Duration::from_secs(2);
/// Between two looks at them.
const RELEASE_POLL: Duration = Duration::from_millis(5);

/// Processor time of its own that a call may take unless said otherwise: a hundred times what the
/// longest of honest drivers takes, and a twentieth of what the guest's kernel waits for a
/// processor before it says so.
pub const DEFAULT_BUDGET: Duration = Duration::from_secs(1);

/// Time that a call may wait for and remain atomic unless said otherwise: the waits of an `open` or
/// a reset of the adapter add up to a third of it.
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
    /// The kernel's symbols cannot be read in the guest's memory: why.
    #[error("the guest's kernel: {0}")]
    NoKernelImage(&'static str),
    /// A function that the guest's kernel does not have, or has twice.
    #[error("the guest's kernel has no function {0}, or several")]
    NoSuchFunction(String),
    /// A function that the module does not have.
    #[error("the module has no function {0}")]
    NoDriverFunction(String),
    /// A function of which no calls are isolated.
    #[error("{0} is not isolated: `cofferdam status` lists the functions that are")]
    NotIsolatedFunction(String),
    /// The module was isolated anew, or somebody asked for another one.
    #[error(
        "the trace is not there any more: another one was begun, or the module was isolated anew"
    )]
    NoTrace,
    /// Too many faults.
    #[error("too many faults are ordered of the module and not used up: release it to drop them")]
    TooManyFaults,
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
    /// Memory of the guest's own.
    #[error(transparent)]
    Own(#[from] vmm::memory::OwnError),
    /// Images of faults.
    #[error("faults cannot be kept: {0}")]
    Keep(#[from] FaultImageError),
    /// The driver's own functions.
    #[error(transparent)]
    Suspend(#[from] SuspendError),
    /// KVM.
    #[error("KVM refused {0}: {1}")]
    Kvm(&'static str, kvm_ioctls::Error),
    /// The kernel's page tables could not be found.
    #[error(
        "no vCPU of the guest has page tables loaded in which the module is: is the guest up, and is it still loaded?"
    )]
    NoKernelTables,
    /// Memory at a mark.
    #[error(transparent)]
    Mark(#[from] vmm::MarkError),
    /// Who has which memory is not known.
    #[error("it is isolated without containment: who has which memory of the guest is not known")]
    NoMemoryModel,
    /// Something is not known of the guest that containment needs.
    #[error(
        "calls could not be contained: {0}. Nothing was isolated; `--contain none` isolates without, so that a \
         faulty call may write to all of the guest's heap"
    )]
    NotContained(String),
    /// The guest went on changing what was read of it.
    #[error("the guest's module or kernel changed all the time while it was looked at: try again")]
    Changing,
    /// Somebody changed it since it was looked at.
    #[error("the guest's text at {0:#x} is not what it was when it was looked at: look again")]
    OtherCode(u64),
    /// One at a time.
    #[error("there is a fault in the guest's own text already: take it out with --undo")]
    TextFault,
    /// Nothing to take out.
    #[error("there is no fault in the guest's own text")]
    NoTextFault,
    /// It would go on in the middle of an instruction.
    #[error("a vCPU stays in the middle of the fault's code, which cannot be taken out so")]
    InTheMiddle,
}

/// Isolates modules of one machine.
pub struct Isolator {
    pub(crate) vm: VmHandle,
    /// Of all modules.
    host_memory: HostMemory,
    /// One lock for all: who runs a call has stopped all other vCPUs, so that locks of their own
    /// would let nothing go on beside it.
    modules: Mutex<HashMap<String, Armed>>,
    /// Modules that are not isolated any more, and were at a mark of the machine that may be
    /// rewound to. Taken while `modules` is.
    shelf: Mutex<Vec<Armed>>,
    /// In place as long as there are modules, or any of which something stays. Taken while
    /// `modules` is.
    watch: Mutex<Option<RemovalWatch>>,
    /// Modules that may be removed with something of theirs left. Taken while `modules` is.
    leaving: Mutex<AllLeaving>,
    /// Functions of a driver that are being called in the guest. Taken last.
    pub(crate) suspending: Mutex<Option<SuspendResume>>,
    /// A fault in the guest's own text. Taken last.
    text_fault: Mutex<Option<TextFault>>,
    guest_time: GuestTime,
    reporter: Reporter,
}

impl Isolator {
    /// An isolator for the machine behind `vm`, to which it attaches as trap handler.
    pub fn attach(vm: VmHandle) -> Result<Arc<Self>, Refused> {
        let watched = vm.clone();
        let isolator = Arc::new(Self {
            guest_time: GuestTime::start(move || watched.state() == VmState::Running),
            vm: vm.clone(),
            host_memory: HostMemory::default(),
            modules: Mutex::new(HashMap::new()),
            shelf: Mutex::default(),
            watch: Mutex::new(None),
            leaving: Mutex::default(),
            suspending: Mutex::new(None),
            text_fault: Mutex::new(None),
            reporter: Reporter::start(),
        });
        vm.attach_trap_handler(isolator.clone())?;
        vm.add_participant(isolator.clone());
        Ok(isolator)
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
                turn_vcpus(&returning, vcpus);
                self.leaves(module, &armed);
                self.unwatch_if_idle(&memory);
                Ok(Some(armed))
            })?;
            match armed {
                Ok(armed) => break armed,
                Err(()) => std::thread::sleep(RELEASE_POLL),
            }
        };
        let armed = armed.ok_or_else(|| AttachError::NotIsolated(module.to_owned()))?;
        let status = armed.status(module);
        self.put_away(armed);
        Ok(status)
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

    /// Whether there is a domain, also of a module that is not isolated any more, which is kept for
    /// a mark: it has a private view of guest memory.
    pub fn has_domains(&self) -> bool {
        let modules = self.modules();
        !modules.is_empty() || self.kept_for_marks() > 0
    }

    /// The last violations of a module's calls, oldest first.
    pub fn reports(&self, module: &str) -> Result<Vec<ViolationReport>, AttachError> {
        let reports = self.with_module(module, |armed| Ok(armed.failures.reports.clone()))?;
        self.settle_reports();
        Ok(reports.kept())
    }

    /// Returns when each call that has failed by now is in the reports and the log, and whoever
    /// listens has heard of it.
    pub fn settle_reports(&self) {
        self.reporter.settle();
    }

    /// Puts `code` over the instructions at `function` + `offset` in the domain's copy of the
    /// module only, and returns what was there: a fault to be caught. The guest's text stays as it
    /// is.
    pub fn inject(
        &self,
        module: &str,
        function: &str,
        offset: u64,
        code: &[u8],
    ) -> Result<Vec<u8>, AttachError> {
        self.with_domain(module, |armed| {
            let outside = || AttachError::NoDriverFunction(format!("{function}+{offset:#x}"));
            let at = function_of(armed, function)?.checked_add(offset);
            let at = at.ok_or_else(outside)?;
            if !armed.guest.knowledge.in_text(at, code.len() as u64) {
                return Err(outside());
            }
            let mut before = vec![0; code.len()];
            armed.domain.code(at, &mut before)?;
            armed.domain.patch(at, code)?;
            Ok(before)
        })
    }

    /// Has all isolated functions of a module return errors without being run, and silences its
    /// device.
    pub fn stop(&self, module: &str) -> Result<(), AttachError> {
        self.with_module(module, |armed| {
            armed.stop();
            Ok(())
        })
    }

    /// Puts a fault into calls that run a function of an isolated module. Those ordered before are
    /// kept until they are used up.
    pub fn order_fault(&self, module: &str, order: FaultOrder) -> Result<(), AttachError> {
        self.with_module(module, |armed| {
            let start = function_of(armed, &order.function)?;
            let at = start.checked_add(order.offset);
            at.filter(|at| armed.guest.knowledge.in_text(*at, order.code.len() as u64))
                .ok_or_else(|| AttachError::NoDriverFunction(order.function.clone()))?;
            let mut gates = armed.gates.values();
            let is_entry = gates.any(|gate| !gate.is_guard && gate.entry.name == order.function);
            match armed.faults.add(order, start, is_entry) {
                true => Ok(()),
                false => Err(AttachError::TooManyFaults),
            }
        })
    }

    /// The same, if the domain's copy has `old` where the fault goes: a call out of the module
    /// leads elsewhere there.
    pub fn order_code(
        &self,
        module: &str,
        order: FaultOrder,
        old: &[u8],
    ) -> Result<(), AttachError> {
        self.with_domain(module, |armed| {
            let at = function_of(armed, &order.function)?.wrapping_add(order.offset);
            let mut there = vec![0; old.len()];
            armed.domain.code(at, &mut there)?;
            match there == old {
                true => Ok(()),
                false => Err(AttachError::OtherCode(at)),
            }
        })?;
        self.order_fault(module, order)
    }

    /// Withdraws all faults of a module that are not used up; what became of the one that was
    /// ordered last.
    pub fn withdraw_faults(&self, module: &str) -> Result<FaultCount, AttachError> {
        self.with_module(module, |armed| {
            armed.faults.withdraw();
            Ok(armed.faults.count())
        })
    }

    /// What became of the fault that was ordered last.
    pub fn fault_count(&self, module: &str) -> Result<FaultCount, AttachError> {
        self.with_module(module, |armed| Ok(armed.faults.count()))
    }

    /// The instructions of a function of an isolated module, as the domain has them.
    pub fn instructions(
        &self,
        module: &str,
        function: &str,
    ) -> Result<Vec<InstructionAt>, AttachError> {
        self.with_domain(module, |armed| {
            let start = function_of(armed, function)?;
            let (knowledge, domain) = (&armed.guest.knowledge, &armed.domain);
            Ok(crate::dispatch::fault::instructions(
                start,
                knowledge,
                &armed.guest.calls,
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

    /// Looks at the domain of an isolated module, or changes it, while the guest is stopped and
    /// none of its calls is in there.
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

    /// Forgets `module` if it is isolated but its text is not at `text` any more: it was removed,
    /// and perhaps loaded again elsewhere, in the meantime.
    pub fn forget_stale(&self, module: &str, text: Option<u64>) {
        let mut modules = self.modules();
        let stale = modules
            .get(module)
            .is_some_and(|armed| text.is_none_or(|text| !armed.guest.knowledge.in_text(text, 1)));
        if stale && let Some(armed) = modules.remove(module) {
            self.put_away(armed);
        }
    }

    /// Takes the gate of the watch out when nothing is isolated any more.
    fn unwatch_if_idle(&self, memory: &GuestMemory) {
        if self.modules().is_empty()
            && self.leaving().is_empty()
            && let Some(watch) = self.watch().take()
        {
            watch.clear(memory);
        }
    }

    pub(crate) fn watch(&self) -> MutexGuard<'_, Option<RemovalWatch>> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all modules without touching the guest's memory: the guest was reset and holds
    /// nothing of them. Their devices interrupt and show their links again.
    pub fn forget(&self) {
        for (_, mut armed) in self.modules().drain() {
            armed.guest_is_gone();
            self.put_away(armed);
        }
        *self.watch() = None;
        self.leaving().clear();
        *self.suspending() = None;
        *self.text_fault() = None;
    }

    pub(crate) fn modules(&self) -> MutexGuard<'_, HashMap<String, Armed>> {
        // A panic inside a call leaves counters behind that are off by one at worst.
        self.modules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Address of a function of the module.
fn function_of(armed: &Armed, name: &str) -> Result<u64, AttachError> {
    let start = armed.guest.knowledge.driver_function(name);
    start.ok_or_else(|| AttachError::NoDriverFunction(name.to_owned()))
}

/// Bits of a guest physical address.
pub(crate) fn physical_bits(cpuid: &CpuId) -> u8 {
    let leaf = cpuid
        .as_slice()
        .iter()
        .find(|leaf| leaf.function == 0x8000_0008);
    leaf.map_or(36, |leaf| leaf.eax as u8)
}
