//! A VM of its own for a measurement or a test: this program's `run`, in a runtime folder of its
//! own.
//!
//! Dropping it ends the VM and removes everything it made.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use agent_protocol::{Client, ClientError};
use anyhow::{Context, anyhow, bail};
use devices::clock::monotonic_ns;
use tempfile::TempDir;

use super::together::{self, Known};
use super::{child, stuck};
use crate::control::client::ControlClient;
use crate::options::VmName;
use crate::report::Guest as GuestFacts;
use crate::runtime_dir::{ROOT_VARIABLE, RuntimeRoot, VmPaths};

/// Name of a VM that nobody gave another.
pub const NAME: &str = "guest";

/// How long a process may take to end once it was asked.
const END_TIME: Duration = Duration::from_secs(10);

/// How long a guest may take to boot, in the slowest place we measure in.
pub const BOOT_TIME: Duration = Duration::from_secs(120);

/// Between two looks at something that will change.
const POLL: Duration = Duration::from_millis(5);

/// How much of a console is shown with an error: a kernel's oops with its call trace fits.
const CONSOLE_TAIL_LINES: usize = 60;

/// What to boot.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    /// The `cofferdam` program.
    pub program: PathBuf,
    /// Folder with the guest images.
    pub images: PathBuf,
    /// Initramfs in that folder.
    pub initrd: &'static str,
    /// Snapshot to go on from instead of booting.
    pub snapshot: Option<PathBuf>,
    /// More options of `run`.
    pub arguments: Vec<String>,
    /// Name of the VM.
    pub name: &'static str,
    /// Runtime folder that it shares with others; one of its own otherwise.
    pub root: Option<PathBuf>,
}

impl GuestOptions {
    /// This program itself, with the full initramfs and no NIC.
    pub fn new(images: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        Ok(Self {
            // Another may have been put in its place since.
            program: match program.is_file() {
                true => program,
                false => PathBuf::from("/proc/self/exe"),
            },
            images: images.to_path_buf(),
            initrd: "initrd.cpio",
            snapshot: None,
            arguments: Vec::new(),
            name: NAME,
            root: None,
        })
    }

    /// With another initramfs of the images.
    pub fn initrd(mut self, initrd: &'static str) -> Self {
        self.initrd = initrd;
        self
    }

    /// One that goes on from a snapshot, with no options of `run` but those that are given from now
    /// on.
    pub fn from_snapshot(mut self, dir: &Path) -> Self {
        self.snapshot = Some(dir.to_owned());
        self.arguments.clear();
        self
    }

    /// Called `name`, among others in the runtime folder `root`.
    pub fn among(mut self, root: &Path, name: &'static str) -> Self {
        self.name = name;
        self.root = Some(root.to_owned());
        self
    }

    /// With more options of `run`, separated by blanks.
    pub fn with(mut self, arguments: &str) -> Self {
        self.arguments
            .extend(arguments.split_whitespace().map(str::to_owned));
        self
    }

    /// The file `name` of the images.
    pub fn image(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.images.join(name);
        if !path.is_file() {
            bail!(
                "{} is missing: build the guest images with `cargo xtask images`, or name their \
                 folder with --images",
                path.display()
            );
        }
        Ok(path)
    }
}

/// Where a VM's serial console goes.
pub enum Console {
    /// Into a file that an error can quote.
    File,
    /// To standard output of the process, which the caller reads.
    Pipe,
}

/// A VM that runs for us.
pub struct Guest {
    child: Child,
    _known: Known,
    /// When the process was started, in nanoseconds of the host's monotonic clock.
    pub started_ns: u64,
    paths: VmPaths,
    folder: TempDir,
    agent: Client,
}

