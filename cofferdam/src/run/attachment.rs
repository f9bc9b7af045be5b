//! What keeps a NIC of a device host attached: a host that was killed and is there again is
//! attached anew.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use anyhow::Context;
use devices::vfio_user::function::VfioUserFunction;

use crate::device::client::{ask, attach};
use crate::device::protocol::Request;
use crate::options::{MacAddress, VmName};
use crate::runtime_dir::RuntimeRoot;

/// Between two looks at whether the host is there, and between two attempts to reach it.
const LOOK: Duration = Duration::from_millis(250);

/// Why a NIC is to have no turn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Away {
    /// The VM is paused.
    pub paused: bool,
    /// Its driver was given up: no call of it is run.
    pub given_up: bool,
}

impl Away {
    fn is_away(self) -> bool {
        self.paused || self.given_up
    }

    /// What the host is told then of `vm`.
    fn request(self, vm: &VmName) -> Request {
        let vm = vm.to_string();
        match self {
            Self { given_up: true, .. } => Request::GiveUp { vm },
            Self { paused: true, .. } => Request::Yield { vm },
            _ => Request::Return { vm },
        }
    }
}

/// Whose NIC is attached where; clones are the same one.
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
    /// What its host was told last, or is to be told. Held while it is told, so that it hears of
    /// changes in their order.
    pub away: Arc<Mutex<Away>>,
    /// The guest's driver has to suspend the device before its turn is passed on.
    pub by_driver: Arc<AtomicBool>,
    /// Model of the NIC, once it was attached.
    pub model: Arc<OnceLock<String>>,
}

impl Attachment {
    /// Attaches the NIC. That of a guest that goes on from a snapshot has to be of the model that
    /// it was of.
    ///
    /// # Errors
    /// See [`attach`].
    pub fn attach(&self, goes_on: Option<&str>) -> anyhow::Result<UnixStream> {
        let (stream, info) = attach(&self.root, &self.host, (&self.vm, self.mac), goes_on)?;
        self.by_driver.store(info.by_driver, Ordering::Relaxed);
        let turn = if info.turn {
            "and has the turn"
        } else {
            "and waits for its turn"
        };
        tracing::info!(device = info.device, model = info.model, "attached {turn}");
        // Of one that comes back it is another one only where it is then refused.
        self.model.get_or_init(|| info.model);
        Ok(stream)
    }

    /// Changes why the NIC is to have no turn. If that makes a difference the host is told, which
    /// passes its turn on if it has it, or gives it one that nobody has.
    ///
    /// # Errors
    /// The host does not answer. It hears of it when the NIC is attached the next time.
    pub fn set_away(&self, change: impl FnOnce(&mut Away)) -> anyhow::Result<()> {
        let mut away = self.away();
        let before = away.request(&self.vm);
        change(&mut away);
        match away.request(&self.vm) == before {
            true => Ok(()),
            false => self.tell_away(*away),
        }
    }

    fn away(&self) -> MutexGuard<'_, Away> {
        // A change of it is whole.
        self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_away(&self, away: Away) -> anyhow::Result<()> {
        ask(&self.root, &self.host, &away.request(&self.vm)).map(drop)
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
                    if connected.load(Ordering::Relaxed) {
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
        let stream = self.attach(None)?;
        let Some(function) = function.upgrade() else {
            return Ok(());
        };
        let reconnected = {
            let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
            function.reconnect(stream)
        };
        reconnected?;
        // To a host that begins anew whoever attaches may have the turn.
        let away = self.away();
        if away.is_away() {
            self.tell_away(*away)?;
        }
        tracing::info!(device = %self.host, "the NIC is attached again");
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use recovery::asker::Asker;

    use super::*;
    use crate::control::server::{Handler, serve_protocol};
    use crate::device::protocol::{DeviceProtocol, Reply};

    /// A device host that writes down what it is told.
    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>);

    impl Handler<DeviceProtocol> for Heard {
        fn handle(&self, request: Request, _: &dyn Asker) -> Result<Reply, String> {
            let said = match request {
                Request::Yield { vm } => format!("{vm} yields"),
                Request::GiveUp { vm } => format!("{vm} gives up"),
                Request::Return { vm } => format!("{vm} is back"),
                other => format!("{other:?}"),
            };
            self.0.lock().unwrap().push(said);
            Ok(Reply::Turn { turn: None })
        }
    }

    /// A pause and a driver that was given up are one rest for a device host, which ends with the
    /// last of them; it knows whether the driver can be asked for anything.
    #[test]
    fn a_nic_has_no_turn_while_its_vm_is_paused_or_its_driver_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let root = RuntimeRoot::new(folder.path());
        let host: VmName = "nic".parse().unwrap();
        let dir = root.devices().claim(&host).unwrap();
        let heard = Arc::new(Heard::default());
        serve_protocol(&dir.paths().control_socket(), heard.clone()).unwrap();
        let attachment = Attachment {
            root,
            host,
            vm: "left".parse().unwrap(),
            mac: MacAddress([2, 0, 0, 0, 0, 1]),
            away: Arc::default(),
            by_driver: Arc::default(),
            model: Arc::default(),
        };
        let said = |change: fn(&mut Away)| {
            attachment.clone().set_away(change).unwrap();
            std::mem::take(&mut *heard.0.lock().unwrap())
        };
        assert_eq!(said(|away| away.given_up = true), ["left gives up"]);
        assert!(said(|away| away.given_up = true).is_empty());
        assert!(said(|away| away.paused = true).is_empty());
        assert_eq!(said(|away| away.given_up = false), ["left yields"]);
        assert_eq!(said(|away| away.paused = false), ["left is back"]);
        assert_eq!(said(|away| away.paused = true), ["left yields"]);
        assert_eq!(said(|away| away.given_up = true), ["left gives up"]);
        assert!(said(|away| away.paused = false).is_empty());
        assert_eq!(said(|away| away.given_up = false), ["left is back"]);
    }
}
