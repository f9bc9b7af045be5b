//! The journal of a call as it runs: what is noted at each crossing and at each publication, and
//! how the parts that are in the guest are taken back.

use std::time::Instant;

use kvm_bindings::kvm_regs;

use super::finish::elapsed_ns;
use super::{Call, Step};
use crate::domain::effects::KernelCall;
use crate::domain::effects::KernelEffects;
use crate::domain::error::DomainError;
use crate::domain::journal::Journal;
use crate::domain::journal::{Crossing, Published, ReadNumber, Stays};
use crate::domain::list_links;
use crate::domain::monitor::JournalPoint;
use crate::domain::recorder::Happened;
use crate::domain::roots::Roots;
use crate::domain::view::{PAGE_SIZE, Pfn};
use crate::domain::view::{PrivateView, ViewError};
use crate::domain::violation::ViolationKind;
use crate::guest::addr::{Gva, GvaRange};

/// The call's memory.
struct CallNumbers<'a> {
    roots: &'a Roots,
    view: &'a PrivateView,
}

impl ReadNumber for CallNumbers<'_> {
    fn number(&self, va: u64, bytes: u8) -> Option<u64> {
        let mut number = [0; 8];
        for (at, byte) in (va..).zip(number.iter_mut().take(bytes.into())) {
            let gpa = self.roots.translate(at, self.view).ok()??.gpa;
            let page = self.view.private_page(Pfn::of(gpa)).ok()?;
            *byte = page[(gpa % PAGE_SIZE) as usize];
        }
        Some(u64::from_le_bytes(number))
    }
}

