//! Carrying a call out: from the domain at rest to the domain at rest again.
//!
//! It is attempted once, and once more with a journal if it turns out that it has to go on in
//! the guest.

use std::collections::BTreeMap;
use std::time::Instant;

use super::call::{AbortPhases, CallRequest, CallResult, CallStats};
use super::room::Room;
use super::spilled_call::SpilledCall;
use super::time::{CallTime, Meter};
use super::{Call, Outcome};
use crate::domain::Domain;
use crate::domain::error::DomainError;
use crate::domain::host_memory::Kept;
use crate::domain::journal::Journal;
use crate::domain::supervisor::Supervisor;
use crate::domain::view::Pfn;

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
        let mut call = Call::new(self, supervisor, request, spilled, *time);
        call.journal = journal.take();
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
        let mut room = call.give_room_back();
        self.close(&passing);
        room.passing = passing;
        self.room = room.emptied();
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
            stacks,
            posted,
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
