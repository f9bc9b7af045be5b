//! One running QEMU: started, found again by a later command, looked into when it hangs, and ended.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use super::machine::{
    AGENT_SOCKET, CONSOLE_LOG, DISK, MONITOR_SOCKET, Machine, QEMU_LOG, TEST_SOCKET,
};

const PID_FILE: &str = "pid";
/// There while an instance is being ended on purpose.
const STOPPING: &str = "stopping";
/// How long QEMU may take to end when asked to.
const END_LIMIT: Duration = Duration::from_secs(5);
/// Lines of a log that are shown when something went wrong.
const LOG_TAIL: usize = 12;

/// Waits for the right to use `path`, which is made, and says `waiting` if another process has it;
/// given back when the file is dropped.
pub fn lock(path: &Path, waiting: Option<&str>) -> anyhow::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let take = |how| rustix::io::retry_on_intr(|| rustix::fs::flock(&file, how));
    let taken = match take(FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => {
            if let Some(waiting) = waiting {
                eprintln!("lab: {waiting}");
            }
            take(FlockOperation::LockExclusive)
        }
        other => other,
    };
    taken.with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// A running QEMU and its directory.
pub struct Instance {
    directory: PathBuf,
    pid: Pid,
    /// Absent when an earlier command started it, or when it shall stay after this one.
    child: Option<Child>,
    /// Ended and removed on drop.
    temporary: bool,
}

impl Instance {
    /// Starts QEMU in `directory`, which is made new. It ends on drop unless [`Instance::keep`] was
    /// called; with `bound` also when this process is killed.
    pub fn start(directory: &Path, machine: &Machine, bound: bool) -> anyhow::Result<Self> {
        if directory.exists() {
            fs::remove_dir_all(directory)
                .with_context(|| format!("cannot remove {}", directory.display()))?;
        }
        for dir in [directory, &machine.out] {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        for file in [&machine.kernel, &machine.initrd] {
            if !file.is_file() {
                bail!("{} is missing: run `cargo xtask images`", file.display());
            }
        }
        let (disk, bytes) = DISK;
        File::create(directory.join(disk))?.set_len(bytes)?;
        let log = File::create(directory.join(QEMU_LOG))?;
        let mut command = Command::new(&machine.qemu);
        command
            .args(machine.arguments())
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C on the terminal is ours to handle.
            .process_group(0);
        if bound {
            // SAFETY: between fork and exec only one prctl(2) is called, which is
            // async-signal-safe.
            unsafe {
                command.pre_exec(|| {
                    Ok(rustix::process::set_parent_process_death_signal(Some(
                        Signal::KILL,
                    ))?)
                });
            }
        }
        let child = command.spawn().with_context(|| {
            format!(
                "cannot start {}: run `cargo xtask setup`",
                machine.qemu.display()
            )
        })?;
        let pid = Pid::from_child(&child);
        fs::write(directory.join(PID_FILE), pid.as_raw_nonzero().to_string())?;
        Ok(Self {
            directory: directory.to_owned(),
            pid,
            child: Some(child),
            temporary: true,
        })
    }

    /// The instance that an earlier command left running in `directory`.
    pub fn find(directory: &Path) -> Option<Self> {
        let pid = fs::read_to_string(directory.join(PID_FILE)).ok()?;
        let pid = Pid::from_raw(pid.trim().parse().ok()?)?;
        // The number may have gone to another process since: QEMU's working directory is the
        // instance's.
        let cwd = fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).ok()?;
        let same = cwd == directory.canonicalize().ok()?;
        same.then(|| Self {
            directory: directory.to_owned(),
            pid,
            child: None,
            temporary: false,
        })
    }

