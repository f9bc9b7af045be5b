//! One isolated call, from its entry to commit, abort, spill or pass-through.
//!
//! ```text
//!            ┌──────────────────────────── fill, open, cross, call back ─┐
//!            ▼                                                           │
//!  begin ─► run P ─► exit ─┬─ an access the roots can be changed for ────┘
//!                          ├─ device access: queue it, or publish and perform it ─► run P
//!                          ├─ return ─► check ─► publish ─► Committed
//!                          ├─ violation ─► undo ─► Aborted
//!                          ├─ a wait that is short enough ─► wait ─► run P
//!                          └─ something that only the guest can do ─┬─ publish ─► Spilled
//!                                                                   └─ undo ─► PassThrough
//! ```
//!
//! The caller holds the guest's other vCPUs and its emulated devices for the whole call: nobody
//! else writes guest memory meanwhile.
//!
//! A spilled call goes on in the guest in the middle of a kernel function and comes back when that
//! function returns (`spill.rs`). A call that passes through leaves no trace, and the guest runs
//! the function itself, unisolated; that happens where the guest could not take over at the very
//! instruction.
//!
//! A call that is about to spill for the first time is taken back and run once more with a journal
//! (`journal.rs`), so that it can be undone to its beginning if it fails after that. Calls that do
//! not spill pay nothing for it.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use kvm_bindings::kvm_regs;

use super::Domain;
use super::effects::KernelCall;
use super::error::DomainError;
use super::host_memory::Kept;
use super::journal::Journal;
use super::list_links::ChangedLinks;
use super::monitor::{
    ExceptionFrame, PORT_CALLBACK_RETURN, PORT_EXCEPTION, PORT_FATAL, PORT_JOURNAL, PORT_RETURN,
    PORT_SLEEP, PORT_STRIKE, PORT_TRAPPED,
};
use super::private_vm::Exit;
use super::roots::{Fill, Root, RootError};
use super::supervisor::{KernelExceptionVerdict, Supervisor};
use super::view::{PAGE_SIZE, Page, Pfn};
use super::violation::{Violation, ViolationKind};
use crate::guest::addr::{Gva, GvaRange};
use crate::policy::diff::PageMask;
use devices::hold::{Access, DeviceAddress};

mod call;
mod callbacks;
mod device;
mod exact;
mod exits;
mod failing;
mod faults;
mod finish;
mod journal;
mod kept_arguments;
mod memory;
mod preserved;
mod sleep;
mod spill;
mod time;

pub use call::{AbortPhases, CallEnd, CallRequest, CallResult, CallStats, PassThroughReason};
pub use spill::SpilledCall;
pub use time::CallTime;

use callbacks::Callback;
use preserved::Preserved;
use time::Meter;

/// RFLAGS.IF.
const INTERRUPT_FLAG: u64 = 1 << 9;
/// RFLAGS.TF.
const TRAP_FLAG: u64 = 1 << 8;
/// Stacks that a call may be on: a thread's, and the interrupts' of each processor that it has gone
/// on on.
const MAX_STACKS: usize = 16;
/// Device stores that may wait for commit.
const MAX_POSTED: usize = 4096;
/// Unusual exits after which a call is given up, those at journalled kernel functions left aside:
/// no honest call comes near.
const MAX_DETOURS: u32 = 1 << 16;

/// Length of `out imm8, al`.
pub(super) const OUT_BYTES: u64 = 2;

const VECTOR_DEVICE_NOT_AVAILABLE: u8 = 7;
const VECTOR_DEBUG: u8 = 1;
const VECTOR_NMI: u8 = 2;
const VECTOR_MACHINE_CHECK: u8 = 18;
const VECTOR_BREAKPOINT: u8 = 3;
const VECTOR_PAGE_FAULT: u8 = 14;
const PF_PRESENT: u64 = 1 << 0;
const PF_WRITE: u64 = 1 << 1;
const PF_FETCH: u64 = 1 << 4;

