//! What a domain knows of the guest between two calls, to be put back when the guest's memory is.
//!
//! | what | at a rewind |
//! | --- | --- |
//! | roots: entries taken over from the guest's tables | compared with the guest's at each call, made anew if they differ |
//! | warm pages, private copies left by failed calls | made equal to the guest's, or dropped, when a call begins |
//! | control registers, addresses of the tables | compared with the vCPU's at each call |
//! | pages opened for writing | those that were open then stay open |
//! | private copies of a call in which the domain failed | all private copies are dropped |
//! | patches in P's copies of code | as they were then, over the guest's code as it is again |
//! | where calls have written to the guest's memory, if that is remembered | forgotten |
//! | offset of the time-stamp counter | read anew |
//! | functions that sleep or that only the guest may run, trampolines, counters | as they are |

use std::collections::HashSet;

use super::Domain;
use super::error::DomainError;
use super::overlay::KeptOverlays;

/// See the module's text.
#[derive(Debug)]
pub struct KeptDomain {
    open: HashSet<u64>,
    overlays: KeptOverlays,
}

impl Domain {
    /// What a domain in which no call is has to have again with the guest's memory of this moment.
    pub fn keep(&self) -> KeptDomain {
        KeptDomain {
            open: self.roots.open_pages(),
            overlays: self.overlays.keep(),
        }
    }

    /// The guest's memory and registers are as they were when `kept` was. The guest must not run
    /// meanwhile.
    pub fn put_back(&mut self, kept: &KeptDomain) -> Result<(), DomainError> {
        self.vm.forget_clock();
        if self.view.written().is_some() {
            self.view.remember_written();
        }
        if self.has_failed {
            self.forget_the_call()?;
        }
        self.roots.close_all_but(&kept.open, &mut self.monitor);
        self.opened.retain(|_, va| kept.open.contains(va));
        self.overlays.put_back(&kept.overlays, &mut self.view)?;
        Ok(())
    }

    /// Drops all that a call may have left in which the domain failed, which nobody knows of.
    fn forget_the_call(&mut self) -> Result<(), DomainError> {
        self.vm.settle()?;
        self.vm.harvest(&self.slot_bases, |_| ())?;
        self.vm.reset_ring()?;
        self.stale.clear();
        self.warm.clear();
        self.view.drop_all()?;
        self.overlays.write_all(&mut self.view)?;
        self.vm.forget_adopted();
        self.roots.forget();
        self.has_failed = false;
        Ok(())
    }
}