    /// Where its files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Process id of QEMU.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Whether QEMU still runs.
    pub fn alive(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => Self::find(&self.directory).is_some(),
        }
    }

    /// Connects to one of its sockets.
    fn connect(directory: &Path, socket: &str) -> std::io::Result<UnixStream> {
        // A socket address holds 108 bytes, a path more: go through the descriptor.
        let directory = File::open(directory)?;
        UnixStream::connect(format!("/proc/self/fd/{}/{socket}", directory.as_raw_fd()))
    }

    /// Connects to the agent's channel.
    pub fn connect_agent(directory: &Path) -> std::io::Result<UnixStream> {
        Self::connect(directory, AGENT_SOCKET)
    }

    /// Connects to QEMU's test port.
    pub fn connect_test(directory: &Path) -> std::io::Result<UnixStream> {
        Self::connect(directory, TEST_SOCKET)
    }

    /// Why it does not do what it should: last lines of its logs.
    pub fn last_words(&self) -> String {
        let tail = |name: &str| {
            let bytes = fs::read(self.directory.join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let lines: Vec<&str> = text
                .lines()
                .map(str::trim_end)
                .filter(|line| !line.is_empty() && !line.contains("TCG doesn't support"))
                .collect();
            let from = lines.len().saturating_sub(LOG_TAIL);
            lines[from..]
                .iter()
                .map(|line| format!("  {name}: {line}\n"))
                .collect::<String>()
        };
        tail(CONSOLE_LOG) + &tail(QEMU_LOG)
    }

    /// Saves the logs and what the processors are doing below `into`, to find out later why it
    /// hung.
    pub fn save_state(&self, into: &Path) -> std::io::Result<()> {
        fs::create_dir_all(into)?;
        for name in [CONSOLE_LOG, QEMU_LOG] {
            // One of them may not have been made yet.
            if let Err(error) = fs::copy(self.directory.join(name), into.join(name)) {
                fs::write(into.join(name), format!("not saved: {error}\n"))?;
            }
        }
        // Twice, to see what moves.
        let mut text = String::new();
        for _ in 0..2 {
            text += &self
                .ask_monitor(&[
                    "info status",
                    "info registers -a",
                    "info lapic 0",
                    "info lapic 1",
                    "info irq",
                ])
                .unwrap_or_else(|error| format!("the monitor does not answer: {error}\n"));
        }
        fs::write(into.join("processors.txt"), text)
    }

    fn ask_monitor(&self, lines: &[&str]) -> std::io::Result<String> {
        let mut stream = Self::connect(&self.directory, MONITOR_SOCKET)?;
        stream.set_read_timeout(Some(Duration::from_millis(500)))?;
        stream.set_write_timeout(Some(Duration::from_millis(500)))?;
        for line in lines {
            stream.write_all(format!("{line}\n").as_bytes())?;
        }
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        // The monitor does not say where an answer ends: it ends when nothing more comes.
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            answer.extend_from_slice(&buffer[..count]);
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Tells whoever runs a command in this instance that it is about to be ended on purpose.
    pub fn announce_stop(&self) -> anyhow::Result<()> {
        let path = self.directory.join(STOPPING);
        fs::write(&path, "").with_context(|| format!("cannot write {}", path.display()))
    }

    /// Whether the instance in `directory` was, or is being, ended on purpose.
    pub fn was_stopped(directory: &Path) -> bool {
        !directory.exists() || directory.join(STOPPING).exists()
    }

    /// Ends QEMU; L1 has nothing on disk that could be lost.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.end()
    }

    /// Leaves QEMU running for later commands.
    pub fn keep(mut self) {
        self.temporary = false;
    }

    fn end(&mut self) -> anyhow::Result<()> {
        self.temporary = false;
        for signal in [Signal::TERM, Signal::KILL] {
            if !self.alive() {
                break;
            }
            // It may end in this very moment: then there is nothing to signal.
            if let Err(error) = rustix::process::kill_process(self.pid, signal)
                && error != Errno::SRCH
            {
                bail!("cannot end QEMU (process {}): {error}", self.pid());
            }
            let until = Instant::now() + END_LIMIT;
            while self.alive() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        fs::remove_dir_all(&self.directory)
            .with_context(|| format!("cannot remove {}", self.directory.display()))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if self.temporary
            && let Err(error) = self.end()
        {
            eprintln!("lab: {error:#}");
        }
    }
}
