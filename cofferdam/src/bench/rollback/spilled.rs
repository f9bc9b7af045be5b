//! Rollbacks of calls that had gone on in the guest before they failed.

use anyhow::{Context, bail, ensure};
use recovery::fault::{FaultKind, Place, after_kernel_calls};

use super::faults::{Bench, CANDIDATES, Fired};
use crate::bench::network::DRIVER;
use crate::bench::operation::Operation;
use crate::report::{Method, Recovery, RecoveryRun};

/// Entry points whose calls go on in the guest and then fail: waits are the guest's, and so are
/// [`GUEST_ONLY`].
pub const SPILLING: &[&str] = &["e1000_set_ringparam", "e1000_open"];

/// Kernel functions that may wait, and which these calls go on in the guest for: memory for rings,
/// and the interrupt.
pub(super) const GUEST_ONLY: [&str; 2] = ["vzalloc", "request_threaded_irq"];

/// Places of one entry point at which calls fail after they had gone on in the guest.
const SPILLED_PLACES: usize = 3;

impl Bench<'_> {
    /// Rollbacks of calls that had gone on in the guest, at a few places in turn.
    pub(super) fn spilling_entry(
        &mut self,
        entry: &str,
        operation: Operation,
        runs: usize,
        progress: &mut dyn FnMut(&str),
    ) -> anyhow::Result<Vec<Recovery>> {
        let instructions = self.instructions(entry)?;
        let fault = FaultKind::UndefinedInstruction;
        // The later the more there is to take back.
        let behind = after_kernel_calls(&instructions);
        let behind = behind.into_iter().rev().map(|(offset, _)| offset);
        let last = Place::Last.candidates(&instructions).into_iter();
        let mut places = Vec::new();
        for offset in last.chain(behind).take(CANDIDATES) {
            if places.len() == SPILLED_PLACES {
                break;
            }
            if self
                .spilled_rollback(entry, operation, offset, fault)?
                .is_some()
            {
                places.push(offset);
            }
        }
        ensure!(
            !places.is_empty(),
            "no call of {entry} fails after it has gone on in the guest"
        );
        let mut all = Vec::new();
        let mut misses = 0;
        for offset in places.iter().cycle() {
            if all.len() >= runs {
                break;
            }
            match self.spilled_rollback(entry, operation, *offset, fault)? {
                Some(run) => all.push(run),
                // Another way through the function this time.
                None => misses += 1,
            }
            ensure!(
                misses <= runs,
                "calls of {entry} do not come by their faults any more"
            );
            if !all.is_empty() && all.len().is_multiple_of(10) {
                progress(&format!(
                    "rollback {entry}, spilled: {} of {runs}",
                    all.len()
                ));
            }
        }
        self.works(operation).context("after the faults")?;
        let places: Vec<String> = places.iter().map(|at| format!("+{at:#x}")).collect();
        let fault = format!("{} at {} (spilled)", fault.name(), places.join(", "));
        let recovery = Recovery::from_runs(DRIVER, Method::Rollback, all);
        Ok(Vec::from_iter(recovery.map(|recovery| Recovery {
            entry: Some(entry.to_owned()),
            fault: Some(fault),
            ..recovery
        })))
    }

    /// One fault in a call; `None` if calls do not reach it, or have not gone on in the guest by
    /// then.
    pub(super) fn spilled_rollback(
        &mut self,
        entry: &str,
        operation: Operation,
        offset: u64,
        fault: FaultKind,
    ) -> anyhow::Result<Option<RecoveryRun>> {
        let losses = self.link_losses()?;
        match self.order(entry, operation, offset, fault)? {
            Fired::Yes => {}
            Fired::Missed => return Ok(None),
            Fired::NoCall => bail!("{entry} is not called any more at +{offset:#x}"),
        }
        let lost = self.link_losses()?.saturating_sub(losses);
        let rolled_back = self.last_rollback(entry)?;
        if let Some(why) = &rolled_back.stays {
            bail!("a call of {entry} that failed at +{offset:#x} was not taken back: {why}");
        }
        if rolled_back.violation.spills == 0 {
            return Ok(None);
        }
        self.link_losses = self.link_losses.saturating_add(lost);
        match operation.keeps_interface_up() {
            true => self.followed(&rolled_back).map(Some),
            false => Ok(Some(rolled_back.run())),
        }
    }

    /// How often the other end of the wire saw the link go.
    pub(super) fn link_losses(&mut self) -> anyhow::Result<u64> {
        let status = self.control.status()?;
        let losses = status.nic.get("link_losses").copied();
        losses.context("the VM does not tell losses of the link")
    }
}
