//! Exits of P: what each is about, and the ways on.

use kvm_bindings::kvm_regs;

use super::call::PassThroughReason;
use super::{Call, Step, TRAP_FLAG};
use crate::domain::error::DomainError;
use crate::domain::monitor::{
    ExceptionFrame, PORT_CALLBACK_RETURN, PORT_EXCEPTION, PORT_FATAL, PORT_JOURNAL, PORT_RETURN,
    PORT_SLEEP, PORT_STRIKE, PORT_TRAPPED,
};
use crate::domain::private_vm::Exit;
use crate::domain::roots::Root;
use crate::domain::violation::ViolationKind;

impl Call<'_> {
    pub(super) fn handle(&mut self, exit: Exit) -> Result<Step, DomainError> {
        let regs = self.domain.vm.regs();
        match exit {
            Exit::Out {
                port: PORT_RETURN, ..
            } if self.at_stub(&regs) => Ok(Step::Returned),
            Exit::Out {
                port: PORT_EXCEPTION,
                ..
            } if self.at_stub(&regs) => self.exception(&regs),
            Exit::Out {
                port: PORT_CALLBACK_RETURN,
                ..
            } if self.at_stub(&regs) => self.callback_return(&regs),
            Exit::Out {
                port: PORT_JOURNAL, ..
            } if self.at_stub(&regs) => self.journal_point(&regs),
            Exit::Out {
                port: PORT_FATAL, ..
            } if self.root()? == Root::Kernel => {
                let function = regs.rip;
                Ok(Step::Violation(
                    ViolationKind::FatalFunction { function },
                    regs.rip,
                ))
            }
            Exit::Out {
                port: PORT_TRAPPED, ..
            } => {
                let kind = ViolationKind::ForeignPort {
                    port: PORT_TRAPPED,
                    write: true,
                };
                self.foreign(kind, PassThroughReason::TrappedFunction)
            }
            Exit::Out {
                port: PORT_SLEEP, ..
            } if self.root()? == Root::Kernel => self.sleep(&regs),
            Exit::Out {
                port: PORT_STRIKE, ..
            } if self.domain.strike_at(regs.rip).is_some() => self.struck(&regs),
            Exit::Out { port, bytes, count } => self.port_write(port, bytes, count),
            Exit::In { port, bytes, count } => self.port_read(port, bytes, count),
            Exit::MmioRead { gpa, bytes } => self.mmio_read(gpa, bytes),
            Exit::MmioWrite { gpa, value, bytes } => self.mmio_write(gpa, value, bytes),
            Exit::MsrRead { index } => self.foreign(
                ViolationKind::ForeignMsr { index },
                PassThroughReason::ProcessorRegister,
            ),
            Exit::MsrWrite { index, value } => {
                if self.root()? == Root::Kernel && self.supervisor.platform_msr_write(index, value)
                {
                    return Ok(Step::Continue);
                }
                self.foreign(
                    ViolationKind::ForeignMsr { index },
                    PassThroughReason::ProcessorRegister,
                )
            }
            Exit::Interrupted => Ok(Step::Continue),
            Exit::DirtyRingFull => {
                self.harvest()?;
                self.domain.vm.reset_ring()?;
                self.stats.other_syscalls += 1;
                Ok(Step::Continue)
            }
            Exit::Shutdown => Ok(Step::Violation(ViolationKind::Shutdown, regs.rip)),
            Exit::Other(_) => self.foreign(
                ViolationKind::PrivilegedInstruction,
                PassThroughReason::Halt,
            ),
        }
    }

    /// The call has come to the fault that waits for it, and goes on with it.
    fn struck(&mut self, regs: &kvm_regs) -> Result<Step, DomainError> {
        let Some(at) = self.domain.strike_at(regs.rip) else {
            return Ok(Step::Continue);
        };
        // KVM would move on from the `out` when it is entered again.
        self.domain.vm.settle()?;
        self.domain.strike()?;
        self.domain.vm.set_regs(&kvm_regs { rip: at, ..*regs });
        Ok(Step::Continue)
    }

    /// Whether RIP is in the monitor area: a driver that uses a stub's port itself is no stub.
    pub(super) fn at_stub(&self, regs: &kvm_regs) -> bool {
        self.domain.monitor.contains_va(regs.rip)
    }

    /// Which root P is on.
    pub(super) fn root(&mut self) -> Result<Root, DomainError> {
        self.stats.other_syscalls += u32::from(!self.domain.vm.tells_system());
        let cr3 = self.domain.vm.fault_registers()?.cr3;
        Ok(self.domain.root_of(cr3))
    }

    /// Something a driver must not do and a kernel function may, in the guest.
    pub(super) fn foreign(
        &mut self,
        kind: ViolationKind,
        reason: PassThroughReason,
    ) -> Result<Step, DomainError> {
        let regs = self.domain.vm.regs();
        Ok(match self.root()? {
            Root::Driver => Step::Violation(kind, regs.rip),
            Root::Kernel => Step::GuestOnly(reason, self.in_the_guest(&kind, &regs)?.map(Box::new)),
        })
    }

    pub(super) fn resume(&mut self, frame: &ExceptionFrame, regs: &kvm_regs) {
        self.resume_at(frame, regs, frame.rip);
    }

    pub(super) fn resume_at(&mut self, frame: &ExceptionFrame, regs: &kvm_regs, rip: u64) {
        let mut rflags = frame.rflags;
        let rip = match self.outdated.take() {
            None => rip,
            // By way of a load of CR3, which drops all that the processor remembers of the tables
            // (Intel SDM volume 3, section 4.10.4.1).
            Some(root) => {
                self.stats.root_loads += 1;
                // The stub would be stepped in place of a store, which comes once more.
                rflags &= !TRAP_FLAG;
                let monitor = &mut self.domain.monitor;
                monitor.resume_at(rip);
                match root {
                    Root::Driver => monitor.entry_stub(),
                    Root::Kernel => monitor.kernel_stub(),
                }
            }
        };
        let next = kvm_regs {
            rip,
            rsp: frame.rsp,
            rflags,
            ..*regs
        };
        self.domain.vm.set_regs(&next);
    }
}
