//! What a first call would wait for is done before there is one: P runs, and reads of each page of
//! code that calls may execute. Its first run makes KVM set it up, and the reads have KVM find the
//! host's pages for its second stage.
//!
//! It is for speed alone: pages that cannot be read are left to the calls.

use kvm_bindings::kvm_regs;

use super::Domain;
use super::error::DomainError;
use super::monitor::PORT_RETURN;
use super::private_vm::Exit;
use super::view::PAGE_SIZE;

/// RFLAGS with interrupts off: bit 1 is always set.
const RFLAGS: u64 = 1 << 1;
/// Signals that P is entered again after.
const MAX_INTERRUPTED: usize = 16;

/// Pages that follow each other: the first's address, and how many there are.
fn runs_of(mut pages: Vec<u64>) -> Vec<(u64, u64)> {
    pages.sort_unstable();
    pages.dedup();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some((start, count)) if *start + *count * PAGE_SIZE == page => *count += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

impl Domain {
    /// See the module. There must have been no call yet; the guest may run.
    ///
    /// # Errors
    /// KVM refuses to run P.
    pub fn rehearse(&mut self) -> Result<(), DomainError> {
        let fixed = &self.fixed;
        let pages = fixed.driver_text.iter().chain(&fixed.common);
        let runs = runs_of(pages.map(|va| va & !(PAGE_SIZE - 1)).collect());
        for (start, count) in runs {
            self.touch(start, count)?;
        }
        // Tables of the guest's in which the processor noted that it used them; and pages that the
        // host has written before, which KVM tells of when it finds them.
        let mut written = Vec::new();
        self.vm.harvest(&self.slot_bases, |pfn| written.push(pfn))?;
        written.retain(|pfn| !self.is_overlay(*pfn));
        self.stale.extend(written);
        Ok(())
    }

    /// Has P read of `count` pages from `start` on.
    fn touch(&mut self, start: u64, count: u64) -> Result<(), DomainError> {
        self.monitor.begin_call(self.monitor.touch_stub());
        self.vm.set_regs(&kvm_regs {
            rip: self.monitor.entry_stub(),
            rsi: start,
            rcx: count,
            rflags: RFLAGS,
            ..kvm_regs::default()
        });
        for _ in 0..MAX_INTERRUPTED {
            match self.vm.run()? {
                Exit::Interrupted => {}
                Exit::Out {
                    port: PORT_RETURN, ..
                } => return Ok(()),
                exit => {
                    tracing::debug!(
                        "code at {start:#x} is not read before there is a call: {exit:?}"
                    );
                    return Ok(self.vm.settle()?);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_follow_each_other_are_read_in_one_go() {
        let pages = [0x5000, 0x1000, 0x2000, 0x1000, 0x6000, 0x9000];
        let runs = runs_of(pages.to_vec());
        assert_eq!(runs, [(0x1000, 2), (0x5000, 2), (0x9000, 1)]);
        assert_eq!(runs_of(Vec::new()), []);
    }
}