#[derive(Debug, Clone, Copy)]
struct PostedWrite {
    at: DeviceAddress,
    value: u64,
    bytes: usize,
}

/// A page of which something was published before the end of the call.
struct Overwritten {
    /// Bytes that were.
    bytes: PageMask,
    /// What they were when the call, or this part of it, began.
    old: Box<Page>,
}

/// What a call led to.
enum Outcome {
    Ended(CallEnd, kvm_regs),
    /// It is to be run once more, with a journal; nothing of it is left.
    WithJournal,
}

/// What an exit leads to.
enum Step {
    Continue,
    Returned,
    Violation(ViolationKind, u64),
    /// Only the guest can go on, with these registers if it can do so from here.
    GuestOnly(PassThroughReason, Option<Box<kvm_regs>>),
}

pub(super) struct Call<'a> {
    domain: &'a mut Domain,
    supervisor: &'a mut dyn Supervisor,
    request: &'a CallRequest<'a>,
    /// Registers at the entry of the call.
    entry: kvm_regs,
    /// Times that the call went on in the guest.
    spills: u32,
    return_address: u64,
    return_slot: (Pfn, usize),
    /// Pages written by the host on P's behalf, which KVM does not know of.
    host_written: Vec<Pfn>,
    callbacks: Vec<Callback>,
    /// The stack it was entered on, and those on which the kernel has called the driver back.
    stacks: Vec<GvaRange>,
    posted: Vec<PostedWrite>,
    /// One of these may have the device use guest memory.
    posted_use_memory: bool,
    overwritten: BTreeMap<Pfn, Overwritten>,
    /// Pages that it was let write, and that the next call is not.
    passing: Vec<(Pfn, u64)>,
    /// Pages that are open for the one store that is being carried out.
    stepping: Vec<(Pfn, u64)>,
    /// Kept by calls that go on in the guest.
    journal: Option<Box<Journal>>,
    kernel_calls: Vec<KernelCall>,
    /// What is charged for them.
    calls_kept: Kept,
    lists: Vec<ChangedLinks>,
    /// What is charged for the call itself until its end.
    kept: Kept,
    harvested: Vec<Pfn>,
    /// Of these, pages that are charged.
    copies_charged: usize,
    reached_device: bool,
    /// It could not be put back.
    device_lost: bool,
    detours: u32,
    last_fault: (u64, u64, u32),
    /// Instruction and stack pointer of the last exception.
    interrupted_at: (u64, u64),
    /// Tables of this root were changed while P was on it, and the processor may remember what they
    /// were.
    outdated: Option<Root>,
    stats: CallStats,
    /// Time that it has had, its earlier parts and attempts among it.
    time: CallTime,
    meter: Meter,
    last_exit: Instant,
    phases: AbortPhases,
    /// Where the last wait was called from, and how often running.
    last_sleep: (u64, u32),
}

impl Domain {
    /// Carries out one call. On an error guest and device are as before the call, and the domain
    /// should be taken down.
    pub fn call(
        &mut self,
        request: &CallRequest<'_>,
        supervisor: &mut dyn Supervisor,
    ) -> Result<CallResult, DomainError> {
        self.carry_out(request, supervisor, None)
    }

    /// Goes on with a call that was spilled and whose kernel function has reached the return gate,
    /// where the guest's vCPU stands as `request` says. On an error guest and device are as they
    /// were when it came back, it keeps its journal, and it can be given to the guest for good
    /// ([`Domain::hand_over`]).
    pub fn go_on(
        &mut self,
        spilled: &mut SpilledCall,
        request: &CallRequest<'_>,
        supervisor: &mut dyn Supervisor,
    ) -> Result<CallResult, DomainError> {
        self.carry_out(request, supervisor, Some(spilled))
    }

