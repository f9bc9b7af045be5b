//! A module whose functions are gated: its calls, from the gate to the registers that the guest
//! goes on with.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::bus::Bus;
use devices::dma::GuestMemory;
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::compensation::call_loop::CallLoop;
use crate::compensation::guest_calls::GuestCalls;
use crate::compensation::guest_time::Stopwatches;
use crate::compensation::transmit_queues::TransmitQueues;
use crate::dispatch::call_trace::Tracer;
use crate::dispatch::failures::Failures;
use crate::dispatch::fault::Faults;
use crate::dispatch::overdue::Timers;
use crate::dispatch::returning::Returning;
use crate::dispatch::supervisor::Knowledge;
use crate::domain::Domain;
use crate::domain::attempt::Attempt;
use crate::domain::effects::{KernelCall, KernelEffects};
use crate::domain::transaction::{CallEnd, CallResult, SpilledCall};
use crate::guest::addr::Gva;
use crate::guest::gate::{clear_gate, set_gate};
use crate::guest::paging::{AddressSpace, VirtMemory};
use crate::policy::abort_value::AbortReturn;
use crate::policy::call::DriverPolicy;
use crate::status::Strength;
use crate::status::{EntryStatus, ModuleStatus};
use devices::hold::{DeviceLost, Holdable};

/// The return gate is the second `out` of a gate.
pub(crate) const RETURN_GATE_OFFSET: u64 = 2;

/// A gate in the guest.
pub(crate) struct Gate {
    pub gpa: u64,
    /// Where the function goes on behind the gate.
    pub body: u64,
    pub entry: EntryStatus,
    pub aborted: AbortReturn,
    /// The kernel gives it packets, and keeps those that it does not take.
    pub transmits: bool,
    /// The last call of it that has ended has failed.
    pub failed_last: bool,
    /// Calls of it return their errors without being run, until the device begins anew.
    pub rests: bool,
    /// It is no gate of an isolated function, and there only while packets are kept out.
    pub is_guard: bool,
}

impl Gate {
    /// Counts a call that took `time`, or the part of one that comes back from the guest.
    pub fn count(
        &mut self,
        result: &CallResult,
        comes_back: bool,
        time: Duration,
        holding: Duration,
    ) {
        self.failed_last &= !matches!(result.end, CallEnd::Committed);
        self.entry.count(result, comes_back, time);
        let holding = u64::try_from(holding.as_nanos()).unwrap_or(u64::MAX);
        self.entry.holding_ns += holding;
    }
}

/// A module whose functions are gated.
pub(crate) struct Armed {
    /// Shared with the marks of the machine that were made while this was isolated: as long as
    /// there are any, it may be needed again.
    pub wanted: Arc<()>,
    pub domain: Domain,
    /// What calls may write; `None` if the guest's types or memory management are not known.
    pub policy: Option<DriverPolicy>,
    pub guest: KnownGuest,
    /// By address of the gate.
    pub gates: HashMap<u64, Gate>,
    pub open: InTheGuest,
    pub packets: KeptPackets,
    pub device: ModuleDevice,
    pub limits: Limits,
    /// Timers that call it.
    pub timers: Timers,
    pub failures: Failures,
    /// Faults that are put into calls on purpose.
    pub faults: Faults,
    /// Records calls, where that was asked for.
    pub tracer: Option<Box<Tracer>>,
    /// Calls return their errors without being run.
    pub stopped: bool,
    /// Why the domain is not used any more.
    pub broken: Option<String>,
}

/// What is known of the guest and the module.
pub(crate) struct KnownGuest {
    pub knowledge: Knowledge,
    /// What is known of the kernel's functions.
    pub effects: Option<KernelEffects>,
    /// Targets of calls out of the module, by the address of their displacement's opcode.
    pub calls: HashMap<u64, Gva>,
    /// How strong the isolation is.
    pub strength: Strength,
    pub physical_bits: u8,
}

/// What the guest does for calls of the module.
pub(crate) struct InTheGuest {
    /// Calls that went on in the guest, by the stack pointer with which they come back.
    pub spilled: HashMap<u64, OpenCall>,
    /// Kernel functions that the guest calls for calls that have ended, by the stack pointer with
    /// which they come back.
    pub guest_calls: HashMap<u64, GuestCalls>,
    /// Calls kernel functions for `guest_calls`; `None` if the module's text has no room for it.
    pub call_loop: Option<CallLoop>,
    /// A thread may be in it that is not among these, and that returns by itself: it stays where it
    /// is, which whoever isolates the module anew knows.
    pub loop_stays: bool,
    /// Measure how long those take.
    pub stopwatches: Stopwatches,
    /// Threads that may have been at a return gate when their call was given to the guest for good.
    pub returning: Vec<Returning>,
}

impl InTheGuest {
    /// Nothing yet.
    pub fn new(call_loop: Option<CallLoop>, stopwatches: Stopwatches) -> Self {
        Self {
            spilled: HashMap::new(),
            guest_calls: HashMap::new(),
            loop_stays: call_loop.is_some_and(CallLoop::was_there),
            call_loop,
            stopwatches,
            returning: Vec::new(),
        }
    }
}

