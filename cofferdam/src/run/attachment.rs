//! What keeps a NIC of a device host attached: a host that was killed and is there again is
//! attached anew.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use anyhow::Context;
use devices::vfio_user::function::VfioUserFunction;

use crate::device::client::{ask, attach};
use crate::device::protocol::Request;
use crate::options::{MacAddress, VmName};
use crate::runtime_dir::RuntimeRoot;

/// Between two looks at whether the host is there, and between two attempts to reach it.
const LOOK: Duration = Duration::from_millis(250);

/// Whose NIC is attached where.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// Where VMs and device hosts are found.
    pub root: RuntimeRoot,
    /// The device host.
    pub host: VmName,
    /// The VM.
    pub vm: VmName,
    /// Its address.
    pub mac: MacAddress,
}

impl Attachment {
    /// Attaches the NIC.
    ///
    /// # Errors
    /// See [`attach`].
    pub fn attach(&self) -> anyhow::Result<UnixStream> {
        let (stream, info) = attach(&self.root, &self.host, &self.vm, self.mac)?;
        let turn = if info.turn {
            "and has the turn"
        } else {
            "and waits for its turn"
        };
        tracing::info!(device = info.device, model = info.model, "attached {turn}");
        Ok(stream)
    }

    /// Tells the host that the VM does not run for now, and passes its turn on if it has it, or
    /// that it runs again.
    ///
    /// # Errors
    /// The host does not answer.
    pub fn set_away(&self, away: bool) -> anyhow::Result<()> {
        let vm = self.vm.to_string();
        let request = match away {
            true => Request::Yield { vm },
            false => Request::Return { vm },
        };
        ask(&self.root, &self.host, &request).map(drop)
    }

    /// Attaches `function` again whenever its host has gone and come back, as long as it is there.
    ///
    /// # Errors
    /// There is no thread.
    pub fn keep(&self, function: &Arc<Mutex<VfioUserFunction>>) -> anyhow::Result<()> {
        let connected = {
            let function = function.lock().unwrap_or_else(PoisonError::into_inner);
            function.connected()
        };
        let function = Arc::downgrade(function);
        let attachment = self.clone();
        std::thread::Builder::new()
            .name(format!("device {}", self.host))
            .spawn(move || {
                let mut refused = None;
                while function.strong_count() > 0 {
                    std::thread::sleep(LOOK);
                    if connected.load(std::sync::atomic::Ordering::Relaxed) {
                        refused = None;
                        continue;
                    }
                    match attachment.again(&function) {
                        Ok(()) => refused = None,
                        // The same reason is said once.
                        Err(error) => {
                            let error = format!("{error:#}");
                            if refused.as_ref() != Some(&error) {
                                tracing::warn!("the NIC is not attached again: {error}");
                                refused = Some(error);
                            }
                        }
                    }
                }
            })
            .context("cannot start a thread")?;
        Ok(())
    }

    fn again(&self, function: &Weak<Mutex<VfioUserFunction>>) -> anyhow::Result<()> {
        let stream = self.attach()?;
        let Some(function) = function.upgrade() else {
            return Ok(());
        };
        let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
        function.reconnect(stream)?;
        tracing::info!(device = %self.host, "the NIC is attached again");
        Ok(())
    }
}
