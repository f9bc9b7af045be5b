//! A device host for a measurement: this program's `device serve`, ended when it is dropped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::Phases;
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
    /// Starts one in the runtime folder `root`, its NIC on the cable at `cable`, and waits until it answers.
    pub fn start(program: &Path, root: &Path, cable: &Path, parked: &str) -> anyhow::Result<Self> {
        let child = Command::new(program)
            .env(ROOT_VARIABLE, root)
            .args(["device", "serve", NAME, "--model", super::MODEL])
            .args(["--net", &format!("unix={}", cable.display())])
            .args(["--parked", parked])
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
        while host.ask(&["device", "status", NAME, "--json"]).is_err() {
            if let Some(status) = host.child.try_wait()? {
                bail!("the device host ended: {status}");
            }
            ensure!(Instant::now() < deadline, "the device host does not answer");
            std::thread::sleep(POLL);
        }
        Ok(host)
    }

    /// Gives the turn to the guest `to`.
    pub fn give(&self, to: &str, phases: &mut Phases) -> anyhow::Result<()> {
        let answer = self.ask(&["switch", NAME, "--to", to, "--json"])?;
        let told = answer["phases_us"].as_object().into_iter().flatten();
        for (name, us) in told {
            if let Some(us) = us.as_f64() {
                phases.add(name, us);
            }
        }
        Ok(())
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