/// Packets that are kept out of the driver while calls are in the guest that could not be taken
/// back with them in the device's ring.
#[derive(Default)]
pub(crate) struct KeptPackets {
    /// Transmit queues that are stopped for it.
    pub queues: TransmitQueues,
    /// Guards are set.
    pub guarding: bool,
}

/// The module's device.
pub(crate) struct ModuleDevice {
    pub holdable: Option<Arc<dyn Holdable>>,
    /// PCI slots of it.
    pub slots: Vec<u8>,
    /// It does not interrupt, because calls are being taken back.
    pub withholding: bool,
    /// The outside does not see what becomes of it, because calls are in the guest that may be
    /// taken back.
    pub outside_kept: bool,
}

impl ModuleDevice {
    /// One from which nothing is kept.
    pub fn new(holdable: Option<Arc<dyn Holdable>>, slots: Vec<u8>) -> Self {
        Self {
            holdable,
            slots,
            withholding: false,
            outside_kept: false,
        }
    }

    /// Keeps it from interrupting and from moving data. Functions that are not isolated may have
    /// set it going again, and an interrupt that nobody acknowledges comes for ever.
    fn silence(&self) -> Result<(), DeviceLost> {
        let Some(device) = &self.holdable else {
            return Ok(());
        };
        device.hold(&mut |held| held.silence())
    }
}

/// How long a call may take.
pub(crate) struct Limits {
    /// Processor time of its own.
    pub budget: Duration,
    /// Waits that leave it atomic.
    pub sleep_limit: Duration,
}

/// A call that went on in the guest.
pub(crate) struct OpenCall {
    /// Address of the gate it came through.
    pub gate: u64,
    /// Which run of the call it is.
    pub attempt: Attempt,
    pub call: Box<SpilledCall>,
}

/// A vCPU of the guest at a gate.
pub(crate) struct AtGate<'a> {
    /// When it came there.
    pub reached: Instant,
    /// Time that it took to hold the other vCPUs and the devices.
    pub holding: Duration,
    /// Number of the vCPU.
    pub index: u8,
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub vcpu: &'a VcpuFd,
    pub vm: &'a VmFd,
    /// Devices at I/O ports.
    pub ports: &'a Bus,
}

impl Armed {
    /// Runs the function behind `gate` and returns the registers to go on with.
    pub fn call(&mut self, gate: u64, attempt: Attempt, at: &AtGate<'_>) -> kvm_regs {
        let keeps_out = keeps_packets_out(&self.open.spilled);
        // The call that kept packets out was given to the guest, or has never come back.
        if !self.packets.queues.is_empty() && !keeps_out {
            let memory = self.domain.memories().1;
            self.packets.queues.give_up(VirtMemory {
                space: self.space(&at.sregs),
                memory: &memory,
            });
        }
        let Some(known) = self.gates.get_mut(&gate) else {
            return at.regs;
        };
        let unisolated = kvm_regs {
            rip: known.body,
            ..at.regs
        };
        let is_kept_out = known.transmits && keeps_out;
        // What is stopped needs no domain for that.
        let is_broken = self.broken.is_some() && !self.stopped && !known.rests;
        if is_broken || known.is_guard && !is_kept_out {
            return unisolated;
        }
        if self.stopped || known.rests || is_kept_out {
            let arguments = arguments(&at.regs);
            let rax = known.aborted.value.rax(&arguments);
            match is_kept_out {
                true => known.entry.kept_out += 1,
                false => known.entry.refused += 1,
            }
            if !is_kept_out {
                // What it was told when the driver was stopped is in the log.
                let _ = self.device.silence();
            }
            let memory = self.domain.memories().1;
            let virt = VirtMemory {
                space: self.space(&at.sregs),
                memory: &memory,
            };
            if is_kept_out {
                self.packets.queues.stop(arguments[0], arguments[1], virt);
            }
            return match returned(&at.regs, virt, rax) {
                Some(next) if !is_kept_out => self.complete(gate, &at.regs, next, at),
                next => next.unwrap_or(unisolated),
            };
        }
        let (failed_last, commits) = (known.failed_last, known.entry.commits);
        // What has failed is never left to the guest, whatever time it takes.
        let by_timer = attempt.is_first() && self.is_called_by_timer(at);
        let is_in_time = !by_timer
            || self
                .timers
                .begins(gate, at.regs.rdi, at.reached, at.holding);
        if !is_in_time && !failed_last {
            if let Some(known) = self.gates.get_mut(&gate) {
                known.entry.count_overdue();
            }
            return unisolated;
        }
        let next = self.run(gate, None, attempt, at).unwrap_or(unisolated);
        let known = self.gates.get(&gate);
        if by_timer && known.is_some_and(|known| known.entry.commits > commits) {
            let took = at.reached.elapsed();
            self.timers.committed(took.saturating_sub(at.holding));
        }
        next
    }

