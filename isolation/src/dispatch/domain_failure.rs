//! A domain that fails by itself: its calls go to the guest, and whoever decides about faults hears
//! of it.

use std::time::Instant;

use devices::clock::monotonic_ns;
use devices::hold::DeviceLost;
use kvm_bindings::kvm_regs;

use crate::compensation::guest_calls::Failure;
use crate::dispatch::armed::Armed;
use crate::domain::attempt::Attempt;
use crate::domain::error::DomainError;
use crate::domain::roots::Root;
use crate::domain::violation::{Violation, ViolationKind};

impl Armed {
    /// The domain is not used any more: `error` stopped it at the call that came through `gate`
    /// with the registers `entry`, of which nothing is left. All calls go on in the guest, and
    /// nobody runs this one again.
    pub(crate) fn domain_failed(
        &mut self,
        gate: u64,
        entry: kvm_regs,
        error: &DomainError,
        device_lost: Option<DeviceLost>,
    ) {
        tracing::error!("the domain is not used any more: {error}");
        self.broken = Some(error.to_string());
        self.hand_over_all();
        let Some(known) = self.gates.get(&gate) else {
            return;
        };
        let violation = Violation {
            kind: ViolationKind::DomainFailed,
            root: Root::Driver,
            rip: known.body,
            rsp: entry.rsp,
            crossings: Vec::new(),
            reached_device: false,
            spills: 0,
            published: None,
        };
        let name = known.entry.name.clone();
        let mut failed = self.guest.knowledge.failed(&name, violation, &self.domain);
        failed.at_ns = monotonic_ns();
        failed.device_lost = device_lost.map(|lost| lost.to_string());
        let failure = Failure {
            failed,
            attempt: Attempt::FIRST,
            entry,
            ended: Instant::now(),
            unheard: false,
            lists: Vec::new(),
        };
        self.failed(gate, failure);
        self.failures.again = None;
    }
}
