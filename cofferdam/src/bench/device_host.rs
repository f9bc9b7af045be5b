//! A device host for a measurement: this program's `device serve`, ended when it is dropped.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::child;
use crate::device::client::ask;
use crate::device::protocol::{HostStatus, Reply, Request, SwitchRecord};
use crate::runtime_dir::{ROOT_VARIABLE, RuntimeRoot};

/// Its name.
pub const NAME: &str = "shared";
/// How long it may take to be there.
const START_LIMIT: Duration = Duration::from_secs(300);
/// How long it may take to end by itself.
const END_LIMIT: Duration = Duration::from_secs(20);
/// Between two looks at something that will change.
const POLL: Duration = Duration::from_millis(5);

/// See the module.
pub struct DeviceHost {
    child: Child,
    root: RuntimeRoot,
}

impl DeviceHost {
    /// Starts one in the runtime folder `root`, with `words` after its name, and waits until it
    /// answers.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(program: &Path, root: &Path, words: &[&str]) -> anyhow::Result<Self> {
        Self::start_by(Command::new(program), root, words)
    }

    /// The same by a command that has the program, and what else its process is to be given.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start_by(mut command: Command, root: &Path, words: &[&str]) -> anyhow::Result<Self> {
        let child = command
            .env(ROOT_VARIABLE, root)
            .args(["device", "serve", NAME])
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let mut host = Self {
            child,
            root: RuntimeRoot::new(root),
        };
        let deadline = Instant::now() + START_LIMIT;
        while host.status().is_err() {
            if let Some(status) = host.child.try_wait()? {
                bail!("the device host ended: {status}");
            }
            ensure!(Instant::now() < deadline, "the device host does not answer");
            std::thread::sleep(POLL);
        }
        Ok(host)
    }

    /// Who has the turn.
    ///
    /// # Errors
    /// It does not answer.
    pub fn turn(&self) -> anyhow::Result<Option<String>> {
        Ok(self.status()?.turn)
    }

    /// Gives the turn to the guest `to`, which has it not.
    ///
    /// # Errors
    /// It does not get it.
    pub fn give(&self, to: &str) -> anyhow::Result<SwitchRecord> {
        let to = to.to_owned();
        match self.ask(&Request::Switch { to })? {
            Reply::Switched(record) => Ok(*record),
            other => bail!("the device host answered something else: {other:?}"),
        }
    }

    /// How it is.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&self) -> anyhow::Result<HostStatus> {
        match self.ask(&Request::Status {})? {
            Reply::Status(status) => Ok(*status),
            other => bail!("the device host answered something else: {other:?}"),
        }
    }

    /// Number of its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn ask(&self, request: &Request) -> anyhow::Result<Reply> {
        ask(&self.root, &NAME.parse()?, request)
    }
}

impl Drop for DeviceHost {
    fn drop(&mut self) {
        child::end(&mut self.child, END_LIMIT);
    }
}
