//! Exceptions in the domain: what the roots can be changed for, crossings, violations.

use kvm_bindings::kvm_regs;

use super::call::PassThroughReason;
use super::{Call, Step};
use crate::domain::error::DomainError;
use crate::domain::monitor::ExceptionFrame;
use crate::domain::recorder::Happened;
use crate::domain::roots::Root;
use crate::domain::supervisor::KernelExceptionVerdict;
use crate::domain::view::{PAGE_SIZE, Pfn};
use crate::domain::violation::ViolationKind;

const VECTOR_DEVICE_NOT_AVAILABLE: u8 = 7;
const VECTOR_DEBUG: u8 = 1;
const VECTOR_NMI: u8 = 2;
const VECTOR_MACHINE_CHECK: u8 = 18;
const VECTOR_BREAKPOINT: u8 = 3;
const VECTOR_PAGE_FAULT: u8 = 14;
const PF_PRESENT: u64 = 1 << 0;
const PF_WRITE: u64 = 1 << 1;
const PF_FETCH: u64 = 1 << 4;

impl Call<'_> {
    pub(super) fn exception(&mut self, regs: &kvm_regs) -> Result<Step, DomainError> {
        let Some(frame) = self.domain.monitor.exception_frame(regs.rip, regs.rsp) else {
            return Ok(Step::Violation(ViolationKind::Shutdown, regs.rip));
        };
        self.stats.other_syscalls += u32::from(!self.domain.vm.tells_system());
        self.interrupted_at = (frame.rip, frame.rsp);
        let fault = self.domain.vm.fault_registers()?;
        let (cr2, root) = (fault.cr2, self.domain.root_of(fault.cr3));
        if root == Root::Driver && !self.domain.vm.is_as_adopted(&fault) {
            return Ok(Step::Violation(
                ViolationKind::PrivilegedInstruction,
                frame.rip,
            ));
        }
        match frame.vector {
            // The driver's own use of the FPU is between two kernel functions that make it the
            // guest's: it has gone wrong.
            VECTOR_DEVICE_NOT_AVAILABLE if root == Root::Kernel => {
                let at = self.interrupted(&frame, regs, root);
                Ok(Step::GuestOnly(PassThroughReason::Fpu, at))
            }
            VECTOR_DEBUG if root == Root::Driver && !self.stepping.is_empty() => {
                Ok(self.stepped(&frame, regs))
            }
            VECTOR_NMI | VECTOR_MACHINE_CHECK if root == Root::Kernel => {
                Ok(Step::GuestOnly(PassThroughReason::KernelException, None))
            }
            VECTOR_PAGE_FAULT if frame.error_code & PF_FETCH != 0 => {
                self.fetch_fault(&frame, cr2, root, regs)
            }
            VECTOR_PAGE_FAULT => self.data_fault(&frame, cr2, root, regs),
            _ => Ok(self.real_exception(&frame, 0, root, regs)),
        }
    }

    /// Registers with which the guest meets the same exception itself.
    fn interrupted(
        &self,
        frame: &ExceptionFrame,
        regs: &kvm_regs,
        root: Root,
    ) -> Option<Box<kvm_regs>> {
        // A breakpoint is told behind its instruction (Intel SDM volume 3, section 6.5).
        let back = u64::from(frame.vector == VECTOR_BREAKPOINT);
        (root == Root::Kernel).then(|| {
            Box::new(kvm_regs {
                rip: frame.rip.wrapping_sub(back),
                rsp: frame.rsp,
                rflags: frame.rflags,
                ..*regs
            })
        })
    }

    /// An exception that no change of the roots makes go away.
    pub(super) fn real_exception(
        &self,
        frame: &ExceptionFrame,
        address: u64,
        root: Root,
        regs: &kvm_regs,
    ) -> Step {
        let (vector, error_code) = (frame.vector, frame.error_code);
        if root == Root::Driver {
            let kind = ViolationKind::Exception {
                vector,
                error_code,
                address,
            };
            return Step::Violation(kind, frame.rip);
        }
        match self.supervisor.kernel_exception(frame, address) {
            KernelExceptionVerdict::Expected => {
                let at = self.interrupted(frame, regs, root);
                Step::GuestOnly(PassThroughReason::KernelException, at)
            }
            KernelExceptionVerdict::DriversFault => {
                let kind = ViolationKind::KernelException {
                    vector,
                    error_code,
                    address,
                };
                Step::Violation(kind, frame.rip)
            }
        }
    }

    pub(super) fn data_fault(
        &mut self,
        frame: &ExceptionFrame,
        address: u64,
        root: Root,
        regs: &kvm_regs,
    ) -> Result<Step, DomainError> {
        let write = frame.error_code & PF_WRITE != 0;
        let here = (frame.rip, address, frame.error_code as u32);
        let repeated = std::mem::replace(&mut self.last_fault, here) == here;
        let translation = self.domain.roots.translate(address, &self.domain.view)?;
        let Some(translation) = translation.filter(|_| !self.domain.monitor.contains_va(address))
        else {
            return Ok(self.real_exception(frame, address, root, regs));
        };
        // A present page, read: protection (SMAP) that filling does not change.
        if (repeated && frame.error_code & PF_PRESENT != 0) || (write && !translation.write) {
            if root == Root::Driver && write {
                return Ok(Step::Violation(
                    ViolationKind::StrayWrite { address },
                    frame.rip,
                ));
            }
            return Ok(self.real_exception(frame, address, root, regs));
        }
        let is_closed = self.domain.moves(address) && !self.domain.roots.is_open(root, address);
        if write && root == Root::Kernel && is_closed {
            self.open_in(root, address)?;
        }
        if write && root == Root::Driver && !self.domain.roots.is_open(root, address) {
            // Device registers are judged when the access arrives as an exit of its own.
            let is_memory = self.domain.view.contains(Pfn::of(translation.gpa));
            let is_others = is_memory && !self.in_own_stack(address);
            self.tell_asked();
            if is_others && !self.may_write(frame, address, regs)? {
                return Ok(Step::Violation(
                    ViolationKind::StrayWrite { address },
                    frame.rip,
                ));
            }
            let page = address & !(PAGE_SIZE - 1);
            if is_others && self.domain.each_store && !self.supervisor.owns(page, PAGE_SIZE) {
                return self.one_store(frame, address, regs);
            }
            tracing::trace!(
                "{:#x} writes at {address:#x}, which opens its page",
                frame.rip
            );
            self.open(address)?;
            self.note(|| Happened::Opened(address));
            self.domain.note_open(address, translation.gpa);
            if is_others && !self.supervisor.lasts(address) {
                self.supervisor.stored(address);
                self.passing.push((Pfn::of(translation.gpa), page));
            }
        }
        self.note(|| Happened::Filled(address));
        self.fill(root, address)?;
        self.resume(frame, regs);
        Ok(Step::Continue)
    }

    /// Whether a call that was stopped with `regs` may write at `address`.
    fn may_write(
        &mut self,
        frame: &ExceptionFrame,
        address: u64,
        regs: &kvm_regs,
    ) -> Result<bool, DomainError> {
        // Where a function that copies stores has mostly been handed out just before.
        let kept = [regs.rbx, regs.rbp, regs.r12, regs.r13, regs.r14, regs.r15];
        if self.supervisor.may_write_in(address, &kept) || self.supervisor.may_write(address) {
            return Ok(true);
        }
        let interrupted = kvm_regs {
            rsp: frame.rsp,
            ..*regs
        };
        let mut held = self.values_held(&interrupted)?;
        held.extend([regs.rax, regs.rcx, regs.rdx, regs.rsi, regs.rdi]);
        held.extend([regs.r8, regs.r9, regs.r10, regs.r11]);
        self.supervisor.holds(&held);
        Ok(self.supervisor.may_write(address))
    }

    pub(super) fn fetch_fault(
        &mut self,
        frame: &ExceptionFrame,
        target: u64,
        root: Root,
        regs: &kvm_regs,
    ) -> Result<Step, DomainError> {
        let wild = Step::Violation(ViolationKind::IllegalControlTransfer { target }, frame.rip);
        let Some(translation) = self.domain.roots.translate(target, &self.domain.view)? else {
            return Ok(match root {
                Root::Driver => wild,
                Root::Kernel => self.real_exception(frame, target, root, regs),
            });
        };
        let in_driver = self.domain.is_driver_text(target);
        match root {
            Root::Driver if in_driver || self.domain.is_common(target) => {
                self.note(|| Happened::Filled(target));
                self.fill(root, target)?;
                self.resume(frame, regs);
                Ok(Step::Continue)
            }
            Root::Driver => {
                let Some(return_address) = self.read_guest(frame.rsp)? else {
                    return Ok(wild);
                };
                // A function that runs with the driver's rights may find that it has to call
                // another, which needs the kernel's.
                let by_common = self.domain.is_common(return_address);
                let is_made =
                    translation.execute && self.supervisor.is_made_by_kernel(target, regs.rsi);
                if !is_made && !self.supervisor.is_kernel_function(target) {
                    // Code that was made meanwhile, or another module's.
                    return Ok(match by_common && translation.execute {
                        true => Step::GuestOnly(PassThroughReason::TrappedFunction, None),
                        false => wild,
                    });
                }
                if !by_common
                    && !self.domain.is_driver_text(return_address)
                    && !self.domain.monitor.contains_va(return_address)
                {
                    return Ok(wild);
                }
                self.stats.indirect_calls += 1;
                self.note(|| Happened::Calls(target));
                let trampoline = self.domain.monitor.trampoline(target)?;
                if let (Some(_), Some(effects)) = (&self.journal, self.request.effects)
                    && !self.has_overflowed()
                {
                    let monitor = &mut self.domain.monitor;
                    monitor.journal(|function| effects.matters(function));
                }
                if self.watch.is_some() {
                    self.domain.monitor.watch_crossings();
                }
                self.resume_at(frame, regs, trampoline);
                Ok(Step::Continue)
            }
            Root::Kernel if in_driver => self.call_back(frame, target, regs),
            Root::Kernel if translation.execute => {
                self.note(|| Happened::Filled(target));
                self.fill(root, target)?;
                self.resume(frame, regs);
                Ok(Step::Continue)
            }
            Root::Kernel => Ok(self.real_exception(frame, target, root, regs)),
        }
    }
}