    /// Begins a call, or goes on with a spilled one, whose journal goes over into the result.
    pub(crate) fn carry_out(
        &mut self,
        request: &CallRequest<'_>,
        supervisor: &mut dyn Supervisor,
        mut spilled: Option<&mut SpilledCall>,
    ) -> Result<CallResult, DomainError> {
        let mut journal = spilled.as_mut().and_then(|spilled| spilled.journal.take());
        let before = spilled.as_deref();
        let mut time = before.map_or_else(CallTime::default, |spilled| spilled.time);
        let mut result = self.attempt(request, supervisor, before, &mut journal, &mut time);
        if matches!(result, Ok(None)) {
            supervisor.begin_again();
            journal = Some(Box::default());
            result = self.attempt(request, supervisor, before, &mut journal, &mut time);
        }
        if let Some(spilled) = spilled {
            spilled.journal = journal;
        }
        result?.ok_or(DomainError::Internal("a call was begun again twice"))
    }

    /// `None` if the call is to be run with a journal. On an error `journal` is as it was.
    fn attempt(
        &mut self,
        request: &CallRequest<'_>,
        supervisor: &mut dyn Supervisor,
        spilled: Option<&SpilledCall>,
        journal: &mut Option<Box<Journal>>,
        time: &mut CallTime,
    ) -> Result<Option<CallResult>, DomainError> {
        let (runs, crossings) = (self.vm.runs(), self.monitor.crossings());
        let journalled = journal.is_some();
        if let (true, Some(effects)) = (journalled, request.effects) {
            self.monitor.journal(|function| effects.matters(function));
        }
        let kept = self.host_memory.nothing();
        let mut call = Call {
            domain: self,
            supervisor,
            request,
            entry: spilled.map_or(request.regs, |spilled| spilled.entry),
            spills: spilled.map_or(0, |spilled| spilled.spills),
            return_address: 0,
            return_slot: (Pfn(0), 0),
            host_written: Vec::new(),
            callbacks: Vec::new(),
            stacks: vec![request.stack],
            posted: Vec::new(),
            posted_use_memory: false,
            overwritten: BTreeMap::new(),
            passing: Vec::new(),
            stepping: Vec::new(),
            journal: journal.take(),
            kernel_calls: Vec::new(),
            calls_kept: Kept::default(),
            lists: Vec::new(),
            kept,
            harvested: Vec::new(),
            copies_charged: 0,
            reached_device: false,
            device_lost: false,
            detours: 0,
            last_fault: (0, 0, 0),
            interrupted_at: (0, 0),
            outdated: None,
            stats: CallStats::default(),
            time: *time,
            meter: Meter::default(),
            last_exit: Instant::now(),
            phases: AbortPhases::default(),
            last_sleep: (0, 0),
        };
        let outcome = call.carry_out(spilled);
        let has_failed = outcome.is_err();
        if has_failed {
            call.leave_nothing();
            *journal = call.journal.take();
        }
        let (mut stats, phases) = (call.stats, call.phases);
        let kernel_calls = std::mem::take(&mut call.kernel_calls);
        let kept = std::mem::take(&mut call.calls_kept);
        let lists = std::mem::take(&mut call.lists);
        *time = call.time;
        let mut passing = std::mem::take(&mut call.passing);
        passing.append(&mut call.stepping);
        self.close(&passing);
        self.has_failed |= has_failed;
        if journalled {
            self.monitor.journal(|_| false);
        }
        stats.runs = self.vm.runs() - runs;
        stats.crossings = self.monitor.crossings() - crossings;
        Ok(match outcome? {
            Outcome::WithJournal => None,
            Outcome::Ended(end, regs) => Some(CallResult {
                end,
                regs,
                stats,
                time: *time,
                phases,
                kernel_calls,
                kept,
                lists,
            }),
        })
    }
}

