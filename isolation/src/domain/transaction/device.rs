//! The isolated device as a call reaches it: stores that wait, loads that do not.

use super::*;

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
        let value = self.device_read(DeviceAddress::Memory(gpa), bytes)?;
        self.domain.vm.answer_mmio(value);
        Ok(Step::Continue)
    }

    pub(super) fn port_read(
        &mut self,
        port: u16,
        bytes: usize,
        count: usize,
    ) -> Result<Step, DomainError> {
        if !self.supervisor.owns_port(port) {
            let kind = ViolationKind::ForeignPort { port, write: false };
            return self.foreign(kind, PassThroughReason::OtherDevice);
        }
        for index in 0..count {
            let value = self.device_read(DeviceAddress::Port(port), bytes)?;
            self.domain.vm.answer_port(index, value as u32);
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
                self.post(DeviceAddress::Port(port), value.into(), bytes)?;
            }
            return Ok(Step::Continue);
        }
        let is_kernel = self.root()? == Root::Kernel;
        let harmless = (0..count).all(|index| {
            let value = self.domain.vm.port_item(index);
            is_kernel && self.supervisor.harmless_port_write(port, value, bytes)
        });
        if harmless {
            return Ok(Step::Continue);
        }
        let kind = ViolationKind::ForeignPort { port, write: true };
        self.foreign(kind, PassThroughReason::OtherDevice)
    }

    fn device_read(&mut self, at: DeviceAddress, bytes: usize) -> Result<u64, DomainError> {
        self.stats.device_reads += 1;
        // A load that only flushes stores: they arrive when the call commits, and nobody uses the device before.
        let waiting = &mut self.posted.iter().map(|write| write.at);
        if let Some(value) = self.supervisor.device_read_past(at, bytes, waiting) {
            return Ok(value);
        }
        self.reach_device()?;
        let value = self.supervisor.device_read(at, bytes);
        self.follow_device()?;
        Ok(value)
    }

    fn post(&mut self, at: DeviceAddress, value: u64, bytes: usize) -> Result<Step, DomainError> {
        if self.posted.len() >= MAX_POSTED {
            self.reach_device()?;
            self.follow_device()?;
        }
        self.posted.push(PostedWrite { at, value, bytes });
        self.stats.posted_writes += 1;
        Ok(Step::Continue)
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
    /// queued stores.
    pub(super) fn reach_device(&mut self) -> Result<(), DomainError> {
        if !self.reached_device {
            self.supervisor.checkpoint_device();
            self.reached_device = true;
            self.journal_device();
        }
        // What the guest and its devices see is the stack with its own return address.
        self.write_slot(self.return_slot, self.return_address)?;
        for pfn in self.private_pages()? {
            let view = &self.domain.view;
            let (old, new) = (view.shared_page(pfn)?, view.private_page(pfn)?);
            let mask = PageMask::changed(old, new);
            if mask.is_empty() {
                continue;
            }
            self.supervisor.publishing(pfn.0 * PAGE_SIZE, old);
            if let Some(journal) = &mut self.journal {
                journal.memory.record(pfn, old, new);
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
        for write in std::mem::take(&mut self.posted) {
            self.supervisor
                .device_write(write.at, write.value, write.bytes);
        }
    }
}
