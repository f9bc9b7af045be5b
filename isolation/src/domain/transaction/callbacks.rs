//! Call-backs: the kernel calls the driver in the middle of a call, and the driver returns to it.

use kvm_bindings::kvm_regs;

use super::preserved::Preserved;
use super::{Call, Step};
use crate::domain::error::DomainError;
use crate::domain::monitor::ExceptionFrame;
use crate::domain::recorder::Happened;
use crate::domain::violation::ViolationKind;

/// Stacks that a call may be on: a thread's, and the interrupts' of each processor that it has gone
/// on on.
const MAX_STACKS: usize = 16;

/// A call of the kernel back into the driver.
#[derive(Debug, Clone, Copy)]
pub(super) struct Callback {
    pub(super) function: u64,
    pub(super) arguments: [u64; 6],
    pub(super) return_address: u64,
    pub(super) rsp: u64,
    /// What the driver has to leave as it is.
    pub(super) kept: Preserved,
}

impl Call<'_> {
    /// The kernel calls the driver: go on in the driver root, with a return address of ours.
    pub(super) fn call_back(
        &mut self,
        frame: &ExceptionFrame,
        target: u64,
        regs: &kvm_regs,
    ) -> Result<Step, DomainError> {
        if !self.supervisor.is_driver_function(target) {
            let kind = ViolationKind::IllegalControlTransfer { target };
            return Ok(Step::Violation(kind, frame.rip));
        }
        let Some(slot) = self.stack_slot(frame.rsp)? else {
            let kind = ViolationKind::UnbalancedStack { rsp: frame.rsp };
            return Ok(Step::Violation(kind, frame.rip));
        };
        let return_address = self.read_slot(slot)?;
        let stub = self.domain.monitor.callback_return_stub();
        self.write_slot(slot, stub)?;
        let arguments = [regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.r8, regs.r9];
        self.callbacks.push(Callback {
            function: target,
            arguments,
            return_address,
            rsp: frame.rsp.wrapping_add(8),
            kept: Preserved::of(&kvm_regs {
                rflags: frame.rflags,
                ..*regs
            }),
        });
        if self.stacks.len() < MAX_STACKS && !self.in_own_stack(frame.rsp) {
            self.stacks
                .extend(self.supervisor.interrupt_stack(frame.rsp));
        }
        self.stats.callbacks += 1;
        self.see_callers()?;
        self.note(|| Happened::CallsBack(target));
        self.supervisor.called_back(target, arguments);
        for va in self.supervisor.expected() {
            self.open_expected(va)?;
        }
        // The stub loads CR3.
        self.outdated = None;
        self.domain.monitor.resume_at(target);
        let entry = self.domain.monitor.entry_stub();
        self.resume_at(frame, regs, entry);
        Ok(Step::Continue)
    }

    pub(super) fn callback_return(&mut self, regs: &kvm_regs) -> Result<Step, DomainError> {
        let Some(callback) = self.callbacks.pop() else {
            let target = self.domain.monitor.callback_return_stub();
            let kind = ViolationKind::IllegalControlTransfer { target };
            return Ok(Step::Violation(kind, regs.rip));
        };
        if callback.rsp != regs.rsp {
            let kind = ViolationKind::UnbalancedStack { rsp: regs.rsp };
            return Ok(Step::Violation(kind, regs.rip));
        }
        if let Some(kind) = self.check_callers()? {
            return Ok(Step::Violation(kind, callback.function));
        }
        if let Some(kind) = callback.kept.changed(regs) {
            return Ok(Step::Violation(kind, callback.function));
        }
        self.note(|| Happened::CallBackReturned);
        self.was_returned_to = true;
        self.domain.monitor.resume_at(callback.return_address);
        let mut next = *regs;
        next.rip = self.domain.monitor.kernel_stub();
        self.domain.vm.set_regs(&next);
        Ok(Step::Continue)
    }
}
