//! The processes of a measurement: a service and its guests, in a folder of their own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use tempfile::TempDir;

use super::client::Client;

/// How long something may take to start or to end.
const LIMIT: Duration = Duration::from_secs(60);

/// Between two looks whether it has.
const POLL: Duration = Duration::from_millis(5);

/// Where the idle kernel is in the guest's memory.
const KERNEL_AT: u64 = 16 << 20;

/// A service, its guests and where they are. All end when it is dropped.
pub struct Place {
    program: PathBuf,
    folder: TempDir,
    service: Option<Child>,
    guests: Vec<(String, Child)>,
}

/// Memory of the service at one time (proc_pid_status(5)), in KiB.
#[derive(Debug, Clone, Serialize)]
pub struct Memory {
    /// When.
    pub when: String,
    /// Of its own.
    pub anon_kib: u64,
    /// Pages of files: its program and libraries, shared with all processes that have them.
    pub file_kib: u64,
    /// Both, and memory that is shared otherwise.
    pub rss_kib: u64,
    /// The most of it since [`Place::forget_peak`].
    pub peak_kib: u64,
}

impl Place {
    /// A folder, in which nothing runs yet.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(program: &Path) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let kernel = folder.path().join("kernel");
        std::fs::write(&kernel, idle_kernel()).with_context(|| kernel.display().to_string())?;
        Ok(Self {
            program: program.to_owned(),
            folder,
            service: None,
            guests: Vec::new(),
        })
    }

    /// The program, which finds what runs here.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .env("COFFERDAM_RUNTIME_DIR", self.folder.path().join("run"))
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    /// The service's socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("run/service.sock")
    }

    /// Starts the service and waits until it answers.
    ///
    /// # Errors
    /// It does not.
    pub fn serve(&mut self) -> anyhow::Result<()> {
        let mut command = self.command();
        command.arg("serve").stdout(Stdio::null());
        let child = command.spawn().context("cannot start the service")?;
        self.service = Some(child);
        let socket = self.socket();
        wait_for("the service", || Client::connect(&socket).is_ok())
    }

    /// Starts a guest that does nothing and waits until it runs.
    ///
    /// # Errors
    /// It does not.
    pub fn start_guest(&mut self, name: &str) -> anyhow::Result<()> {
        let mut command = self.command();
        command.args(["run", "--name", name, "--memory", "64M", "--kernel"]);
        command.arg(self.folder.path().join("kernel"));
        let log = self.folder.path().join(format!("{name}.log"));
        command
            .arg("--serial")
            .arg(format!("file={}", log.display()));
        let child = command.spawn().context("cannot start a guest")?;
        self.guests.push((name.to_owned(), child));
        let path = format!("/v1/guests/{name}");
        wait_for(name, || {
            let status = Client::connect(&self.socket()).and_then(|mut client| client.get(&path));
            status.is_ok_and(|status| {
                let status: Option<serde_json::Value> = serde_json::from_slice(&status).ok();
                status.is_some_and(|status| status["state"] == "running")
            })
        })
    }

    /// Ends a guest.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn end_guest(&mut self, name: &str) -> anyhow::Result<()> {
        let found = self.guests.iter().position(|(other, _)| other == name);
        let (_, mut guest) = self
            .guests
            .swap_remove(found.context("there is no such guest")?);
        ask_to_end(&guest)?;
        guest.wait().map(drop).context("a guest")
    }

    /// Memory of the service now.
    ///
    /// # Errors
    /// It is not there.
    pub fn memory(&self, when: &str) -> anyhow::Result<Memory> {
        let service = self.service.as_ref().context("there is no service")?;
        let path = format!("/proc/{}/status", service.id());
        let text = std::fs::read_to_string(&path).context("the service has ended")?;
        let of = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
            let kib = kib.and_then(|kib| kib.parse().ok());
            kib.with_context(|| format!("{path} has no {name}"))
        };
        Ok(Memory {
            when: when.to_owned(),
            anon_kib: of("RssAnon:")?,
            file_kib: of("RssFile:")?,
            rss_kib: of("VmRSS:")?,
            peak_kib: of("VmHWM:")?,
        })
    }

    /// Has the service's peak of memory begin anew (proc_pid_clear_refs(5)).
    ///
    /// # Errors
    /// The kernel does not do it.
    pub fn forget_peak(&self) -> anyhow::Result<()> {
        let service = self.service.as_ref().context("there is no service")?;
        let path = format!("/proc/{}/clear_refs", service.id());
        std::fs::write(&path, "5").with_context(|| path)
    }

    /// Ends all of it.
    ///
    /// # Errors
    /// The service does not end in order.
    pub fn end(mut self) -> anyhow::Result<()> {
        let mut service = self.service.take().context("there is no service")?;
        ask_to_end(&service)?;
        let mut status = None;
        wait_for("the service's end", || {
            status = service.try_wait().ok().flatten();
            status.is_some()
        })?;
        ensure!(
            status.is_some_and(|status| status.success()),
            "the service ended with {status:?}"
        );
        for (_, guest) in &self.guests {
            ask_to_end(guest)?;
        }
        for (_, guest) in &mut self.guests {
            guest.wait().context("a guest")?;
        }
        self.guests.clear();
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let guests = self.guests.iter_mut().map(|(_, guest)| guest);
        for child in guests.chain(&mut self.service) {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn ask_to_end(child: &Child) -> anyhow::Result<()> {
    let pid = Pid::from_raw(child.id().cast_signed()).context("a process without a number")?;
    kill_process(pid, Signal::TERM).context("a process cannot be asked to end")
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        if Instant::now() >= deadline {
            bail!("{what}: not within {LIMIT:?}");
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// An ELF executable of one segment that halts for ever (`hlt`, and a jump back to it).
fn idle_kernel() -> Vec<u8> {
    const CODE: [u8; 3] = [0xf4, 0xeb, 0xfd];
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2_u16, 62].map(u16::to_le_bytes).concat());
    file.extend(1_u32.to_le_bytes());
    file.extend([KERNEL_AT, 64, 0].map(u64::to_le_bytes).concat());
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    file.extend([1_u32, 5].map(u32::to_le_bytes).concat());
    let length = CODE.len() as u64;
    let segment = [64 + 56, KERNEL_AT, KERNEL_AT, length, length, 4096];
    file.extend(segment.map(u64::to_le_bytes).concat());
    file.extend(CODE);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_idle_kernel_is_an_executable_of_one_segment() {
        let file = idle_kernel();
        assert_eq!(file.len(), 64 + 56 + 3);
        let word = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
        // Entry, program headers; the segment's place in the file and in memory (elf(5)).
        assert_eq!((word(24), word(32)), (KERNEL_AT, 64));
        assert_eq!((word(64 + 8), word(64 + 24)), (120, KERNEL_AT));
        assert_eq!(file[120..], [0xf4, 0xeb, 0xfd]);
    }
}