    /// Whether the vCPU at a gate came there from what the kernel calls timers' functions by.
    fn is_called_by_timer(&self, at: &AtGate<'_>) -> bool {
        let memory = self.domain.memories().1;
        let virt = VirtMemory {
            space: self.space(&at.sregs),
            memory: &memory,
        };
        let caller = virt.read_u64(Gva(at.regs.rsp)).ok();
        caller.is_some_and(|caller| self.guest.knowledge.runs_timers(Gva(caller)))
    }

    /// Goes on with a call whose kernel function has reached the return gate, and returns the
    /// registers to go on with.
    pub fn go_on(&mut self, mut open: OpenCall, at: &AtGate<'_>) -> kvm_regs {
        let memory = self.domain.memories().1;
        let virt = VirtMemory {
            space: self.space(&at.sregs),
            memory: &memory,
        };
        self.packets.queues.let_go(virt);
        if self.broken.is_none()
            && let Some(next) = self.run(open.gate, Some(&mut open.call), open.attempt, at)
        {
            return next;
        }
        let finally = kvm_regs {
            rip: self.hand_over(&open).next,
            ..at.regs
        };
        let calls = self.and_let_packets_pass(open.call.take_deferred());
        let calling = GuestCalls::new(open.gate, calls, finally, None);
        self.run_guest_calls(calling.keeping(open.call.take_kept()), at)
    }

    /// What the guest calls when a call has ended: `calls`, and what has the packets sent that were
    /// kept out, if no other call keeps them.
    pub(super) fn and_let_packets_pass(&mut self, mut calls: Vec<KernelCall>) -> Vec<KernelCall> {
        if !keeps_packets_out(&self.open.spilled) {
            calls.extend(self.packets.queues.schedule());
        }
        calls
    }

    /// Sets or takes out the guards of the transmit functions that are not isolated, as long as
    /// packets are kept out of calls. The guest's other processors are held.
    pub fn guard(&mut self) {
        let guarding = keeps_packets_out(&self.open.spilled);
        if self.packets.guarding == guarding {
            return;
        }
        self.packets.guarding = guarding;
        let memory = self.domain.memories().1;
        for gate in self.gates.values().filter(|gate| gate.is_guard) {
            match guarding {
                true if set_gate(&memory, gate.gpa) => {}
                true => tracing::error!("packets are not kept out of {}", gate.entry.name),
                false => clear_gate(&memory, gate.gpa),
            }
        }
    }

    pub(crate) fn space(&self, sregs: &kvm_sregs) -> AddressSpace {
        AddressSpace::from_registers(sregs.cr3, sregs.cr4, sregs.efer, self.guest.physical_bits)
    }

    /// Has calls return their errors without being run, and silences the device.
    pub fn stop(&mut self) {
        self.stopped = true;
        if let Err(lost) = self.device.silence() {
            tracing::warn!("the device of a stopped driver is not silent: {lost}");
        }
    }

    /// Calls of this function are not run until [`Armed::device_begins_anew`].
    pub fn rest(&mut self, gate: u64) {
        if let Some(gate) = self.gates.get_mut(&gate) {
            gate.rests = true;
        }
        if let Err(lost) = self.device.silence() {
            tracing::warn!(
                "the device of a driver that fails again and again is not silent: {lost}"
            );
        }
    }

    /// The driver is about to set its device up anew: all functions are run again.
    pub fn device_begins_anew(&mut self) {
        for gate in self.gates.values_mut() {
            gate.rests = false;
        }
    }

    pub fn status(&self, module: &str) -> ModuleStatus {
        // A guard that kept something out is told of.
        let gates = self.gates.values();
        let told = gates.filter(|gate| !gate.is_guard || gate.entry.kept_out > 0);
        let mut entries: Vec<_> = told.map(|gate| gate.entry.clone()).collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        ModuleStatus {
            module: module.to_owned(),
            entries,
            violations: self.failures.violations,
            stopped: self.stopped,
            warm_pages: self.domain.warm_pages(),
            broken: self.broken.clone(),
            strength: self.guest.strength.clone(),
        }
    }
}

/// Whether one of these calls could not be taken back with packets of others in the device's ring.
fn keeps_packets_out(open: &HashMap<u64, OpenCall>) -> bool {
    open.values().any(|open| open.call.keeps_packets_out())
}

/// Whether any of these calls can be taken back.
pub(crate) fn may_be_taken_back(spilled: &HashMap<u64, OpenCall>) -> bool {
    spilled.values().any(|open| open.call.is_journalled())
}

/// The arguments that a function gets in registers.
pub(crate) fn arguments(regs: &kvm_regs) -> [u64; 6] {
    [regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.r8, regs.r9]
}

/// The registers after a function returned `rax` to its caller without having been run.
fn returned(regs: &kvm_regs, virt: VirtMemory<'_, GuestMemory>, rax: u64) -> Option<kvm_regs> {
    let mut address = [0; 8];
    virt.read(Gva(regs.rsp), &mut address).ok()?;
    Some(kvm_regs {
        rax,
        rip: u64::from_le_bytes(address),
        rsp: regs.rsp.wrapping_add(8),
        ..*regs
    })
}
