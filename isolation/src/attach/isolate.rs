//! Putting functions of a module into a domain, while the guest runs as long as it can.
//!
//! ```text
//!   stopped    │ guest runs                                              │ stopped             │ guest runs
//!   registers, │ layout, text, types, plan, private VM, roots, patches   │ is it still so?     │ calls come
//!   tables     │ in the private VM's copies; is it still so?             │ then gates          │ to the gates
//! ```
//!
//! What is read while the guest runs may change while it is read: a process whose tables lead there
//! ends, the module is removed, the kernel patches its code. So all of it is looked at once more,
//! first while the guest runs, then with the guest stopped, and made anew if it is not as it was;
//! at last with the guest stopped all the while.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::dma::GuestMemory;
use kvm_bindings::kvm_sregs;
use kvm_ioctls::Kvm;

use vmm::PausedVcpus;

use super::arm::{driver_policy, fault_tables, gates_of, set_gates, text_of};
use super::kernel_functions::lacking;
use super::live;
use super::made_domain::make_domain;
use super::plan::Plan;
use super::registers::{KnownPlaces, Registers};
use super::removal::{PlannedWatch, RemovalWatch};
use super::request::{Contain, IsolateRequest, Isolated, Strength};
use super::{AttachError, Isolator};
use crate::compensation::call_loop::CallLoop;
use crate::compensation::guest_time::Stopwatches;
use crate::compensation::transmit_queues::TransmitQueues;
use crate::dispatch::armed::{
    Armed, Gate, InTheGuest, KeptPackets, KnownGuest, Limits, ModuleDevice,
};
use crate::dispatch::failures::Failures;
use crate::dispatch::fault::Faults;
use crate::dispatch::overdue::Timers;
use crate::dispatch::reporter::Queue;
use crate::dispatch::supervisor::Knowledge;
use crate::domain::Domain;
use crate::domain::effects::KernelEffects;
use crate::domain::host_memory::HostMemory;
use crate::fault_image::{Keeper, Subject};
use crate::guest::addr::Gva;
use crate::guest::btf::Btf;
use crate::guest::modules::{ModuleLayout, ModuleText};
use crate::guest::paging::VirtMemory;
use crate::guest::symbols::SymbolTable;
use crate::policy::abort_value::is_transmit_named;
use crate::policy::call::{CallMemory, DriverPolicy, MemoryBefore};
use crate::policy::completion::{no_answer, serves_blocks};

/// How often a domain is made while the guest runs before it is made with the guest stopped.
const ATTEMPTS: u32 = 3;

/// All of an isolated module but what is in the guest.
struct Prepared {
    layout: ModuleLayout,
    text: ModuleText,
    plan: Plan,
    policy: Option<DriverPolicy>,
    domain: Domain,
    knowledge: Knowledge,
    effects: Option<KernelEffects>,
    queues: TransmitQueues,
    gates: HashMap<u64, Gate>,
    strength: Strength,
    physical_bits: u8,
    isolated: Isolated,
    watch: Option<PlannedWatch>,
    /// The module's direct calls out of it, by address.
    calls: HashMap<u64, Gva>,
}

/// What was needed to put a module into its domain, and is dropped when the guest runs again.
type Leftovers = (Plan, ModuleText);

impl Isolator {
    /// Puts functions of a module into a domain of their own.
    pub fn isolate(&self, request: IsolateRequest) -> Result<Isolated, AttachError> {
        self.not_isolated_yet(&request.module)?;
        if request.types.is_none() && request.contain.is_needed() {
            let missing = "the types of its kernel and the module (BTF) are not known".to_owned();
            return Err(AttachError::NotContained(missing));
        }
        if let Some(keep) = &request.keep_faults {
            keep.prepare()?;
        }
        let (symbols, types) = (request.symbols.clone(), request.types.clone());
        let isolated = self.make_and_put_in_place(request);
        if isolated.is_err() {
            cool(&symbols, types.as_deref());
        }
        isolated
    }

