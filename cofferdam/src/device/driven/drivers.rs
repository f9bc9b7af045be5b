//! What is asked of the guests' drivers: of the VM's process, at its control socket.
//!
//! Whatever a VM answers, or does not answer in time, is at most a step of a switch that failed.

use recovery::by_turns::{GivenAway, TakenOver};

use crate::control::client::{ANSWER_TIME, Connection};
use crate::control::protocol::{Reply, Request, VmProtocol};
use crate::options::VmName;
use crate::runtime_dir::RuntimeRoot;

/// See the module.
pub trait Drivers: Send + Sync {
    /// Has the driver in the guest of `vm` suspend the device.
    ///
    /// # Errors
    /// It cannot. The device works as before if that is [`AskError::Refused`]; otherwise it may be
    /// suspended.
    ///
    /// [`AskError::Refused`]: crate::control::client::AskError::Refused
    fn hand_over(&self, vm: &VmName) -> anyhow::Result<GivenAway>;
    /// Has the driver in the guest of `vm` resume the device, or probe one that is new to it.
    ///
    /// # Errors
    /// It cannot.
    fn take_over(&self, vm: &VmName) -> anyhow::Result<TakenOver>;
}

/// The VMs' control sockets.
#[derive(Debug)]
pub struct OverSockets {
    /// Where VMs are found.
    pub root: RuntimeRoot,
    /// Name of the device host.
    pub host: VmName,
}

impl OverSockets {
    fn ask(&self, vm: &VmName, request: &Request) -> anyhow::Result<Reply> {
        let vm = self.root.find(Some(vm))?;
        Connection::<VmProtocol>::to(&vm, ANSWER_TIME)?.ask(request)
    }
}

impl Drivers for OverSockets {
    fn hand_over(&self, vm: &VmName) -> anyhow::Result<GivenAway> {
        let device = self.host.to_string();
        match self.ask(vm, &Request::HandOver { device })? {
            Reply::GivenAway { how } => Ok(how),
            other => anyhow::bail!("{vm} answered something else: {other:?}"),
        }
    }

    fn take_over(&self, vm: &VmName) -> anyhow::Result<TakenOver> {
        let device = self.host.to_string();
        match self.ask(vm, &Request::TakeOver { device })? {
            Reply::TakenOver { how } => Ok(how),
            other => anyhow::bail!("{vm} answered something else: {other:?}"),
        }
    }
}
