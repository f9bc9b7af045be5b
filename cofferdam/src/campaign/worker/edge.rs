//! Faults at the edge of a worker's device.

use anyhow::bail;
use devices::edge::{EdgeKind, EdgeOrder};
use recovery::campaign::kind::TrialKind;

use super::Worker;
use crate::control::protocol::{Disturbance, Reply, Request};

impl Worker {
    /// How many events of a run without a fault one of this kind can strike at; 0 if the device
    /// cannot fail so.
    pub fn events(&self, kind: EdgeKind) -> u64 {
        self.events.get(kind.name()).copied().unwrap_or(0)
    }

    /// Has the device's edge count what faults of these kinds could strike at.
    pub(super) fn watch_edge(&mut self, kinds: &[TrialKind]) -> anyhow::Result<()> {
        for kind in kinds {
            let TrialKind::Edge(kind) = *kind else {
                continue;
            };
            let order = order(kind, u64::MAX, 0);
            let request = Request::Disturb { nic: None, order };
            if let Err(error) = self.control.ask(&request) {
                // A process that has ended answers nothing either.
                self.control.status()?;
                tracing::debug!("{}: {error:#}", kind.name());
            }
        }
        Ok(())
    }

    /// What it has counted, in two runs.
    pub(super) fn count_events(&mut self) -> anyhow::Result<()> {
        for disturbance in self.calm_edge()? {
            let status = disturbance.status;
            self.events
                .insert(status.order.kind.name(), status.matched / 2);
        }
        Ok(())
    }

    /// Takes back what goes wrong at the device's edge.
    pub(super) fn calm_edge(&mut self) -> anyhow::Result<Vec<Disturbance>> {
        let all = Request::Undisturb {
            nic: None,
            number: None,
        };
        match self.control.ask(&all)? {
            Reply::Disturbances { disturbances } => Ok(disturbances),
            other => bail!("the VM answered something else: {other:?}"),
        }
    }
}

/// A fault of this kind at an edge, after so many events, with all that the kind needs from the
/// seed.
pub(super) fn order(kind: EdgeKind, after: u64, seed: u64) -> EdgeOrder {
    let order = EdgeOrder::new(kind).after(after).seed(seed);
    match kind {
        EdgeKind::LoadValue => order.value(seed),
        _ => order,
    }
}