impl Call<'_> {
    /// Whether the call, which must go on in the guest, is to be run once more with a journal
    /// before it does.
    pub(super) fn wants_journal(&self) -> bool {
        self.journal.is_none()
            && self.spills == 0
            && self.request.effects.is_some()
            && self.request.return_gate.is_some()
    }

    /// Takes note of what belongs to the driver before the call does anything.
    pub(super) fn begin_journal(&mut self) -> Result<(), DomainError> {
        if self.journal.is_none() {
            return Ok(());
        }
        let mut restorable = self.supervisor.restorable();
        // Frames below the caller's are dead when the call has ended, and others' by then.
        let callers = self.entry.rsp.wrapping_add(8);
        let mut va = self.request.stack.first().0;
        while va < callers {
            let bytes = (callers - va).min(PAGE_SIZE);
            if let Some(at) = self.domain.roots.translate(va, &self.domain.view)? {
                restorable.exclude(at.gpa, bytes);
            }
            va = va.wrapping_add(PAGE_SIZE);
        }
        self.journal = Some(Box::new(Journal::new(
            restorable,
            self.domain.host_memory.nothing(),
        )));
        Ok(())
    }

    /// P is at an end of the trampoline of a function that matters.
    pub(super) fn journal_point(&mut self, regs: &kvm_regs) -> Result<Step, DomainError> {
        let Some((function, point)) = self.domain.monitor.journal_point(regs.rip) else {
            return Ok(Step::Violation(ViolationKind::Shutdown, regs.rip));
        };
        let (JournalPoint::Enter { journalled, .. } | JournalPoint::Leave { journalled }) = point;
        if journalled {
            // Two for each call that is kept, of which there is a limit of its own.
            self.detours = self.detours.saturating_sub(1);
        }
        let Some(return_address) = self.read_guest(regs.rsp)? else {
            let kind = ViolationKind::IllegalControlTransfer { target: function };
            return Ok(Step::Violation(kind, regs.rip));
        };
        let rsp = regs.rsp.wrapping_add(8);
        let returned = kvm_regs {
            rip: return_address,
            rsp,
            ..*regs
        };
        let next = match point {
            JournalPoint::Leave { .. } => {
                self.see_callers()?;
                self.note(|| Happened::CallReturned);
                if journalled {
                    self.journal_leave(rsp, regs.rax);
                }
                self.answer_leave(rsp, regs.rax);
                returned
            }
            JournalPoint::Enter { resume, .. } => {
                self.note(|| Happened::Calls(function));
                let arguments = [regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.r8, regs.r9];
                let call = KernelCall {
                    function,
                    arguments,
                };
                if let Some(kind) = self.check_callers()? {
                    return Ok(Step::Violation(kind, self.called_from(return_address)));
                }
                if let Some(kind) = self.keeps_what_it_must_not(&call)? {
                    return Ok(Step::Violation(kind, self.called_from(return_address)));
                }
                let crossing = match journalled {
                    true => self.journal_enter(call, rsp),
                    false => Crossing::Call,
                };
                match crossing {
                    Crossing::Later => kvm_regs { rax: 0, ..returned },
                    Crossing::Call => {
                        self.answer_enter(call, rsp);
                        self.domain.monitor.keep_r11(regs.r11);
                        kvm_regs {
                            rip: resume,
                            ..*regs
                        }
                    }
                }
            }
        };
        self.domain.vm.set_regs(&next);
        if self.has_overflowed() {
            self.domain.monitor.journal(|_| false);
        }
        Ok(Step::Continue)
    }

    /// Whether the journal need not see any more of what the call does.
    pub(super) fn has_overflowed(&self) -> bool {
        let journal = self.journal.as_ref();
        journal.is_some_and(|journal| journal.has_overflowed())
    }

    fn journal_enter(&mut self, call: KernelCall, rsp: u64) -> Crossing {
        let (numbers, journal, effects) = self.journal_parts();
        match (journal, effects) {
            (Some(journal), Some(effects)) => journal.enter(call, rsp, effects, &numbers),
            _ => Crossing::Call,
        }
    }

    /// A kernel function has returned, in P or in the guest.
    pub(super) fn journal_leave(&mut self, rsp: u64, result: u64) {
        let (numbers, journal, effects) = self.journal_parts();
        if let (Some(journal), Some(effects)) = (journal, effects) {
            journal.leave(rsp, result, effects, &numbers);
        }
    }

    fn journal_parts(
        &mut self,
    ) -> (
        CallNumbers<'_>,
        Option<&mut Journal>,
        Option<&KernelEffects>,
    ) {
        let numbers = CallNumbers {
            roots: &self.domain.roots,
            view: &self.domain.view,
        };
        (numbers, self.journal.as_deref_mut(), self.request.effects)
    }

    /// The device is about to be used for the first time in this part.
    pub(super) fn journal_device(&mut self) {
        if let Some(journal) = &mut self.journal {
            journal.reach_device(self.supervisor.device_state());
        }
    }

    /// This part is in the guest. `nested` if more kernel functions are under way than the
    /// innermost one.
    pub(super) fn settle_journal(&mut self, nested: bool) {
        if let Some(journal) = &mut self.journal {
            let used = journal.reached_device();
            let device = used.then(|| self.supervisor.device_state()).flatten();
            journal.settle(device, nested);
            if used
                && let Some((before, after)) = journal.device().last()
                && self.supervisor.requests_changed(before, after)
            {
                journal.requests_changed();
            }
        }
    }

    /// Takes back what is in the guest of a call whose last part is taken back already: device and
    /// memory at once, kernel functions by having the guest call their opposites.
    pub(super) fn take_back_published(&mut self) -> Result<Published, DomainError> {
        let Some(journal) = &mut self.journal else {
            return Ok(Published::Stays(Stays::NoModel));
        };
        let mut stays = journal.why_it_stays();
        if stays.is_none() {
            let start = Instant::now();
            let undone = self.supervisor.undo_device(journal.device());
            stays = undone.err().map(|reason| Stays::Device { reason });
            self.phases.device_ns += elapsed_ns(start);
        }
        if let Some(stays) = stays {
            // As if it had ended here: what it holds it lets go, and what it let go of is not used
            // any more.
            let first = self.request.stack.first();
            let below_caller = GvaRange::inclusive(first, Gva(self.entry.rsp));
            self.kernel_calls = below_caller.map_or_else(Vec::new, |own| journal.ends(own));
            self.kernel_calls.extend(journal.take_deferred());
            self.calls_kept = journal.take_kept();
            return Ok(Published::Stays(stays));
        }
        let start = Instant::now();
        let view = &mut self.domain.view;
        let bytes = journal.memory.undo(|pfn, with| {
            with(view.shared_page_mut(pfn)?);
            Ok::<(), ViewError>(())
        })?;
        self.phases.memory_ns += elapsed_ns(start);
        self.kernel_calls = journal.compensation();
        self.lists = list_links::in_all(journal.memory.links());
        self.calls_kept = journal.take_kept();
        Ok(Published::Undone {
            bytes,
            kernel_calls: u32::try_from(self.kernel_calls.len()).unwrap_or(u32::MAX),
        })
    }
}
