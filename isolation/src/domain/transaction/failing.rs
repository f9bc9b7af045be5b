//! A call at its fault, for who wants to keep it.

use std::collections::BTreeMap;
use std::time::Instant;

use kvm_bindings::kvm_regs;

use super::finish::elapsed_ns;
use super::{Call, OUT_BYTES};
use crate::domain::error::DomainError;
use crate::domain::failing::Failing;
use crate::domain::monitor::CrossingFrame;
use crate::domain::view::{PAGE_SIZE, Page, Pfn};
use crate::domain::violation::Violation;

/// Bytes of a call's or jump's displacement.
const DISPLACEMENT: u64 = 4;

/// Pages as the call had them, with the driver's own addresses in the place of the monitor's.
type Pages = BTreeMap<Pfn, Box<Page>>;

impl Call<'_> {
    /// Tells of the call before it is taken back, if somebody wants to hear of it.
    pub(super) fn tell_failing(
        &mut self,
        violation: &Violation,
        cr2: u64,
    ) -> Result<(), DomainError> {
        if !self.supervisor.watches_faults() {
            return Ok(());
        }
        let start = Instant::now();
        let crossings = self.domain.monitor.crossing_frames();
        let callbacks: Vec<CrossingFrame> = self
            .callbacks
            .iter()
            .map(|callback| CrossingFrame {
                return_address: callback.return_address,
                rsp: callback.rsp,
            })
            .collect();
        let private = self.pages_of_the_driver(&crossings, &callbacks)?;
        let (regs, returned) = self.regs_at_fault(&callbacks);
        let unmonitored = |frame: &CrossingFrame| CrossingFrame {
            return_address: self.unmonitored(*frame, &callbacks),
            ..*frame
        };
        let failing = Failing {
            violation,
            regs,
            returned,
            cr2,
            sregs: self.request.sregs,
            entry: self.entry,
            return_address: self.return_address,
            crossings: crossings.iter().map(unmonitored).collect(),
            callbacks,
            private,
            domain: &*self.domain,
        };
        self.supervisor.failing(&failing);
        self.phases.keep_ns = elapsed_ns(start);
        Ok(())
    }

    /// General registers of who ran, and whether a function of the driver had returned.
    fn regs_at_fault(&self, callbacks: &[CrossingFrame]) -> (kvm_regs, bool) {
        let regs = self.domain.vm.regs();
        let monitor = &self.domain.monitor;
        // Of an exception P has the registers of the one that it interrupted, but for those that
        // the frame has.
        if let Some(frame) = monitor.exception_frame(regs.rip, regs.rsp) {
            let interrupted = kvm_regs {
                rip: frame.rip,
                rsp: frame.rsp,
                rflags: frame.rflags,
                ..regs
            };
            return (interrupted, false);
        }
        // KVM leaves RIP at an `out` or, in some builds, behind it.
        let is_at = |stub: u64| regs.rip.wrapping_sub(stub) <= OUT_BYTES;
        let rip = if is_at(monitor.exit_stub()) {
            self.return_address
        } else if is_at(monitor.callback_return_stub()) {
            // The innermost one is forgotten by now if all but this was right.
            let innermost = callbacks.last().map(|callback| callback.return_address);
            innermost.unwrap_or(regs.rip)
        } else {
            return (regs, false);
        };
        (kvm_regs { rip, ..regs }, true)
    }

    /// Where the driver's own code, or the kernel's, would return to from `frame`.
    fn unmonitored(&self, frame: CrossingFrame, callbacks: &[CrossingFrame]) -> u64 {
        let monitor = &self.domain.monitor;
        if !monitor.contains_va(frame.return_address) {
            return frame.return_address;
        }
        // The kernel function was called in the place of the one that would have returned.
        let mut same = callbacks.iter().filter(|other| other.rsp == frame.rsp);
        same.next()
            .map_or(self.return_address, |other| other.return_address)
    }

    /// The pages that the call had otherwise than the guest.
    fn pages_of_the_driver(
        &mut self,
        crossings: &[CrossingFrame],
        callbacks: &[CrossingFrame],
    ) -> Result<Vec<(Pfn, Box<Page>)>, DomainError> {
        let mut pages = Pages::new();
        for pfn in self.private_pages()? {
            pages.insert(pfn, Box::new(*self.domain.view.private_page(pfn)?));
        }
        self.add_text(&mut pages)?;
        self.put_return(self.return_slot, self.return_address, &mut pages)?;
        for frame in crossings.iter().chain(callbacks) {
            let address = self.unmonitored(*frame, callbacks);
            if let Some(slot) = self.stack_slot(frame.rsp.wrapping_sub(8))? {
                self.put_return(slot, address, &mut pages)?;
            }
        }
        let mut changed = Vec::new();
        for (pfn, page) in pages {
            if *page != *self.domain.view.shared_page(pfn)? {
                changed.push((pfn, page));
            }
        }
        Ok(changed)
    }

    /// Puts a return address where one of the monitor's is.
    fn put_return(
        &self,
        slot: (Pfn, usize),
        address: u64,
        pages: &mut Pages,
    ) -> Result<(), DomainError> {
        let now = self.read_slot(slot)?;
        let (pfn, offset) = slot;
        if self.domain.monitor.contains_va(now)
            && let Some(page) = pages.get_mut(&pfn)
            && let Some(word) = page.get_mut(offset..offset + 8)
        {
            word.copy_from_slice(&address.to_le_bytes());
        }
        Ok(())
    }

    /// Adds the driver's text as it ran, faults on purpose among it, with calls leading to where
    /// they would lead in the guest.
    fn add_text(&self, pages: &mut Pages) -> Result<(), DomainError> {
        let domain = &*self.domain;
        let place = |va: u64| -> Result<Option<(Pfn, usize)>, DomainError> {
            let at = domain.roots.translate(va, &domain.view)?;
            let at = at.map(|at| (Pfn::of(at.gpa), (at.gpa % PAGE_SIZE) as usize));
            Ok(at.filter(|(pfn, _)| domain.is_overlay(*pfn)))
        };
        for va in &domain.text {
            if let Some((pfn, _)) = place(*va)? {
                pages.insert(pfn, Box::new(*domain.view.private_page(pfn)?));
            }
        }
        for (site, target) in &domain.redirects {
            let (first, behind) = (site.wrapping_add(1), site.wrapping_add(1 + DISPLACEMENT));
            let mut there = [0; DISPLACEMENT as usize];
            if domain.code(first, &mut there).is_err() {
                continue;
            }
            let led_to = behind.wrapping_add_signed(i64::from(i32::from_le_bytes(there)));
            // Somebody may have put other code there.
            if domain.monitor.trampoline_target(led_to) != Some(*target) {
                continue;
            }
            let own = target.wrapping_sub(behind) as u32;
            for (at, byte) in (first..).zip(own.to_le_bytes()) {
                if let Some((pfn, offset)) = place(at)?
                    && let Some(page) = pages.get_mut(&pfn)
                    && let Some(there) = page.get_mut(offset)
                {
                    *there = byte;
                }
            }
        }
        Ok(())
    }
}