    fn make_and_put_in_place(&self, request: IsolateRequest) -> Result<Isolated, AttachError> {
        // A private view is a second mapping of the file that memory is in.
        self.vm.share_memory()?;
        let memory = self.vm.ram().memory().clone();
        let (begun, mut stopped) = (Instant::now(), Duration::ZERO);
        let mut request = Some(request);
        for _ in 0..ATTEMPTS {
            let Some(asked) = &request else { break };
            let known = KnownPlaces::of(asked)?;
            let look = |vcpus: &mut PausedVcpus<'_>| Registers::of(vcpus, &known, &memory);
            let registers = timed(&mut stopped, || self.vm.with_paused(look))??;
            let host = (self.vm.kvm(), &self.host_memory);
            let prepared = match Prepared::rehearsed(host, asked, &registers, &memory) {
                Err(error) if may_pass(&error) => continue,
                prepared => prepared?,
            };
            // Who knows already that it changed need not stop the guest.
            let Some(prepared) = prepared else { continue };
            let put = |vcpus: &mut PausedVcpus<'_>| {
                self.put_in_place(prepared, &mut request, vcpus, &memory)
            };
            // What is not needed any more is dropped when the guest runs again.
            if let Some((isolated, _)) = timed(&mut stopped, || self.vm.with_paused(put))?? {
                return Ok(isolated.took(stopped, begun.elapsed()));
            }
        }
        let asked = request.as_ref().ok_or(AttachError::Changing)?;
        let (symbols, types) = (asked.symbols.clone(), asked.types.clone());
        let at_once = |vcpus: &mut PausedVcpus<'_>| {
            let asked = request.as_ref().ok_or(AttachError::Changing)?;
            let registers = Registers::of(vcpus, &KnownPlaces::of(asked)?, &memory)?;
            let prepared = Prepared::new(
                (self.vm.kvm(), &self.host_memory),
                asked,
                &registers,
                &memory,
            )?;
            self.put_in_place(prepared, &mut request, vcpus, &memory)
        };
        let isolated = timed(&mut stopped, || self.vm.with_paused(at_once))??;
        cool(&symbols, types.as_deref());
        let (isolated, _) = isolated.ok_or(AttachError::Changing)?;
        Ok(isolated.took(stopped, begun.elapsed()))
    }

    fn not_isolated_yet(&self, module: &str) -> Result<(), AttachError> {
        if self.modules().contains_key(module) {
            return Err(AttachError::AlreadyIsolated(module.to_owned()));
        }
        // The domain would get a copy of what waits there.
        match self.text_fault_status() {
            Some(fault) if fault.module == module => Err(AttachError::TextFault),
            _ => Ok(()),
        }
    }

    /// Writes the gates of what was prepared into the guest, which is stopped, if the guest is
    /// still as it was when it was prepared; `None`, with nothing done, if it is not. Takes the
    /// request if it is done. With what was isolated comes what is not needed any more.
    fn put_in_place(
        &self,
        mut prepared: Prepared,
        request: &mut Option<IsolateRequest>,
        vcpus: &mut PausedVcpus<'_>,
        memory: &Arc<GuestMemory>,
    ) -> Result<Option<(Isolated, Leftovers)>, AttachError> {
        let Some(asked) = request else {
            return Ok(None);
        };
        self.not_isolated_yet(&asked.module)?;
        let text = text_of(&asked.module, &asked.sections)?;
        let (sregs, space) = live::kernel_tables(vcpus, prepared.physical_bits, text, memory)?;
        let virt = VirtMemory {
            space,
            memory: &**memory,
        };
        if !prepared.is_current(&sregs, &virt)? {
            return Ok(None);
        }
        set_gates(&mut prepared.gates, &virt, memory)?;
        let Some(request) = request.take() else {
            return Ok(None);
        };
        let (isolated, planned) = (prepared.isolated.clone(), prepared.watch);
        let module = request.module.clone();
        let (armed, leftovers) = prepared.arm(
            request,
            &virt,
            self.guest_time.stopwatches(),
            self.reporter.queue(),
        );
        self.modules().insert(module, armed);
        let mut watch = self.watch();
        if let (None, Some(planned)) = (*watch, planned) {
            *watch = RemovalWatch::set(planned, &virt);
        }
        Ok(Some((isolated, leftovers)))
    }
}

