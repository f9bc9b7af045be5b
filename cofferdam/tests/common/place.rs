//! A folder for a test's VMs, and the program run in it.

use std::fs;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{EM_X86_64, IDLE_CODE, elf};

/// How long a `run` that must end may take.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A folder for everything that a test's VMs make.
pub struct Place {
    pub folder: TempDir,
}

impl Place {
    pub fn new() -> Self {
        let place = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(place.path("run")).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file with these bytes.
    pub fn file(&self, name: &str, bytes: &[u8]) -> String {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name).display().to_string()
    }

    /// A kernel that starts and then does nothing for ever.
    pub fn idle_kernel(&self) -> String {
        self.file("idle", &elf(EM_X86_64, &IDLE_CODE))
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam"));
        command
            .env("COFFERDAM_RUNTIME_DIR", self.path("run"))
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// `cofferdam run` with these words, to its end.
    pub fn run(&self, words: &str) -> Output {
        let words = words.split_whitespace();
        finish(self.command().arg("run").args(words).spawn().unwrap())
    }

    /// `cofferdam run` with these words must fail with one line that says all of `says`.
    #[track_caller]
    pub fn refused(&self, words: &str, says: &[&str]) {
        let output = self.run(words);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(
            matches!(output.status.code(), Some(1 | 2)),
            "{words}: {:?}: {error}",
            output.status
        );
        for word in says {
            assert!(error.contains(word), "{words}: no {word:?} in: {error}");
        }
        assert_eq!(error.lines().count(), 1, "{words}: {error}");
        assert!(error.starts_with("cofferdam: "), "{words}: {error}");
        self.assert_empty();
    }

    /// Nothing is left in the runtime folder.
    #[track_caller]
    pub fn assert_empty(&self) {
        let left = self.left();
        assert!(left.is_empty(), "left behind: {left:?}");
    }

    /// What is in the runtime folder.
    pub fn left(&self) -> Vec<String> {
        fs::read_dir(self.path("run"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    /// Starts a VM that does nothing and waits until it runs.
    pub fn idle(&self, words: &str) -> Child {
        self.start("idle", &self.idle_kernel(), words)
    }

    /// Starts a VM called `name` and waits until it runs.
    pub fn start(&self, name: &str, kernel: &str, words: &str) -> Child {
        let mut child = self
            .command()
            .args(["run", "--name", name, "--kernel", kernel])
            .args(words.split_whitespace())
            .spawn()
            .unwrap();
        let socket = self.path(&format!("run/{name}/control.sock"));
        let deadline = Instant::now() + LIMIT;
        while UnixStream::connect(&socket).is_err() {
            if let Some(status) = child.try_wait().unwrap() {
                let output = child.wait_with_output().unwrap();
                panic!("{status}: {}", String::from_utf8_lossy(&output.stderr));
            }
            assert!(Instant::now() < deadline, "no control socket");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.wait_for(name);
        child
    }

    /// Waits until the VM called `name`, which was started, runs.
    pub fn wait_for(&self, name: &str) {
        let socket = self.path(&format!("run/{name}/control.sock"));
        let deadline = Instant::now() + LIMIT;
        // The control socket is there before the vCPUs are.
        while UnixStream::connect(&socket).is_err() || self.status_of(name)["state"] == "starting" {
            assert!(Instant::now() < deadline, "it does not run");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Runs a command to its end; it must succeed.
    #[track_caller]
    pub fn ask(&self, words: &str) -> String {
        let output = finish(self.command().args(words.split(' ')).spawn().unwrap());
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command to its end; it must fail with one line that says this.
    #[track_caller]
    pub fn ask_refused(&self, words: &str, says: &str) {
        let output = finish(self.command().args(words.split(' ')).spawn().unwrap());
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{words}");
        assert!(error.contains(says), "{words}: {error}");
        assert_eq!(error.trim_end().lines().count(), 1, "{words}: {error}");
    }

    pub fn status(&self) -> serde_json::Value {
        self.status_of("idle")
    }

    pub fn status_of(&self, name: &str) -> serde_json::Value {
        serde_json::from_str(&self.ask(&format!("status {name} --json"))).unwrap()
    }
}

/// Waits for a process that must end by itself.
#[track_caller]
pub fn finish(mut child: Child) -> Output {
    let deadline = Instant::now() + LIMIT;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() >= deadline {
            child.kill().unwrap();
            let output = child.wait_with_output().unwrap();
            panic!("still runs: {}", String::from_utf8_lossy(&output.stderr));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

pub fn signal(child: &Child, signal: libc::c_int) {
    // SAFETY: a plain system call; the child was not waited for, so its number is its own.
    let sent = unsafe { libc::kill(child.id().cast_signed(), signal) };
    assert_eq!(sent, 0);
}

/// Ends a VM and looks whether anything is left but the folders of the `others`.
#[track_caller]
pub fn end(place: &Place, vm: Child, others: &[&str]) {
    signal(&vm, libc::SIGTERM);
    assert_eq!(finish(vm).status.signal(), Some(libc::SIGTERM));
    assert_eq!(place.left(), others);
}
