//! Which memory has changed since a mark that was in use all the time.

use std::time::Duration;

use super::{AttachError, Isolator, live};
use crate::guest::bystanders::{Bystander, TwoTimes};

impl Isolator {
    /// Brings the machine to rest, and finds the pieces of memory that have been in use since the
    /// mark with this name, have other bytes now, and were written by calls of `module`: none when it
    /// is asked for the first time, as it is remembered from then on where they write. Not those
    /// that are known: of the guest
    /// physical address of a byte of such a one `known` tells where it ends. Lets the machine go on
    /// if it was running. `limit` is how long to wait for it to come to rest.
    ///
    /// # Errors
    /// The guest has not gone on from that mark, does not come to rest, or its kernel's bookkeeping
    /// of memory is not known.
    pub fn bystanders(
        &self,
        module: &str,
        mark: &str,
        limit: Duration,
        known: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> Result<Vec<Bystander>, AttachError> {
        let memory = self.vm.ram().memory().clone();
        // The kernel's own tables, which are there as long as it is.
        let space = self.vm.with_paused(|vcpus| {
            self.with_module(module, |armed| {
                let (_, space) = armed.kernel_tables(vcpus, &memory)?;
                let symbols = &armed.guest.knowledge.symbols;
                let at = live::boot_tables_at(symbols).ok_or(AttachError::NoKernelTables)?;
                live::boot_tables(at, space, at, &memory).ok_or(AttachError::NoKernelTables)
            })
        })??;
        self.vm.since_mark(mark, limit, |since| {
            self.with_module(module, |armed| {
                let policy = armed.policy.as_ref().ok_or(AttachError::NoMemoryModel)?;
                let Some(written) = armed.domain.view().written() else {
                    armed.domain.remember_written();
                    return Ok(Vec::new());
                };
                let times = TwoTimes {
                    model: policy.memory_model(),
                    symbols: &armed.guest.knowledge.symbols,
                    space,
                    now: since.now(),
                    before: since,
                };
                Ok(times.differing(since.changed(), &|at| written.has(at), known))
            })
        })?
    }
}
