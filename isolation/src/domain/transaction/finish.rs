//! The end of a call: checks, commit, abort, and taking everything back.

use std::time::Instant;

use kvm_bindings::kvm_regs;

use super::Call;
use super::call::{CallEnd, PassThroughReason};
use super::preserved::Preserved;
use crate::domain::error::DomainError;
use crate::domain::recorder::Happened;
use crate::domain::roots::Root;
use crate::domain::view::Pfn;
use crate::domain::violation::{Violation, ViolationKind};
use crate::policy::diff::PageMask;

/// RFLAGS.IF.
const INTERRUPT_FLAG: u64 = 1 << 9;

/// How far above the stack pointer of a function that only copies the return address of its caller
/// is looked for, in words of 8 bytes.
const MAX_WORDS_ABOVE_CALLER: u64 = 8;

impl Call<'_> {
    /// What is wrong with the way the function returned.
    pub(super) fn check_return(&mut self) -> Result<Option<(ViolationKind, u64)>, DomainError> {
        let callers = self.check_callers()?;
        let (entry, now) = (&self.entry, self.domain.vm.regs());
        let kind = if callers.is_some() {
            callers
        } else if now.rsp != entry.rsp.wrapping_add(8) || !self.callbacks.is_empty() {
            Some(ViolationKind::UnbalancedStack { rsp: now.rsp })
        } else if (now.rflags ^ entry.rflags) & INTERRUPT_FLAG != 0 {
            Some(ViolationKind::InterruptFlag)
        } else {
            Preserved::of(entry).changed(&now)
        };
        Ok(kind.map(|kind| (kind, self.request.function)))
    }

    pub(super) fn commit(&mut self) -> Result<(CallEnd, kvm_regs), DomainError> {
        self.note(|| Happened::Commits);
        let mut regs = self.domain.vm.regs();
        regs.rip = self.return_address;
        self.write_slot(self.return_slot, self.return_address)?;
        match self.publish()? {
            Some(kind) => self.abort(kind, self.request.function),
            None => {
                self.settle_journal(false);
                if let Some(journal) = &mut self.journal {
                    self.kernel_calls = journal.take_deferred();
                    self.calls_kept = journal.take_kept();
                }
                Ok((CallEnd::Committed, regs))
            }
        }
    }

    /// Puts what P wrote into the guest and does what waited; `Some` if the call may not change all
    /// of it, and nothing was done.
    pub(super) fn publish(&mut self) -> Result<Option<ViolationKind>, DomainError> {
        let mut pages = self.written_pages()?;
        self.stats.dirty_pages = pages.len() as u32;
        let changes = self.changes(&pages)?;
        let forbidden = self.forbidden_change(&changes);
        if forbidden.is_some() {
            return Ok(forbidden);
        }
        self.note(|| Happened::Writes(changes.len() as u32));
        for (pfn, mask) in &changes {
            let Some(va) = self.domain.opened_va(*pfn) else {
                continue;
            };
            for run in mask.runs() {
                let (at, bytes) = (va + run.start as u64, run.len() as u64);
                self.supervisor.committing(at, bytes);
            }
        }
        if self.domain.view.written().is_some() {
            self.note_written(&changes);
        }
        if let Some(journal) = &mut self.journal {
            for pfn in &pages {
                let view = &self.domain.view;
                let (old, new) = (view.before(*pfn)?, view.private_page(*pfn)?);
                journal.record(*pfn, old, new);
            }
        }
        // What the device had to see before is there already.
        let earlier = self.overwritten.values();
        let earlier = earlier.map(|overwritten| overwritten.bytes.count() as u64);
        self.stats.committed_bytes += earlier.sum::<u64>();
        for (pfn, mask) in &changes {
            self.domain.view.publish(*pfn, mask)?;
            self.stats.committed_bytes += mask.count() as u64;
        }
        let changed = |pfn: Pfn| {
            changes
                .binary_search_by_key(&pfn, |change| change.0)
                .is_ok()
        };
        let domain = &mut *self.domain;
        let host_written = &self.host_written;
        let mut dropped = domain
            .warm
            .age(|pfn| changed(pfn) || host_written.contains(&pfn));
        pages.retain(|pfn| !dropped.contains(pfn));
        dropped.extend(domain.warm.admit(&pages));
        dropped.sort_unstable();
        // The call is in the guest by now, and nothing may fail any more: what is not dropped now
        // is before the next.
        match domain.drop_copies(&dropped) {
            Ok(calls) => self.stats.other_syscalls += calls,
            Err(_) => domain.stale.extend(dropped),
        }
        (self.pages, self.changes) = (pages, changes);
        self.supervisor.commit_platform();
        if !self.reached_device && !self.posted.is_empty() {
            self.journal_device();
        }
        self.flush_posted();
        Ok(None)
    }

    /// Remembers which bytes of `changes` are not the driver's to write: kernel functions may have
    /// written them, or nobody should have.
    fn note_written(&mut self, changes: &[(Pfn, PageMask)]) {
        for (pfn, mask) in changes {
            let opened = self.domain.opened_va(*pfn);
            for run in mask.runs() {
                let own = opened.is_some_and(|va| {
                    let (at, bytes) = (va + run.start as u64, run.len() as u64);
                    self.in_own_stack(at) || self.supervisor.may_change(at, bytes)
                });
                if !own {
                    self.domain.view.note_written(*pfn, run);
                }
            }
        }
    }

    /// What P's copies of `pages` have differently from the guest's, page by page.
    pub(super) fn changes(&mut self, pages: &[Pfn]) -> Result<Vec<(Pfn, PageMask)>, DomainError> {
        let view = &self.domain.view;
        let mut changes = std::mem::take(&mut self.changes);
        changes.clear();
        for pfn in pages {
            let mask = view.changes(*pfn)?;
            if !mask.is_empty() {
                changes.push((*pfn, mask));
            }
        }
        Ok(changes)
    }

    /// The first change among `changes` (sorted by page) that the call may not make.
    pub(super) fn forbidden_change(
        &mut self,
        changes: &[(Pfn, PageMask)],
    ) -> Option<ViolationKind> {
        if let Some(kind) = self.overrun().or_else(|| self.changed_callers(changes)) {
            return Some(kind);
        }
        // Kernel functions write through their own mapping of the same page, so bytes can only be
        // laid at the driver's door where it called none.
        if self.stats_crossed() {
            return None;
        }
        let runs = changes
            .iter()
            .flat_map(|(pfn, mask)| mask.runs().map(move |run| (*pfn, run)));
        for (pfn, run) in runs {
            let (offset, bytes) = (run.start as u64, run.len() as u64);
            if pfn != self.return_slot.0
                && let Some(va) = self.domain.opened_va(pfn)
            {
                let address = va + offset;
                if !self.in_own_stack(address) && !self.supervisor.may_change(address, bytes) {
                    return Some(ViolationKind::StrayBytes { address, bytes });
                }
            }
        }
        None
    }

    pub(super) fn stats_crossed(&self) -> bool {
        self.domain.monitor.kernel_calls() != self.domain.crossings_at_entry
            || self.stats.callbacks > 0
            || self.was_returned_to
    }

    /// Takes the call back, as one that failed, unless that is only suspected: then it is run once
    /// more, and how it ended here does not count.
    pub(super) fn abort(
        &mut self,
        mut kind: ViolationKind,
        rip: u64,
    ) -> Result<(CallEnd, kvm_regs), DomainError> {
        if std::mem::take(&mut self.is_suspected) {
            self.take_back()?;
            self.is_to_be_watched = !self.device_lost;
            if self.is_to_be_watched {
                let end = CallEnd::PassThrough(PassThroughReason::Stack);
                return Ok((end, self.request.regs));
            }
            kind = ViolationKind::DeviceLost;
        }
        self.phases.detect_ns = elapsed_ns(self.last_exit);
        self.note(|| Happened::TakesBack);
        let regs = self.domain.vm.regs();
        let fault = self.domain.vm.fault_registers()?;
        let (cr2, root) = (fault.cr2, self.domain.root_of(fault.cr3));
        let rsp = match self.interrupted_at {
            (at, rsp) if at == rip => rsp,
            _ => regs.rsp,
        };
        let crossings = self.domain.monitor.crossing_frames();
        let mut crossings: Vec<u64> = crossings.iter().map(|frame| frame.return_address).collect();
        if root == Root::Driver && self.domain.is_common(rip) {
            crossings.extend(self.caller(rsp)?);
        }
        let mut violation = Violation {
            kind,
            root,
            rip,
            rsp,
            crossings,
            reached_device: self.reached_device || self.device_lost,
            spills: self.spills,
            published: None,
        };
        // Tables that the call has damaged cannot be followed for it, and are no reason not to take
        // it back.
        if let Err(error) = self.tell_failing(&violation, cr2) {
            tracing::warn!("a call cannot be looked at, at its fault: {error}");
        }
        self.take_back()?;
        if self.spills > 0 {
            violation.published = Some(self.take_back_published()?);
        }
        let mut regs = self.entry;
        regs.rip = self.return_address;
        regs.rsp = regs.rsp.wrapping_add(8);
        Ok((CallEnd::Aborted(Box::new(violation)), regs))
    }

    /// The innermost return address into the driver on the stack at `rsp`, of a function that keeps
    /// little there.
    fn caller(&self, rsp: u64) -> Result<Option<u64>, DomainError> {
        for word in 0..MAX_WORDS_ABOVE_CALLER {
            let Some(value) = self.read_guest(rsp.wrapping_add(word * 8))? else {
                break;
            };
            if self.domain.is_driver_text(value) {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// Leaves nothing of the call behind.
    pub(super) fn take_back(&mut self) -> Result<(), DomainError> {
        let start = Instant::now();
        self.domain.vm.settle()?;
        // It may have executed anything: control registers are set anew for the next call.
        self.domain.vm.forget_adopted();
        self.posted.clear();
        self.later.clear();
        self.handed_over.clear();
        let pages = self.private_pages()?;
        self.stats.dirty_pages = pages.len() as u32;
        let domain = &mut *self.domain;
        let dropped: Vec<Pfn> = pages
            .into_iter()
            .filter(|pfn| !domain.warm.contains(*pfn))
            .collect();
        self.stats.other_syscalls += 3;
        domain.stale.extend(dropped);
        if self.reached_device {
            self.supervisor.stand_still();
        }
        self.put_memory_back();
        self.phases.memory_ns = elapsed_ns(start);
        if self.reached_device {
            let start = Instant::now();
            self.put_device_back();
            self.phases.device_ns = elapsed_ns(start);
        }
        if let Some(journal) = &mut self.journal {
            journal.discard();
        }
        Ok(())
    }

    /// Something of the domain's own failed in the middle of the call: leaves nothing of the call
    /// in the guest and its device, without asking anything more of the private VM.
    pub(super) fn leave_nothing(&mut self) {
        self.posted.clear();
        self.later.clear();
        self.handed_over.clear();
        if self.reached_device {
            self.supervisor.stand_still();
        }
        self.put_memory_back();
        self.put_device_back();
        self.supervisor.forget_platform();
        if let Some(journal) = &mut self.journal {
            journal.discard();
        }
    }

    /// Puts the bytes back that the device had to see before the call's end.
    fn put_memory_back(&mut self) {
        for (pfn, overwritten) in std::mem::take(&mut self.overwritten) {
            // It was there when something was published in it, and memory does not go away.
            let Ok(page) = self.domain.view.shared_page_mut(pfn) else {
                continue;
            };
            for run in overwritten.bytes.runs() {
                page[run.clone()].copy_from_slice(&overwritten.old[run]);
            }
        }
    }

    /// Puts the device back, if the call has reached it; memory is as before already, which the
    /// device looks at.
    fn put_device_back(&mut self) {
        if std::mem::take(&mut self.reached_device) {
            self.device_lost |= !self.supervisor.restore_device();
        }
    }
}

pub(super) fn elapsed_ns(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
