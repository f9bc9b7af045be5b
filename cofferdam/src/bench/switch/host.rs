//! A device host for a measurement: this program's `device serve`, ended when it is dropped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::runtime_dir::ROOT_VARIABLE;

/// Its name.
pub const NAME: &str = "shared";
/// How long it may take to be there, and to end.
const LIMIT: Duration = Duration::from_secs(20);
/// Between two looks at something that will change.
const POLL: Duration = Duration::from_millis(5);

/// See the module.
pub struct DeviceHost {
    child: Child,
    program: PathBuf,
    root: PathBuf,
}

impl DeviceHost {
    /// Starts one in the runtime folder `root`, with a `model` on the wire `net`, and waits until it answers. `parked`: what
    /// guests see that wait for their turn.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(
        program: &Path,
        root: &Path,
        model: &str,
        net: &str,
        parked: &str,
    ) -> anyhow::Result<Self> {
        let child = Command::new(program)
            .env(ROOT_VARIABLE, root)
            .args(["device", "serve", NAME, "--model", model])
            .args(["--net", net, "--parked", parked])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut host = Self {
            child,
            program: program.to_owned(),
            root: root.to_owned(),
        };
        let deadline = Instant::now() + LIMIT;
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
        Ok(self.status()?["turn"].as_str().map(str::to_owned))
    }

    /// Gives the turn to the guest `to`, which has it not; what `cofferdam switch` tells as JSON.
    ///
    /// # Errors
    /// It does not get it.
    pub fn give(&self, to: &str) -> anyhow::Result<Value> {
        self.ask(&["switch", NAME, "--to", to, "--json"])
    }

    /// What `cofferdam device status` tells as JSON.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&self) -> anyhow::Result<Value> {
        self.ask(&["device", "status", NAME, "--json"])
    }

    /// Number of its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs a command of this program.
    fn ask(&self, words: &[&str]) -> anyhow::Result<Value> {
        let output = Command::new(&self.program)
            .env(ROOT_VARIABLE, &self.root)
            .args(words)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {}", self.program.display()))?;
        ensure!(
            output.status.success(),
            "{}: {}",
            words.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(serde_json::from_slice(&output.stdout).unwrap_or(Value::Null))
    }
}

impl Drop for DeviceHost {
    fn drop(&mut self) {
        // SAFETY: a plain system call; the child was not waited for, so its number is still its own.
        unsafe { libc::kill(self.child.id().cast_signed(), libc::SIGTERM) };
        let deadline = Instant::now() + LIMIT;
        while !matches!(self.child.try_wait(), Ok(Some(_))) {
            if Instant::now() >= deadline {
                tracing::warn!("the device host does not end when asked: killing it");
                let killed = self.child.kill().and_then(|()| self.child.wait());
                if let Err(error) = killed {
                    tracing::warn!("the device host cannot be killed: {error}");
                }
                return;
            }
            std::thread::sleep(POLL);
        }
    }
}