impl Prepared {
    /// Makes everything ready that can be while the guest runs.
    fn new(
        (kvm, host_memory): (&Kvm, &HostMemory),
        request: &IsolateRequest,
        registers: &Registers,
        memory: &Arc<GuestMemory>,
    ) -> Result<Self, AttachError> {
        let virt = VirtMemory {
            space: registers.space,
            memory: &**memory,
        };
        let (symbols, types) = (&request.symbols, request.types.as_deref());
        let layout = ModuleLayout::new(&request.module, &request.sections, None, &virt)?;
        let text = layout.read_text(&virt)?;
        let mut strength = Strength::default();
        let policy = containment(request, &layout, &virt, &mut strength)?;
        let effects = request.model.as_ref().zip(types);
        strength.model = effects.map(|(model, _)| model.kernel.clone());
        if request.model.is_none() {
            let kernel = &request.kernel;
            let missing =
                format!("what the functions of the guest's kernel ({kernel}) leave behind");
            strength.missing.push(missing);
        }
        let effects = effects.map(|(model, types)| model.resolve(symbols, types));
        // Only calls that can be taken back keep packets out.
        let guarding = types.filter(|_| effects.is_some());
        let is_guarded = |name: &str| guarding.is_some_and(|types| is_transmit_named(types, name));
        let of_blocks = types.filter(|types| serves_blocks(types));
        let no_answer = |name: &str| no_answer(of_blocks?, name);
        let plan = Plan::new(
            &request.wanted,
            &layout,
            &text,
            symbols,
            (&is_guarded, &no_answer),
        )?;
        let mut domain = make_domain((kvm, host_memory), request, registers, &plan, memory)?;
        if let Some(effects) = &effects {
            domain.look_at_arguments(effects.keeps.keys().copied());
        }
        if let Some(policy) = &policy {
            domain.tell_answers(policy.answering());
        }
        let faults = fault_tables(&virt, symbols);
        let gates = gates_of(&plan, types, &mut strength);
        let knowledge = Knowledge::new(&layout, symbols.clone(), faults);
        let redirects = plan.redirects.iter();
        Ok(Self {
            calls: redirects.map(|(site, target)| (site.0, *target)).collect(),
            isolated: isolated(&plan, &knowledge, &strength),
            watch: types.and_then(|types| RemovalWatch::plan(types, symbols)),
            knowledge,
            queues: types.map_or_else(TransmitQueues::default, |types| {
                TransmitQueues::new(types, symbols)
            }),
            physical_bits: registers.physical_bits,
            layout,
            text,
            plan,
            policy,
            domain,
            effects,
            gates,
            strength,
        })
    }

    /// The same, rehearsed; `None` if the guest has changed meanwhile.
    fn rehearsed(
        host: (&Kvm, &HostMemory),
        request: &IsolateRequest,
        registers: &Registers,
        memory: &Arc<GuestMemory>,
    ) -> Result<Option<Self>, AttachError> {
        let mut prepared = Self::new(host, request, registers, memory)?;
        let is_current = prepared.rehearse(request, registers, memory)?;
        if !is_current {
            tracing::debug!("{} changed while it was looked at", request.module);
        }
        Ok(is_current.then_some(prepared))
    }

    /// Does while the guest runs what is to be done when it is stopped, and at the first call:
    /// whoever waits then need not wait for code and data to be read from files. Says whether the
    /// guest is as it was read until now, which is asked again when it is stopped; what calls would
    /// reach is of no account.
    fn rehearse(
        &mut self,
        request: &IsolateRequest,
        registers: &Registers,
        memory: &Arc<GuestMemory>,
    ) -> Result<bool, AttachError> {
        // What calls need of it comes back by itself, the more of it now.
        cool(&request.symbols, request.types.as_deref());
        let space = registers.space;
        if let Some(policy) = &mut self.policy {
            let (private, shared) = self.domain.memories();
            let memory = CallMemory {
                private: VirtMemory {
                    space,
                    memory: &private,
                },
                before: MemoryBefore::new(&shared),
                stack: None,
                per_cpu_base: registers.sregs.gs.base,
            };
            let gates = self.plan.gates.iter();
            policy.rehearse(&memory, gates.map(|gate| gate.name.as_str()));
        }
        let virt = VirtMemory {
            space,
            memory: &**memory,
        };
        self.is_current(&registers.sregs, &virt)
    }

    /// Whether the guest is as it was when all this was read. Only of one that is stopped it says
    /// so for longer than it takes.
    fn is_current(
        &mut self,
        sregs: &kvm_sregs,
        virt: &VirtMemory<'_, GuestMemory>,
    ) -> Result<bool, AttachError> {
        let same_text = self
            .layout
            .read_text(virt)
            .is_ok_and(|now| now == self.text);
        Ok(same_text && self.domain.is_current(sregs.cr3)?)
    }

