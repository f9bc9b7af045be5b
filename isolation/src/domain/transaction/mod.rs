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
//! not spill pay nothing for it. So is one of which kernel functions were to wait for the end and
//! may not (`handing_over.rs`), with these called at once, and one that may have changed its callers'
//! frames (`stack_guard.rs`), with an exit at each crossing.

use std::collections::BTreeMap;
use std::time::Instant;

use kvm_bindings::kvm_regs;

use super::Domain;
use super::effects::KernelCall;
use super::error::DomainError;
use super::host_memory::Kept;
use super::journal::Journal;
use super::list_links::ChangedLinks;
use super::private_vm::Exit;
use super::recorder::Happened;
use super::roots::{Root, RootError};
use super::supervisor::Supervisor;
use super::view::Pfn;
use super::violation::ViolationKind;
use crate::guest::addr::GvaRange;
use crate::policy::diff::PageMask;

mod answers;
mod begin;
mod call;
mod callbacks;
mod carrying_out;
mod device;
mod exact;
mod exits;
mod failing;
mod faults;
mod finish;
mod handing_over;
mod journal;
mod kept_arguments;
mod memory;
mod preserved;
mod red_zones;
pub(super) mod room;
mod sleep;
mod spill;
mod spilled_call;
mod stack_guard;
mod time;

pub use call::{
    AbortPhases, CallEnd, CallRequest, CallResult, CallStats, DeviceStore, PassThroughReason,
};
pub(crate) use handing_over::Refusals;
pub use spilled_call::SpilledCall;
pub(super) use stack_guard::WrittenByKernel;
pub use time::CallTime;

use answers::Answers;
use callbacks::Callback;
use device::{Overwritten, PostedWrite};
use stack_guard::Watch;
use time::Meter;

/// RFLAGS.TF.
const TRAP_FLAG: u64 = 1 << 8;
/// Unusual exits after which a call is given up, those at journalled kernel functions left aside:
/// no honest call comes near.
const MAX_DETOURS: u32 = 1 << 16;

/// Length of `out imm8, al`.
pub(super) const OUT_BYTES: u64 = 2;

/// What a call led to.
enum Outcome {
    Ended(CallEnd, kvm_regs),
    /// It is to be run once more, with a journal; nothing of it is left.
    WithJournal,
    /// It is to be run once more, with no kernel function waiting for its end; nothing of it is
    /// left.
    AtOnce,
    /// It is to be run once more, watched; nothing of it is left.
    Watched,
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
    /// The driver has returned to the kernel function that had called it back, which went on with
    /// rights of its own.
    was_returned_to: bool,
    answers: Answers,
    /// The stack it was entered on, and those on which the kernel has called the driver back.
    stacks: Vec<GvaRange>,
    posted: Vec<PostedWrite>,
    /// Kernel functions that can wait do so until its end.
    hands_over: bool,
    /// Those that waited, once they have been looked at.
    handed_over: Vec<KernelCall>,
    /// Stores that wait for these.
    later: Vec<DeviceStore>,
    /// One of these may have the device use guest memory.
    posted_use_memory: bool,
    overwritten: BTreeMap<Pfn, Overwritten>,
    /// Pages that it was let write, and that the next call is not.
    passing: Vec<(Pfn, u64)>,
    /// Room for lists of pages, and of what has changed in them.
    pages: Vec<Pfn>,
    changes: Vec<(Pfn, PageMask)>,
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
    /// How often the roots had been built when dirty bits were cleared for this run; `None` if they
    /// were not.
    roots_at_begin: Option<u64>,
    stats: CallStats,
    /// Time that it has had, its earlier parts and attempts among it.
    time: CallTime,
    meter: Meter,
    last_exit: Instant,
    phases: AbortPhases,
    /// Where the last wait was called from, and how often running.
    last_sleep: (u64, u32),
    /// How many of the notes of what it asked for were looked at.
    asked: usize,
    /// Its crossings exit, and the callers' frames are looked at there.
    watch: Option<Watch>,
    /// It, or a kernel function, has changed these, and it is to be run once more to see which.
    is_suspected: bool,
    /// That is so, and nothing of it is left.
    is_to_be_watched: bool,
}

impl Call<'_> {
    fn carry_out(&mut self, spilled: Option<&SpilledCall>) -> Result<Outcome, DomainError> {
        self.begin_handing_over();
        let begun = match spilled {
            None => self.begin()?,
            Some(spilled) => self.begin_again(spilled)?,
        };
        self.note(|| Happened::Prepared);
        let step = match begun {
            None => self.run_or_give_up()?,
            Some(reason) => Step::GuestOnly(reason, None),
        };
        let ended = match step {
            Step::Returned => match self.returned()? {
                Some((kind, rip)) => self.abort(kind, rip),
                None if self.take_handed_over() => self.commit(),
                None => {
                    self.note(|| Happened::BeginsAgain);
                    self.take_back()?;
                    match self.device_lost {
                        true => self.abort(ViolationKind::DeviceLost, self.domain.vm.regs().rip),
                        false => return Ok(Outcome::AtOnce),
                    }
                }
            },
            Step::Violation(kind, rip) => self.abort(kind, rip),
            Step::GuestOnly(_, Some(_)) if self.wants_journal() => {
                self.note(|| Happened::BeginsAgain);
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
        if self.is_to_be_watched {
            return Ok(Outcome::Watched);
        }
        ended.map(|(end, regs)| Outcome::Ended(end, regs))
    }

    /// Notes what happens, where that was asked for.
    #[inline]
    fn note(&mut self, what: impl FnOnce() -> Happened) {
        self.domain.recorder.note(what);
    }

    /// The function has returned; what is wrong with the way it did.
    fn returned(&mut self) -> Result<Option<(ViolationKind, u64)>, DomainError> {
        self.note(|| Happened::Returned);
        self.check_return()
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
        self.note(|| Happened::Entered);
        let exit = self.domain.vm.run();
        self.domain.watchdog.leave();
        self.last_exit = Instant::now();
        let inside = self.last_exit.duration_since(entered);
        self.stats.private_ns += u64::try_from(inside.as_nanos()).unwrap_or(u64::MAX);
        self.time.own += self.meter.count(inside);
        let exit = exit?;
        self.note(|| Happened::Exit((&exit).into()));
        // Those that the host brings about tell nothing of the call.
        let is_its_own = !matches!(exit, Exit::Interrupted | Exit::DirtyRingFull);
        self.time.exits = self.time.exits.saturating_add(is_its_own.into());
        Ok(exit)
    }
}