impl Guest {
    /// Starts a VM.
    pub fn start(options: &GuestOptions, console: &Console) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("cofferdam-")
            .tempdir()
            .context("cannot make a temporary folder: set TMPDIR to one that can be written")?;
        let root = options.root.as_deref().unwrap_or(folder.path());
        let name: VmName = options.name.parse()?;
        let paths = RuntimeRoot::new(root).paths(&name);
        let mut command = Command::new(&options.program);
        command
            .env(ROOT_VARIABLE, root)
            .arg("run")
            .args(["--name", options.name])
            .args(&options.arguments)
            .stdin(Stdio::null())
            .stderr(File::create(folder.path().join("errors")).context("temporary folder")?);
        match &options.snapshot {
            Some(dir) => command.arg("--snapshot").arg(dir),
            None => command
                .arg("--kernel")
                .arg(options.image("vmlinux")?)
                .arg("--initrd")
                .arg(options.image(options.initrd)?),
        };
        match console {
            Console::File => {
                let mut serial = std::ffi::OsString::from("file=");
                serial.push(folder.path().join("console"));
                command.arg("--serial").arg(serial).stdout(Stdio::null());
            }
            Console::Pipe => {
                command.args(["--serial", "stdio"]).stdout(Stdio::piped());
            }
        }
        let started_ns = monotonic_ns();
        let (child, known) = together::spawn(&mut command, folder.path())
            .with_context(|| format!("cannot start {}", options.program.display()))?;
        let agent = Client::unix(paths.agent_socket());
        Ok(Self {
            child,
            _known: known,
            started_ns,
            paths,
            folder,
            agent,
        })
    }

    /// Starts a VM and waits for its agent.
    pub fn boot(options: &GuestOptions, limit: Duration) -> anyhow::Result<Self> {
        let mut guest = Self::start(options, &Console::File)?;
        guest.wait_for_agent(limit)?;
        Ok(guest)
    }

    /// Waits until the agent answers.
    pub fn wait_for_agent(&mut self, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        while !self.paths.agent_socket().exists() {
            if self.child.try_wait()?.is_some() {
                bail!("the VM ended at once{}", self.last_words());
            }
            if Instant::now() >= deadline {
                bail!(
                    "the VM has no agent socket after {limit:?}{}",
                    self.last_words()
                );
            }
            std::thread::sleep(POLL);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if let Err(error) = self.agent.hello(left) {
            bail!(
                "the guest's agent did not answer: {error}{}",
                self.last_words()
            );
        }
        Ok(())
    }

    /// The guest's agent.
    pub fn agent(&mut self) -> &mut Client {
        &mut self.agent
    }

    /// Number of the VM's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A new connection to the VM process.
    pub fn control(&self) -> anyhow::Result<ControlClient> {
        ControlClient::connect(&self.paths.control_socket())
    }

    /// Standard output of the process, once; only with [`Console::Pipe`].
    pub fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Where the VM's sockets are.
    pub fn paths(&self) -> &VmPaths {
        &self.paths
    }

    /// What the guest wrote to its console, as far as it is text; only with [`Console::File`].
    pub fn console(&self) -> String {
        self.console_from(0)
    }

    /// The same from byte `from` on.
    pub fn console_from(&self, from: u64) -> String {
        text_from(&self.console_file(), from)
    }

    /// The file with it.
    pub fn console_file(&self) -> PathBuf {
        self.folder.path().join("console")
    }

    /// How many bytes the guest wrote to its console; only with [`Console::File`].
    pub fn console_bytes(&self) -> u64 {
        let console = std::fs::metadata(self.console_file());
        console.map_or(0, |console| console.len())
    }

    /// Removes what the guest has written to its console so far; behind which byte what it writes
    /// from now on will be. Only with [`Console::File`].
    pub fn cut_console(&self) -> u64 {
        cut(&self.console_file())
    }

    /// Runs a command in the guest and returns its output; it must succeed.
    pub fn run(&mut self, argv: &[&str]) -> anyhow::Result<String> {
        let words = argv.join(" ");
        let result = self.agent.run(argv).map_err(|error| {
            let more = match error {
                ClientError::Time(..) => self.what_it_does(),
                _ => String::new(),
            };
            anyhow!("the guest's agent could not run `{words}`: {error}{more}")
        })?;
        if !result.success() {
            bail!(
                "`{words}` failed in the guest ({:?}): {}{}",
                result.end,
                result.stdout_text().trim(),
                String::from_utf8_lossy(&result.stderr).trim()
            );
        }
        Ok(result.stdout_text())
    }

    /// Runs a shell command in the guest; see [`Guest::run`].
    pub fn shell(&mut self, script: &str) -> anyhow::Result<String> {
        self.run(&["sh", "-c", script])
    }

    /// Waits until the process ends by itself.
    pub fn wait_for_end(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("the VM still runs after {limit:?}{}", self.last_words());
            }
            std::thread::sleep(POLL);
        }
    }

    /// What is known about a VM that went wrong: its errors and the end of its console.
    pub fn last_words(&self) -> String {
        let errors = std::fs::read_to_string(self.folder.path().join("errors")).unwrap_or_default();
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        let tail = &lines[lines.len().saturating_sub(CONSOLE_TAIL_LINES)..];
        format!(
            "\n{}\n--- end of the console:\n{}\n",
            errors.trim(),
            tail.join("\n")
        )
    }

    /// Of one that does not answer: its last words, and what its threads are at.
    pub fn what_it_does(&self) -> String {
        let threads = stuck::what_it_does(self.child.id(), &self.paths.control_socket());
        self.last_words() + &threads
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        child::end(&mut self.child, END_TIME);
    }
}

/// What is in a file from byte `from` on, as far as it is text; nothing of one that cannot be read.
pub fn text_from(file: &Path, from: u64) -> String {
    let read = || {
        let mut file = File::open(file)?;
        file.seek(SeekFrom::Start(from))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        std::io::Result::Ok(text)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// Removes what is in a file that another process writes at its end (`O_APPEND`, open(2)), and
/// gives its length then, in bytes: that of before if it cannot be cut.
fn cut(file: &Path) -> u64 {
    let cut = OpenOptions::new().write(true).open(file).and_then(|file| {
        file.set_len(0)?;
        Ok(0)
    });
    cut.unwrap_or_else(|_| std::fs::metadata(file).map_or(0, |file| file.len()))
}

/// The guest, for the report.
pub fn guest_facts(guest: &mut Guest) -> anyhow::Result<GuestFacts> {
    let config = guest.control()?.status()?.config;
    let agent = guest
        .agent()
        .agent()
        .context("the guest's agent is not connected")?;
    Ok(GuestFacts {
        kernel: agent.kernel.clone(),
        vcpus: config.vcpus,
        mem_mib: config.memory_mib,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_console_that_is_cut_has_only_what_is_written_from_then_on() {
        let folder = tempfile::tempdir().unwrap();
        let console = folder.path().join("console");
        // As the VM's process opens it.
        let mut options = OpenOptions::new();
        let mut writes = options.create(true).append(true).open(&console).unwrap();
        writes.write_all(b"of the run before").unwrap();
        let from = cut(&console);
        writes.write_all(b"of this run").unwrap();
        assert_eq!(text_from(&console, from), "of this run");
        assert_eq!(std::fs::metadata(&console).unwrap().len(), 11);
        assert_eq!(cut(&folder.path().join("none")), 0);
    }
}