    /// The module as it is once its gates are there.
    fn arm(
        self,
        request: IsolateRequest,
        virt: &VirtMemory<'_, GuestMemory>,
        stopwatches: Stopwatches,
        reports: Queue,
    ) -> (Armed, Leftovers) {
        let call_loop = self.effects.is_some();
        let symbols = request.symbols.clone();
        let subject = Subject {
            module: request.module,
            sections: request.sections,
            kernel: request.kernel,
            symbols: request.symbols,
            types: request.types,
            physical_bits: self.physical_bits,
        };
        let keeper = request.keep_faults.map(|keep| Keeper::new(keep, subject));
        let call_loop = call_loop.then(|| CallLoop::place(&self.layout, virt));
        let armed = Armed {
            wanted: Arc::default(),
            domain: self.domain,
            policy: self.policy,
            guest: KnownGuest {
                knowledge: self.knowledge,
                effects: self.effects,
                calls: self.calls,
                strength: self.strength,
                physical_bits: self.physical_bits,
            },
            gates: self.gates,
            open: InTheGuest::new(call_loop.flatten(), stopwatches),
            packets: KeptPackets {
                queues: self.queues,
                guarding: false,
            },
            device: ModuleDevice::new(request.device, request.device_slots),
            limits: Limits {
                budget: request.budget,
                sleep_limit: request.sleep_limit,
            },
            timers: Timers::default(),
            failures: Failures::new(request.policy, keeper, symbols, reports),
            faults: Faults::default(),
            tracer: None,
            stopped: false,
            broken: None,
        };
        (armed, (self.plan, self.text))
    }
}

impl Isolated {
    fn took(self, stopped: Duration, all: Duration) -> Self {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Self {
            stopped_us: micros(stopped),
            prepared_us: micros(all.saturating_sub(stopped)),
            ..self
        }
    }
}

/// What is isolated by this plan; the times are not known yet.
fn isolated(plan: &Plan, knowledge: &Knowledge, strength: &Strength) -> Isolated {
    let targets = plan.redirects.iter().map(|(_, target)| *target);
    Isolated {
        entries: plan.gates.iter().map(|gate| gate.name.clone()).collect(),
        refused: plan.refused.clone(),
        redirected_calls: plan.redirects.len(),
        imports: knowledge.names_of(targets),
        strength: strength.clone(),
        stopped_us: 0,
        prepared_us: 0,
    }
}

/// What the module's calls may write. Without that they are isolated only if it is all the same to
/// who asks.
fn containment(
    request: &IsolateRequest,
    layout: &ModuleLayout,
    virt: &VirtMemory<'_, GuestMemory>,
    strength: &mut Strength,
) -> Result<Option<DriverPolicy>, AttachError> {
    let policy = match &request.types {
        Some(types) => {
            let has_symbol = |name: &str| request.symbols.kernel_symbol(name).is_some();
            let lacking = lacking(types, &has_symbol);
            match lacking.is_empty() {
                true => driver_policy(types.clone(), layout, &request.symbols, virt),
                false => Err(not_found(&request.kernel, &lacking)),
            }
        }
        None => Err("the types of its kernel and the module (BTF) are not known".to_owned()),
    };
    match policy {
        Ok(policy) => {
            strength.contained = true;
            strength.each_store = request.contain == Contain::Exact;
            Ok(Some(policy))
        }
        Err(missing) if request.contain.is_needed() => Err(AttachError::NotContained(missing)),
        Err(missing) => {
            tracing::warn!("calls of {} are not contained: {missing}", request.module);
            strength.missing.push(missing);
            Ok(None)
        }
    }
}

/// In words, what of the kernel of this release is not found.
fn not_found(kernel: &str, lacking: &[String]) -> String {
    let names = lacking.join(", ");
    format!("not found in the guest's kernel ({kernel}), or under another name: {names}")
}

/// Whether what failed may work a moment later: the guest was running and what was read was
/// changing.
fn may_pass(error: &AttachError) -> bool {
    matches!(
        error,
        AttachError::Memory(_) | AttachError::Domain(_) | AttachError::Module(_)
    )
}

/// Gives up the memory of what was looked at of symbols and types.
fn cool(symbols: &SymbolTable, types: Option<&Btf>) {
    symbols.cool();
    if let Some(types) = types {
        types.cool();
    }
}

/// Adds the time that `work` takes to `spent`.
fn timed<T>(spent: &mut Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    *spent += start.elapsed();
    result
}
