//! The isolated device as a call reaches it: stores that wait, loads that do not.

use super::*;

impl Call<'_> {
    pub(super) fn mmio_read(&mut self, gpa: u64, bytes: usize) -> Result<Step, DomainError> {
        if !self.supervisor.owns_mmio(gpa) {
            let kind = ViolationKind::ForeignMmio { gpa, write: false };
            return self.foreign(kind, PassThroughReason::OtherDevice);
        }
        self.reach_device()?;
        self.stats.device_reads += 1;
        let value = self.supervisor.mmio_read(gpa, bytes);
        self.follow_device()?;
        self.domain.vm.answer_mmio(value);
        Ok(Step::Continue)
    }

    pub(super) fn mmio_write(
        &mut self,
        gpa: u64,
        value: u64,
        bytes: usize,
    ) -> Result<Step, DomainError> {
        if !self.supervisor.owns_mmio(gpa) {
            let kind = ViolationKind::ForeignMmio { gpa, write: true };
            return self.foreign(kind, PassThroughReason::OtherDevice);
        }
        if self.posted.len() >= MAX_POSTED {
            self.reach_device()?;
            self.follow_device()?;
        }
        self.posted.push(PostedWrite { gpa, value, bytes });
        self.stats.posted_writes += 1;
        Ok(Step::Continue)
    }

    /// Makes memory as P left it visible to the device, keeping the old bytes, and performs the
    /// queued stores.
    pub(super) fn reach_device(&mut self) -> Result<(), DomainError> {
        if !self.reached_device {
            self.supervisor.checkpoint_device();
            self.reached_device = true;
        }
        // What the guest and its devices see is the stack with its own return address.
        self.write_slot(self.return_slot, self.return_address)?;
        for pfn in self.private_pages()? {
            let view = &self.domain.view;
            let mask = PageMask::changed(view.shared_page(pfn)?, view.private_page(pfn)?);
            for run in mask.runs() {
                let (offset, length) = (run.start, run.len());
                let bytes = self.domain.view.shared_page(pfn)?[offset..offset + length].to_vec();
                self.undo.push(Undo { pfn, offset, bytes });
                self.domain.view.publish(pfn, offset, length)?;
            }
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
                .mmio_write(write.gpa, write.value, write.bytes);
        }
    }
}