impl Call<'_> {
    fn carry_out(&mut self, spilled: Option<&SpilledCall>) -> Result<Outcome, DomainError> {
        let begun = match spilled {
            None => self.begin()?,
            Some(spilled) => self.begin_again(spilled)?,
        };
        let step = match begun {
            None => self.run_or_give_up()?,
            Some(reason) => Step::GuestOnly(reason, None),
        };
        let ended = match step {
            Step::Returned => match self.check_return() {
                Some((kind, rip)) => self.abort(kind, rip),
                None => self.commit(),
            },
            Step::Violation(kind, rip) => self.abort(kind, rip),
            Step::GuestOnly(_, Some(_)) if self.wants_journal() => {
                self.take_back()?;
                match self.device_lost {
                    true => self.abort(ViolationKind::DeviceLost, self.domain.vm.regs().rip),
                    false => return Ok(Outcome::WithJournal),
                }
            }
            Step::GuestOnly(reason, at) => match self.go_on_in_the_guest(reason, at)? {
                Some(end) => Ok(end),
                None if self.spills > 0 => {
                    self.abort(ViolationKind::LostSpill, self.domain.vm.regs().rip)
                }
                None => {
                    self.take_back()?;
                    match self.device_lost {
                        true => self.abort(ViolationKind::DeviceLost, self.domain.vm.regs().rip),
                        false => Ok((CallEnd::PassThrough(reason), self.request.regs)),
                    }
                }
            },
            Step::Continue => Err(DomainError::Internal("a call stopped without a reason")),
        };
        ended.map(|(end, regs)| Outcome::Ended(end, regs))
    }

    /// Spills, if the guest can go on with these registers.
    fn go_on_in_the_guest(
        &mut self,
        reason: PassThroughReason,
        at: Option<Box<kvm_regs>>,
    ) -> Result<Option<(CallEnd, kvm_regs)>, DomainError> {
        match at {
            Some(at) => self.spill(reason, &at),
            None => Ok(None),
        }
    }

    /// Makes P ready for a call: pages, control registers, clock and roots as the guest has them
    /// now.
    fn prepare(&mut self) -> Result<Option<PassThroughReason>, DomainError> {
        let domain = &mut *self.domain;
        self.stats.other_syscalls += domain.drop_stale()?;
        domain.warm.refresh(&mut domain.view)?;
        domain.overlays.follow_one(&mut domain.view)?;
        if domain.adopt(self.request.sregs)? {
            self.stats.other_syscalls += 2;
        }
        if let Some(clock) = self.request.clock {
            self.stats.other_syscalls += domain.vm.follow_clock(clock)?;
        }
        let cr3 = self.request.sregs.cr3;
        domain.roots.enter(cr3, &mut domain.monitor);
        if !domain.roots.fresh(cr3, &domain.view) {
            domain.opened.clear();
            match domain.build_roots(cr3) {
                Ok(()) => self.stats.rebuilds += 1,
                Err(DomainError::Roots(RootError::OutOfTables)) => {
                    return Ok(Some(PassThroughReason::PageTables));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Brings P to the entry of the function. `Some` says why the call cannot be isolated.
    fn begin(&mut self) -> Result<Option<PassThroughReason>, DomainError> {
        if let Some(reason) = self.prepare()? {
            return Ok(Some(reason));
        }
        let domain = &mut *self.domain;
        domain.monitor.begin_call(self.request.function);
        let rsp = self.entry.rsp;
        let Some(slot) = domain
            .roots
            .translate(rsp, &domain.view)?
            .filter(|_| rsp.is_multiple_of(8))
        else {
            return Ok(Some(PassThroughReason::Stack));
        };
        self.return_slot = (Pfn::of(slot.gpa), (slot.gpa % PAGE_SIZE) as usize);
        if !domain.view.contains(self.return_slot.0) {
            return Ok(Some(PassThroughReason::Stack));
        }
        self.return_address = self.read_slot(self.return_slot)?;
        let stub = self.domain.monitor.exit_stub();
        self.write_slot(self.return_slot, stub)?;
        for va in [rsp.wrapping_sub(8), rsp.wrapping_sub(PAGE_SIZE / 2)] {
            if self.in_own_stack(va) && !self.domain.roots.is_open(Root::Driver, va) {
                self.open(va)?;
            }
        }
        for va in self.supervisor.expected() {
            self.open_expected(va)?;
        }
        self.begin_journal()?;
        self.start(&self.entry.clone());
        Ok(None)
    }

    /// Opens the page at `va`, where the call will probably store, if that would open it.
    pub(super) fn open_expected(&mut self, va: u64) -> Result<(), DomainError> {
        if self.domain.roots.is_open(Root::Driver, va) {
            return Ok(());
        }
        let translation = self.domain.roots.translate(va, &self.domain.view)?;
        let page = va & !(PAGE_SIZE - 1);
        let Some(translation) =
            translation.filter(|at| at.write && self.domain.view.contains(Pfn::of(at.gpa)))
        else {
            return Ok(());
        };
        let each_store = self.domain.each_store && !self.supervisor.owns(page, PAGE_SIZE);
        if each_store || !self.supervisor.may_write(va) {
            return Ok(());
        }
        self.open(va)?;
        self.domain.note_open(va, translation.gpa);
        if !self.supervisor.lasts(va) {
            self.passing.push((Pfn::of(translation.gpa), page));
        }
        Ok(())
    }

    /// Sets P's registers to these, at the stub that goes on in the driver root.
    fn start(&mut self, regs: &kvm_regs) {
        // The stub loads CR3.
        self.outdated = None;
        let mut regs = *regs;
        regs.rip = self.domain.monitor.entry_stub();
        regs.rflags &= !TRAP_FLAG;
        self.domain.vm.set_regs(&regs);
    }

    /// Runs P to the end of the call. Page tables that were good when it began and are not any more
    /// are the call's doing.
    fn run_or_give_up(&mut self) -> Result<Step, DomainError> {
        match self.run() {
            Err(DomainError::Roots(RootError::Table(_))) => Ok(Step::Violation(
                ViolationKind::Shutdown,
                self.domain.vm.regs().rip,
            )),
            Err(DomainError::Roots(RootError::OutOfTables)) => {
                Ok(Step::GuestOnly(PassThroughReason::PageTables, None))
            }
            other => other,
        }
    }

    fn run(&mut self) -> Result<Step, DomainError> {
        loop {
            let exit = self.run_to_exit()?;
            let step = self.handle(exit)?;
            match step {
                Step::Continue => {}
                // A call may hang by parts that each end in the guest.
                Step::GuestOnly(..) if self.time.hangs(self.request.budget) => {
                    let rip = self.domain.vm.regs().rip;
                    return Ok(Step::Violation(ViolationKind::TimeBudget, rip));
                }
                _ => return Ok(step),
            }
            if self.domain.vm.ring_is_half_full() {
                self.harvest()?;
            }
            if !self.may_keep_copies() {
                let rip = self.domain.vm.regs().rip;
                return Ok(Step::Violation(ViolationKind::HostMemory, rip));
            }
            self.detours += 1;
            if self.detours > MAX_DETOURS || self.time.hangs(self.request.budget) {
                let rip = self.domain.vm.regs().rip;
                return Ok(Step::Violation(ViolationKind::TimeBudget, rip));
            }
            if self.time.is_slow() {
                return Ok(Step::GuestOnly(PassThroughReason::Slow, None));
            }
        }
    }

    /// Runs P to its next exit, and counts the time before it and in it.
    fn run_to_exit(&mut self) -> Result<Exit, DomainError> {
        let entered = Instant::now();
        self.time.host += self.meter.count(entered.duration_since(self.last_exit));
        self.domain.watchdog.enter(entered);
        let exit = self.domain.vm.run();
        self.domain.watchdog.leave();
        self.last_exit = Instant::now();
        let inside = self.last_exit.duration_since(entered);
        self.stats.private_ns += u64::try_from(inside.as_nanos()).unwrap_or(u64::MAX);
        self.time.own += self.meter.count(inside);
        let exit = exit?;
        // Those that the host brings about tell nothing of the call.
        let is_its_own = !matches!(exit, Exit::Interrupted | Exit::DirtyRingFull);
        self.time.exits = self.time.exits.saturating_add(is_its_own.into());
        Ok(exit)
    }
}
