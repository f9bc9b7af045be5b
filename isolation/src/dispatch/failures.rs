//! What a module's calls did wrong, and what becomes of the one that failed last.

use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::kvm_regs;

use crate::dispatch::after_fault::FaultPolicy;
use crate::dispatch::failed::Failed;
use crate::dispatch::reporter::{Queue, Reports};
use crate::domain::attempt::Attempt;
use crate::fault_image::Keeper;
use crate::guest::symbols::SymbolTable;

/// Calls that failed.
pub(crate) struct Failures {
    /// Decides what becomes of them.
    pub policy: Box<dyn FaultPolicy>,
    /// Keeps images of the guest at their faults.
    pub keeper: Option<Keeper>,
    /// The one that failed just now, if it is to be run once more.
    pub again: Option<Again>,
    pub violations: u64,
    /// One whose caller does not run again yet, and when memory and device were as before it.
    rolled_back: Option<(Failed, Instant)>,
    pub reports: Arc<Reports>,
    queue: Queue,
}

impl Failures {
    /// None yet, of a module whose addresses have names in `symbols`.
    pub fn new(
        policy: Box<dyn FaultPolicy>,
        keeper: Option<Keeper>,
        symbols: Arc<SymbolTable>,
        queue: Queue,
    ) -> Self {
        Self {
            reports: Arc::new(Reports::new(symbols, policy.listener())),
            policy,
            keeper,
            again: None,
            violations: 0,
            rolled_back: None,
            queue,
        }
    }

    /// Another one.
    pub fn add(&mut self, failed: Failed, rolled_back: Instant) {
        self.nobody_runs_again();
        self.violations += 1;
        self.rolled_back = Some((failed, rolled_back));
    }

    /// The one that failed last is told of; its caller runs again.
    pub fn caller_runs_again(&mut self) {
        if let Some((failed, since)) = self.rolled_back.take() {
            self.queue.push(&self.reports, failed, Some(since));
        }
    }

    /// The same for one whose caller does not.
    pub fn nobody_runs_again(&mut self) {
        if let Some((failed, _)) = self.rolled_back.take() {
            self.queue.push(&self.reports, failed, None);
        }
    }
}

/// A call that is to be run once more.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Again {
    /// Address of its gate.
    pub gate: u64,
    /// Which run it is to be.
    pub attempt: Attempt,
    /// Registers at its entry.
    pub entry: kvm_regs,
}
