//! The VM of a trial: this program's `run`, and what ends it when the trial is given up.
//!
//! ```text
//!   this process ── spawn ──► the VM, in a process group of its own: a terminal's Ctrl-C reaches us alone
//!     ├─ main thread: talks to the VM and to the guest's agent
//!     └─ one thread waits for signals: it ends the VM, removes the folder, and ends us by the signal
//! ```

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use agent_protocol::{Client, ClientError};
use anyhow::{Context, bail};
use guest_images::BuiltImage;
use tempfile::TempDir;

use crate::bench::child;
use crate::control::client::ControlClient;
use crate::options::VmName;
use crate::process::{Process, State};
use crate::runtime_dir::{ROOT_VARIABLE, RuntimeRoot, VmPaths};
use crate::signals::{Asked, Signals, stop_process};
use crate::top::text::clean;

/// How long a guest may take to boot: a minute and more where a processor is emulated.
const BOOT_TIME: Duration = Duration::from_secs(180);

/// How long its process may take to end once it was asked.
const END_TIME: Duration = Duration::from_secs(10);

/// How long its agent may be silent before the process is looked at.
const LOOK: Duration = Duration::from_secs(5);

/// Between two looks at something that will change.
const POLL: Duration = Duration::from_millis(5);

/// What to boot.
#[derive(Debug)]
pub struct Machine {
    /// Name of the VM.
    pub name: VmName,
    /// More options of `run`.
    pub options: Vec<String>,
    /// It goes on when the trial is over.
    pub keep: bool,
}

/// A VM that runs for a trial. Dropping it ends it, unless it was let go.
pub struct TrialVm {
    child: Child,
    /// Console, error lines and, unless the VM is to be kept, its sockets.
    folder: Option<TempDir>,
    paths: VmPaths,
    /// The guest's agent.
    pub agent: Client,
}

impl TrialVm {
    /// Starts the VM. From now on signals end it.
    pub fn start(image: &BuiltImage, machine: &Machine) -> anyhow::Result<Self> {
        let signals = Signals::block().context("cannot hear signals")?;
        let folder = tempfile::Builder::new()
            .prefix("cofferdam-try-")
            .tempdir()
            .context("cannot make a temporary folder: set TMPDIR to one that can be written")?;
        let root = match machine.keep {
            true => RuntimeRoot::from_environment(),
            false => RuntimeRoot::new(folder.path()),
        };
        let mut serial = std::ffi::OsString::from("file=");
        serial.push(folder.path().join("console"));
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let errors = File::create(folder.path().join("errors")).context("temporary folder")?;
        let child = Command::new(&program)
            .env(ROOT_VARIABLE, root.path())
            .args(["run", "--name", machine.name.as_str()])
            .arg("--kernel")
            .arg(image.kernel())
            .arg("--initrd")
            .arg(image.initrd())
            .arg("--serial")
            .arg(serial)
            .args(&machine.options)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let paths = root.paths(&machine.name);
        let agent = Client::unix(paths.agent_socket());
        let vm = Self {
            child,
            folder: Some(folder),
            paths,
            agent,
        };
        end_on_signals(signals, vm.child.id(), vm.folder_path())?;
        Ok(vm)
    }

    fn folder_path(&self) -> PathBuf {
        let folder = self.folder.as_ref();
        folder.map_or_else(PathBuf::new, |folder| folder.path().to_owned())
    }

    /// Waits until the guest's agent answers.
    pub fn wait_for_agent(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + BOOT_TIME;
        loop {
            if self.child.try_wait()?.is_some() {
                bail!("the guest's VM has ended: {}", self.errors());
            }
            if self.paths.agent_socket().exists() {
                match self.agent.hello(LOOK) {
                    Ok(_) => return Ok(()),
                    Err(ClientError::Time(..)) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if let Some(line) = self.panic_line() {
                bail!("the guest's kernel has panicked while it booted: {line}");
            }
            if Instant::now() >= deadline {
                bail!(
                    "the guest has not booted within {} s: `cofferdam doctor` says whether this host can run guests",
                    BOOT_TIME.as_secs()
                );
            }
            std::thread::sleep(POLL);
        }
    }

    /// What its kernel said last, if it has panicked.
    pub fn panic_line(&self) -> Option<String> {
        let status = self.control().and_then(|mut control| control.status());
        status.ok()?.guest_panic.map(|line| clean(&line))
    }

    /// A new connection to the VM process.
    pub fn control(&self) -> anyhow::Result<ControlClient> {
        ControlClient::connect(&self.paths.control_socket())
    }

    /// Where its sockets are.
    pub fn paths(&self) -> &VmPaths {
        &self.paths
    }

    /// What the VM's process said before it ended, in a line.
    fn errors(&self) -> String {
        let text = std::fs::read_to_string(self.folder_path().join("errors")).unwrap_or_default();
        let last = text.lines().rev().find(|line| !line.trim().is_empty());
        let last = last.map(|line| line.trim_start_matches("cofferdam: "));
        clean(last.unwrap_or("it says nothing about why"))
    }

    /// Lets it go on when this process ends. The file with its console, which stays.
    pub fn let_go(mut self) -> Option<PathBuf> {
        let folder = self.folder.take()?.keep();
        Some(folder.join("console"))
    }
}

impl Drop for TrialVm {
    fn drop(&mut self) {
        // Without its folder it was let go.
        if self.folder.is_some() {
            child::end(&mut self.child, END_TIME);
        }
    }
}

/// Waits for signals in a thread: one that asks for the end ends the VM `pid`, removes `folder`,
/// and ends this process.
fn end_on_signals(signals: Signals, pid: u32, folder: PathBuf) -> anyhow::Result<()> {
    let process = Process::open(pid).context("cannot watch the guest's VM")?;
    let wait = move || {
        loop {
            match signals.wait() {
                Ok(Asked::End(signal)) => {
                    end(&process, pid, &folder);
                    signal.end_process();
                }
                Ok(Asked::Stop) => stop_process(),
                Ok(Asked::Continued) => {}
                Err(error) => {
                    tracing::warn!("cannot wait for signals: {error}");
                    return;
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(wait)
        .context("cannot start a thread")?;
    Ok(())
}

/// Ends the VM, if it still runs, and removes what was made for it.
fn end(process: &Process, pid: u32, folder: &Path) {
    eprintln!("ending the guest");
    let deadline = Instant::now() + END_TIME;
    if process.ask_to_end().is_ok() {
        while State::of(pid).is_some_and(|state| state != State::Ended) {
            if Instant::now() >= deadline {
                // It cannot be asked any more.
                let _gone = process.kill();
                break;
            }
            std::thread::sleep(POLL);
        }
    }
    if let Err(error) = std::fs::remove_dir_all(folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("{} stays behind: {error}", folder.display());
    }
}
