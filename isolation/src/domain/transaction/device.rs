//! The isolated device as a call reaches it: stores that wait, loads that do not.

use devices::hold::{Access, DeviceAddress};

use super::call::{DeviceStore, PassThroughReason};
use super::{Call, Step};
use crate::domain::error::DomainError;
use crate::domain::recorder::Happened;
use crate::domain::roots::Root;
use crate::domain::view::{PAGE_SIZE, Page};
use crate::domain::violation::ViolationKind;
use crate::policy::diff::PageMask;

/// Device stores that may wait for commit.
const MAX_POSTED: usize = 4096;

/// A store to the device that waits for the commit.
#[derive(Debug, Clone, Copy)]
pub(in crate::domain) struct PostedWrite {
    pub(super) store: DeviceStore,
    /// How many kernel functions waited when it was made.
    pub(super) handed_over: u64,
}

/// A page of which something was published before the end of the call.
pub(super) struct Overwritten {
    /// Bytes that were.
    pub(super) bytes: PageMask,
    /// What they were when the call, or this part of it, began.
    pub(super) old: Box<Page>,
}

/// Bytes of the host's memory that the old bytes of a page take, here and with the policy.
const OVERWRITTEN_BYTES: u64 = 3 * PAGE_SIZE;

impl Call<'_> {
    pub(super) fn mmio_read(&mut self, gpa: u64, bytes: usize) -> Result<Step, DomainError> {
        if !self.supervisor.owns_mmio(gpa) {
            if self.root()? == Root::Kernel
                && let Some(value) = self.supervisor.platform_read(gpa, bytes)
            {
                self.domain.vm.answer_mmio(value);
                return Ok(Step::Continue);
            }
            let kind = ViolationKind::ForeignMmio { gpa, write: false };
            return self.foreign(kind, PassThroughReason::OtherDevice);
        }
        match self.load(DeviceAddress::Memory(gpa), bytes)? {
            Ok(value) => self.domain.vm.answer_mmio(value),
            Err(kind) => return Ok(self.violation_here(kind)),
        }
        Ok(Step::Continue)
    }

    pub(super) fn port_read(
        &mut self,
        port: u16,
        bytes: usize,
        count: usize,
    ) -> Result<Step, DomainError> {
        if !self.supervisor.owns_port(port) {
            if self.supervisor.is_nobodys_port(port, bytes) {
                // As the bus answers.
                (0..count).for_each(|index| self.domain.vm.answer_port(index, u32::MAX));
                return Ok(Step::Continue);
            }
            let kind = ViolationKind::ForeignPort { port, write: false };
            return self.foreign(kind, PassThroughReason::OtherDevice);
        }
        for index in 0..count {
            match self.load(DeviceAddress::Port(port), bytes)? {
                Ok(value) => self.domain.vm.answer_port(index, value as u32),
                Err(kind) => return Ok(self.violation_here(kind)),
            }
        }
        Ok(Step::Continue)
    }

    pub(super) fn port_write(
        &mut self,
        port: u16,
        bytes: usize,
        count: usize,
    ) -> Result<Step, DomainError> {
        if self.supervisor.owns_port(port) {
            for index in 0..count {
                let value = self.domain.vm.port_item(index);
                let step = self.post(DeviceAddress::Port(port), value.into(), bytes)?;
                if !matches!(step, Step::Continue) {
                    return Ok(step);
                }
            }
            return Ok(Step::Continue);
        }
        if self.supervisor.is_nobodys_port(port, bytes) {
            return Ok(Step::Continue);
        }
        let is_kernel = self.root()? == Root::Kernel;
        let harmless = (0..count).all(|index| {
            let value = self.domain.vm.port_item(index);
            is_kernel && self.supervisor.harmless_port_write(port, value, bytes)
        });
        if harmless {
            self.note(|| Happened::Console(port));
            return Ok(Step::Continue);
        }
        let kind = ViolationKind::ForeignPort { port, write: true };
        self.foreign(kind, PassThroughReason::OtherDevice)
    }

    fn violation_here(&self, kind: ViolationKind) -> Step {
        Step::Violation(kind, self.domain.vm.regs().rip)
    }

    /// The same, noted where that was asked for.
    fn load(
        &mut self,
        at: DeviceAddress,
        bytes: usize,
    ) -> Result<Result<u64, ViolationKind>, DomainError> {
        let answer = self.device_read(at, bytes)?;
        if let Ok(value) = answer {
            self.note(|| Happened::DeviceLoad {
                at: at.into(),
                bytes: bytes as u8,
                value,
            });
        }
        Ok(answer)
    }

    /// What the device answers, or why the call may not get as far as asking it.
    fn device_read(
        &mut self,
        at: DeviceAddress,
        bytes: usize,
    ) -> Result<Result<u64, ViolationKind>, DomainError> {
        self.stats.device_reads += 1;
        // A load that only flushes stores: they arrive when the call commits, and nobody uses the
        // device before.
        let waiting = &mut self.posted.iter().map(|write| write.store.at);
        if let Some(value) = self.supervisor.device_read_past(at, bytes, waiting) {
            self.take_over()?;
            return Ok(Ok(value));
        }
        let uses_memory =
            self.posted_use_memory || self.supervisor.device_uses_memory(at, bytes, Access::Load);
        if !uses_memory {
            self.reach_registers();
            let value = self.supervisor.device_read(at, bytes);
            self.take_over()?;
            return Ok(Ok(value));
        }
        if let Some(kind) = self.reach_device()? {
            return Ok(Err(kind));
        }
        let value = self.supervisor.device_read(at, bytes);
        self.follow_device()?;
        Ok(Ok(value))
    }

    fn post(&mut self, at: DeviceAddress, value: u64, bytes: usize) -> Result<Step, DomainError> {
        if self.posted.len() >= MAX_POSTED
            && let Some(kind) = self.perform_posted()?
        {
            return Ok(self.violation_here(kind));
        }
        self.posted_use_memory |= self.supervisor.device_uses_memory(at, bytes, Access::Store);
        self.posted.push(PostedWrite {
            store: DeviceStore { at, value, bytes },
            handed_over: match self.hands_over {
                true => self.domain.monitor.handed_over_count(),
                false => 0,
            },
        });
        self.stats.posted_writes += 1;
        self.note(|| Happened::DeviceStore {
            at: at.into(),
            bytes: bytes as u8,
            value,
        });
        Ok(Step::Continue)
    }

    /// Performs the queued stores in the middle of the call; `Some` if it may not get as far as
    /// that.
    fn perform_posted(&mut self) -> Result<Option<ViolationKind>, DomainError> {
        if !self.posted_use_memory {
            self.reach_registers();
            return Ok(None);
        }
        let kind = self.reach_device()?;
        if kind.is_none() {
            self.follow_device()?;
        }
        Ok(kind)
    }

    /// The call is about to wait: a device that goes on by itself does meanwhile what it was told
    /// before.
    pub(super) fn before_wait(&mut self) -> Result<Option<ViolationKind>, DomainError> {
        match self.domain.view.keeps_bases() && !self.posted.is_empty() {
            true => self.perform_posted(),
            false => Ok(None),
        }
    }

    pub(super) fn mmio_write(
        &mut self,
        gpa: u64,
        value: u64,
        bytes: usize,
    ) -> Result<Step, DomainError> {
        if !self.supervisor.owns_mmio(gpa) {
            if self.root()? == Root::Kernel && self.supervisor.platform_write(gpa, value, bytes) {
                return Ok(Step::Continue);
            }
            let kind = ViolationKind::ForeignMmio { gpa, write: true };
            return self.foreign(kind, PassThroughReason::OtherDevice);
        }
        self.post(DeviceAddress::Memory(gpa), value, bytes)
    }

    /// Makes memory as P left it visible to the device, keeping the old bytes, and performs the
    /// queued stores. `Some` if the call may not change all of it, and nothing was done: a commit
    /// would not find it any more.
    pub(super) fn reach_device(&mut self) -> Result<Option<ViolationKind>, DomainError> {
        // What the guest and its devices see is the stack with its own return address.
        self.write_slot(self.return_slot, self.return_address)?;
        if self.watch.is_some()
            && self.root()? == Root::Driver
            && let Some(kind) = self.check_callers()?
        {
            return Ok(Some(kind));
        }
        let pages = self.written_pages()?;
        let changes = self.changes(&pages)?;
        if let Some(kind) = self.forbidden_change(&changes) {
            return Ok(Some(kind));
        }
        let more = changes
            .iter()
            .filter(|(pfn, _)| !self.overwritten.contains_key(pfn));
        if !self.kept.grow(more.count() as u64 * OVERWRITTEN_BYTES) {
            return Ok(Some(ViolationKind::HostMemory));
        }
        self.checkpoint_device();
        for (pfn, mask) in changes {
            let view = &self.domain.view;
            let (old, new) = (view.before(pfn)?, view.private_page(pfn)?);
            self.supervisor.publishing(pfn.0 * PAGE_SIZE, old);
            if let Some(journal) = &mut self.journal {
                journal.record(pfn, old, new);
            }
            let kept = self.overwritten.entry(pfn).or_insert_with(|| Overwritten {
                bytes: PageMask::EMPTY,
                old: Box::new(*old),
            });
            for run in mask.without(&kept.bytes).runs() {
                kept.old[run.clone()].copy_from_slice(&old[run]);
            }
            kept.bytes = kept.bytes.or(&mask);
            self.domain.view.publish(pfn, &mask)?;
        }
        self.flush_posted();
        Ok(None)
    }

    /// Performs the queued stores, none of which has the device use memory: it stays as it is.
    fn reach_registers(&mut self) {
        self.checkpoint_device();
        self.flush_posted();
    }

    fn checkpoint_device(&mut self) {
        if !self.reached_device {
            self.supervisor.checkpoint_device();
            self.reached_device = true;
            self.journal_device();
        }
    }

    /// What devices have written before a load is seen by whoever made it (PCI Local Bus
    /// Specification 3.0, 3.2.5), also in private copies. Nothing where they write nothing
    /// meanwhile.
    pub(super) fn take_over(&mut self) -> Result<(), DomainError> {
        if self.domain.view.keeps_bases() {
            for pfn in self.private_pages()? {
                self.domain.view.take_over(pfn)?;
            }
        }
        Ok(())
    }

    /// Takes over into private copies what the device wrote.
    pub(super) fn follow_device(&mut self) -> Result<(), DomainError> {
        for pfn in self.private_pages()? {
            self.domain.view.refresh(pfn)?;
        }
        let stub = self.domain.monitor.exit_stub();
        self.write_slot(self.return_slot, stub)
    }

    pub(super) fn flush_posted(&mut self) {
        self.posted_use_memory = false;
        if !self.posted.is_empty() {
            let stores = self.posted.len() as u32;
            self.note(|| Happened::DevicePerforms(stores));
        }
        for PostedWrite { store, .. } in self.posted.drain(..) {
            self.supervisor
                .device_write(store.at, store.value, store.bytes);
        }
    }
}
