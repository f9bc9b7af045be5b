//! The beginning of a call: P made ready, and brought to the entry of the function.

use kvm_bindings::kvm_regs;

use super::call::PassThroughReason;
use super::{Call, TRAP_FLAG};
use crate::domain::error::DomainError;
use crate::domain::roots::{Root, RootError};
use crate::domain::view::{PAGE_SIZE, Pfn};

impl Call<'_> {
    /// Makes P ready for a call: pages, control registers, clock and roots as the guest has them
    /// now.
    pub(super) fn prepare(&mut self) -> Result<Option<PassThroughReason>, DomainError> {
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
    pub(super) fn begin(&mut self) -> Result<Option<PassThroughReason>, DomainError> {
        if let Some(reason) = self.prepare()? {
            return Ok(Some(reason));
        }
        let domain = &mut *self.domain;
        for pfn in domain.warm.iter() {
            domain.roots.forget_written(pfn, &mut domain.monitor);
        }
        self.roots_at_begin = Some(domain.roots.rebuilds());
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
        self.begin_watching()?;
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
    pub(super) fn start(&mut self, regs: &kvm_regs) {
        // The stub loads CR3.
        self.outdated = None;
        let mut regs = *regs;
        regs.rip = self.domain.monitor.entry_stub();
        regs.rflags &= !TRAP_FLAG;
        self.domain.vm.set_regs(&regs);
    }
}
