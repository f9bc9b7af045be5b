//! Processes that run, as `list` and `device list` show them.

use std::time::Duration;

use anyhow::bail;
use serde::Serialize;
use utoipa::ToSchema;

use super::client::{Connection, ControlClient};
use super::protocol::Status;
use crate::device::protocol::{DeviceProtocol, HostStatus, Reply, Request};
use crate::error_text::one_line;
use crate::runtime_dir::{RunningVm, RuntimeRoot};

/// The VMs that run, each with its status if it answers within `limit`.
///
/// # Errors
/// The runtime folder cannot be read.
pub fn vms(root: &RuntimeRoot, limit: Duration) -> anyhow::Result<Vec<Listed<Status>>> {
    Ok(all(&root.running()?, |vm| {
        ControlClient::to(vm, limit)?.status()
    }))
}

/// The device hosts that run beside the VMs of `root`, in the same way.
///
/// # Errors
/// As of [`vms`].
pub fn devices(root: &RuntimeRoot, limit: Duration) -> anyhow::Result<Vec<Listed<HostStatus>>> {
    Ok(all(&root.devices().running()?, |host| {
        host_status(host, limit)
    }))
}

/// How a device host is, which has `limit` to say so.
///
/// # Errors
/// It does not answer.
pub fn host_status(host: &RunningVm, limit: Duration) -> anyhow::Result<HostStatus> {
    match Connection::<DeviceProtocol>::to(host, limit)?.ask(&Request::Status {})? {
        Reply::Status(status) => Ok(*status),
        other => bail!("the device host answered something else: {other:?}"),
    }
}

/// All at once: one that does not answer must not hold up the others. One that is just coming or
/// going does not answer, and is listed all the same.
fn all<S: Send>(
    running: &[RunningVm],
    ask: impl Fn(&RunningVm) -> anyhow::Result<S> + Sync,
) -> Vec<Listed<S>> {
    let ask = |process| Listed::new(process, ask(process));
    std::thread::scope(|scope| {
        let ask = &ask;
        let asked: Vec<_> = running
            .iter()
            .map(|process| scope.spawn(move || ask(process)))
            .collect();
        asked
            .into_iter()
            .filter_map(|listed| listed.join().ok())
            .collect()
    })
}

/// One line of a list, with the process's status if it answered.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Listed<S> {
    /// Name.
    pub name: String,
    /// Number of the process, if it is known.
    pub pid: Option<u32>,
    /// What it answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<S>,
    /// Why there is no status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_answer: Option<String>,
}

impl<S> Listed<S> {
    /// `process`, which was asked for its status.
    pub fn new(process: &RunningVm, asked: anyhow::Result<S>) -> Self {
        let (status, no_answer) = match asked {
            Ok(status) => (Some(status), None),
            Err(error) => (None, Some(one_line(&error))),
        };
        Self {
            name: process.name.to_string(),
            pid: process.pid,
            status,
            no_answer,
        }
    }

    /// The number of its process for a table.
    pub fn pid_text(&self) -> String {
        self.pid
            .map_or_else(|| "?".to_owned(), |pid| pid.to_string())
    }
}
