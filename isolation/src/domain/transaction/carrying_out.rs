//! Carrying a call out: from the domain at rest to the domain at rest again.
//!
//! It is attempted once, and once more if it turns out that kernel functions cannot wait for its
//! end, and once more with a journal if it has to go on in the guest, and once more if it has to be
//! seen who changed its callers' frames.

use std::collections::BTreeMap;
use std::time::Instant;

use super::call::{AbortPhases, CallRequest, CallResult, CallStats};
use super::room::Room;
use super::spilled_call::SpilledCall;
use super::stack_guard::Watch;
use super::time::{CallTime, Meter};
use super::{Call, Outcome};
use crate::domain::Domain;
use crate::domain::error::DomainError;
use crate::domain::host_memory::Kept;
use crate::domain::journal::Journal;
use crate::domain::supervisor::Supervisor;
use crate::domain::view::Pfn;

/// Most attempts of a call: the first, and one more for each reason to begin again.
const MAX_ATTEMPTS: usize = 4;

/// What an attempt led to.
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all end, and a warm call takes no memory"
)]
enum Attempted {
    Ended(CallResult),
    /// It is to be made once more, with a journal.
    WithJournal,
    /// It is to be made once more, with no function waiting.
    AtOnce,
    /// It is to be made once more, with an exit at each crossing.
    Watched,
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
        if !self.vm.turn_to(request.vcpu) {
            return Err(DomainError::Internal("a vCPU that was not there before"));
        }
        let mut journal = spilled.as_mut().and_then(|spilled| spilled.journal.take());
        let before = spilled.as_deref();
        let mut time = before.map_or_else(CallTime::default, |spilled| spilled.time);
        let mut hands_over = before.is_none() && request.effects.is_some();
        let mut watched = false;
        let mut result;
        let mut attempts = 0;
        loop {
            let what = (request, hands_over, watched);
            result = self.attempt(what, supervisor, before, &mut journal, &mut time);
            match result {
                Ok(Attempted::WithJournal) => {
                    journal = Some(Box::default());
                    hands_over = false;
                }
                Ok(Attempted::AtOnce) => hands_over = false,
                Ok(Attempted::Watched) => watched = true,
                Ok(Attempted::Ended(_)) | Err(_) => break,
            }
            attempts += 1;
            if attempts >= MAX_ATTEMPTS {
                break;
            }
            supervisor.begin_again();
        }
        if let Some(spilled) = spilled {
            spilled.journal = journal;
        }
        match result? {
            Attempted::Ended(result) => Ok(result),
            _ => Err(DomainError::Internal("a call was begun again too often")),
        }
    }

    /// On an error `journal` is as it was.
    fn attempt(
        &mut self,
        (request, hands_over, watched): (&CallRequest<'_>, bool, bool),
        supervisor: &mut dyn Supervisor,
        spilled: Option<&SpilledCall>,
        journal: &mut Option<Box<Journal>>,
        time: &mut CallTime,
    ) -> Result<Attempted, DomainError> {
        let (runs, crossings) = (self.vm.runs(), self.monitor.crossings());
        let journalled = journal.is_some();
        if let (true, Some(effects)) = (journalled, request.effects) {
            self.monitor.journal(|function| effects.matters(function));
        }
        let mut call = Call::new(self, supervisor, request, spilled, *time);
        call.journal = journal.take();
        call.hands_over = hands_over && !journalled;
        call.watch = (watched && !journalled).then(Watch::default);
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
        let handed_over = std::mem::take(&mut call.handed_over);
        let later = std::mem::take(&mut call.later);
        *time = call.time;
        let mut passing = std::mem::take(&mut call.passing);
        passing.append(&mut call.stepping);
        let mut room = call.give_room_back();
        self.close(&passing);
        room.passing = passing;
        self.room = room.emptied();
        self.has_failed |= has_failed;
        if journalled || watched {
            self.monitor.journal(|_| false);
        }
        stats.runs = self.vm.runs() - runs;
        stats.crossings = self.monitor.crossings() - crossings;
        Ok(match outcome? {
            Outcome::WithJournal => Attempted::WithJournal,
            Outcome::AtOnce => Attempted::AtOnce,
            Outcome::Watched => Attempted::Watched,
            Outcome::Ended(end, regs) => Attempted::Ended(CallResult {
                end,
                regs,
                stats,
                time: *time,
                phases,
                kernel_calls,
                handed_over,
                later,
                kept,
                lists,
            }),
        })
    }
}

impl<'a> Call<'a> {
    /// A call, or one more part of a spilled one, of which nothing has been done yet.
    fn new(
        domain: &'a mut Domain,
        supervisor: &'a mut dyn Supervisor,
        request: &'a CallRequest<'a>,
        spilled: Option<&SpilledCall>,
        time: CallTime,
    ) -> Self {
        let Room {
            mut stacks,
            host_written,
            posted,
            passing,
            harvested,
            pages,
            changes,
        } = std::mem::take(&mut domain.room);
        stacks.push(request.stack);
        Self {
            kept: domain.host_memory.nothing(),
            domain,
            supervisor,
            request,
            entry: spilled.map_or(request.regs, |spilled| spilled.entry),
            spills: spilled.map_or(0, |spilled| spilled.spills),
            return_address: 0,
            return_slot: (Pfn(0), 0),
            host_written,
            callbacks: Vec::new(),
            was_returned_to: false,
            answers: super::answers::Answers::default(),
            stacks,
            posted,
            hands_over: false,
            handed_over: Vec::new(),
            later: Vec::new(),
            posted_use_memory: false,
            overwritten: BTreeMap::new(),
            passing,
            pages,
            changes,
            stepping: Vec::new(),
            journal: None,
            kernel_calls: Vec::new(),
            calls_kept: Kept::default(),
            lists: Vec::new(),
            harvested,
            copies_charged: 0,
            reached_device: false,
            device_lost: false,
            detours: 0,
            last_fault: (0, 0, 0),
            interrupted_at: (0, 0),
            outdated: None,
            roots_at_begin: None,
            stats: CallStats::default(),
            time,
            meter: Meter::default(),
            last_exit: Instant::now(),
            phases: AbortPhases::default(),
            last_sleep: (0, 0),
            asked: 0,
            watch: None,
            is_suspected: false,
            is_to_be_watched: false,
        }
    }

    /// What the next call can use of the memory that this one took.
    fn give_room_back(&mut self) -> Room {
        Room {
            stacks: std::mem::take(&mut self.stacks),
            host_written: std::mem::take(&mut self.host_written),
            posted: std::mem::take(&mut self.posted),
            passing: Vec::new(),
            harvested: std::mem::take(&mut self.harvested),
            pages: std::mem::take(&mut self.pages),
            changes: std::mem::take(&mut self.changes),
        }
    }
}
