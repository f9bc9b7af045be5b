//! The folder of a running VM or device host: where its sockets are, and that it is the only one of
//! its name.
//!
//! ```text
//! ${COFFERDAM_RUNTIME_DIR:-/run/cofferdam}/   flock while a VM comes or goes
//! └── NAME/
//!     ├── pid            flock for as long as the process lives; holds its number
//!     ├── control.sock   requests to the VM process (see `control`)
//!     └── agent.sock     the guest agent
//! .devices/              the same for device hosts; no VM is called that
//! └── NAME/
//!     ├── pid, control.sock
//!     └── device.sock    guests attach here (see `device`)
//! ```
//!
//! A process that dies cannot keep a lock, so a folder whose `pid` is not locked is left over from
//! a dead one, whatever number is in it. The lock on the root makes looking and taking one step.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::fs::{FlockOperation, flock};

use crate::options::{MAX_SOCKET_PATH_BYTES, VmName};

/// Environment variable that names another root.
pub const ROOT_VARIABLE: &str = "COFFERDAM_RUNTIME_DIR";

/// Root when the variable is not set.
const DEFAULT_ROOT: &str = "/run/cofferdam";

/// The files that a VM's or device host's folder can hold. Nothing else is ever removed.
const FILES: [&str; 4] = ["control.sock", "agent.sock", "device.sock", "pid"];

/// Those of them that are sockets.
const SOCKETS: [&str; 3] = ["control.sock", "agent.sock", "device.sock"];

/// The folder of device hosts. No VM's name begins like this.
const DEVICES: &str = ".devices";

/// How long another process may keep the root's lock.
const LOCK_TIME: Duration = Duration::from_secs(10);

/// Between two looks at it.
const LOCK_POLL: Duration = Duration::from_millis(2);

/// The folder that holds one folder for each running VM, or for each running device host.
#[derive(Debug, Clone)]
pub struct RuntimeRoot {
    path: PathBuf,
    words: &'static Words,
}

/// How a person is told of what is in a root.
#[derive(Debug)]
struct Words {
    what: &'static str,
    named: &'static str,
    stop: &'static str,
    list: &'static str,
    start: &'static str,
}

const VMS: Words = Words {
    what: "VM",
    named: "another --name",
    stop: "cofferdam stop",
    list: "cofferdam list",
    start: "cofferdam run",
};

const DEVICE_HOSTS: Words = Words {
    what: "device host",
    named: "another name",
    stop: "cofferdam device stop",
    list: "cofferdam device list",
    start: "cofferdam device serve",
};

/// Where the sockets of a VM or device host are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmPaths {
    /// The VM's folder.
    pub dir: PathBuf,
}

impl VmPaths {
    /// Socket of the VM process.
    pub fn control_socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// Socket of the guest agent.
    pub fn agent_socket(&self) -> PathBuf {
        self.dir.join("agent.sock")
    }

    /// Socket at which guests attach to a device host.
    pub fn device_socket(&self) -> PathBuf {
        self.dir.join("device.sock")
    }

    /// File with the number of the process.
    fn pid_file(&self) -> PathBuf {
        self.dir.join("pid")
    }
}

/// A VM that runs now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningVm {
    /// Its name.
    pub name: VmName,
    /// Number of its process; `None` when it has only just begun.
    pub pid: Option<u32>,
    /// Its sockets.
    pub paths: VmPaths,
}

impl RuntimeRoot {
    /// The root that the environment names.
    pub fn from_environment() -> Self {
        let named = std::env::var_os(ROOT_VARIABLE).filter(|value| !value.is_empty());
        Self::new(named.map_or_else(|| PathBuf::from(DEFAULT_ROOT), PathBuf::from))
    }

    /// The root at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            words: &VMS,
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The root of the device hosts that belong to this root of VMs.
    pub fn devices(&self) -> Self {
        Self {
            path: self.path.join(DEVICES),
            words: &DEVICE_HOSTS,
        }
    }

    /// Where the sockets of `name` are, if it runs.
    pub fn paths(&self, name: &VmName) -> VmPaths {
        VmPaths {
            dir: self.path.join(name.as_str()),
        }
    }

    /// Takes the name for this process, and clears away what dead processes left in the root.
    pub fn claim(&self, name: &VmName) -> anyhow::Result<VmDir> {
        let paths = self.paths(name);
        let longest = paths.control_socket();
        ensure!(
            longest.as_os_str().len() <= MAX_SOCKET_PATH_BYTES,
            "{} is too long for a socket: choose a shorter {ROOT_VARIABLE} or {}",
            longest.display(),
            self.words.named
        );
        create_dir(&self.path).with_context(|| {
            format!(
                "cannot create {}: run as root or set {ROOT_VARIABLE} to a folder of yours",
                self.path.display()
            )
        })?;
        let root_lock = self.lock()?;
        self.clear_leftovers()?;
        create_dir(&paths.dir).with_context(|| {
            format!(
                "cannot create {}: run as root or set {ROOT_VARIABLE} to a folder of yours",
                paths.dir.display()
            )
        })?;
        let mut pid_file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(paths.pid_file())
            .with_context(|| format!("cannot create {}", paths.pid_file().display()))?;
        if flock(&pid_file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let owner =
                read_pid(&mut pid_file).map_or_else(String::new, |pid| format!(" (process {pid})"));
            bail!(
                "a {} named \"{name}\" is running{owner}: choose {}, or end it with `{} {name}`",
                self.words.what,
                self.words.named,
                self.words.stop
            );
        }
        let dir = VmDir {
            root: self.clone(),
            paths,
            pid_file,
            stays: false,
        };
        dir.write_pid()?;
        drop(root_lock);
        Ok(dir)
    }

    /// All VMs that run now, by name.
    pub fn running(&self) -> anyhow::Result<Vec<RunningVm>> {
        if !self.path.exists() {
            return Ok(Vec::new());
        }
        let _root_lock = self.lock()?;
        let mut running = Vec::new();
        for (name, paths) in self.folders()? {
            running.extend(who_has(name, paths));
        }
        running.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(running)
    }

    /// The VM called `name`, if it runs: the others are not looked at.
    pub fn running_as(&self, name: &VmName) -> anyhow::Result<Option<RunningVm>> {
        if !self.path.exists() {
            return Ok(None);
        }
        let _root_lock = self.lock()?;
        Ok(who_has(name.clone(), self.paths(name)))
    }

    /// The running VM called `name`, or the only one there is when no name is given.
    pub fn find(&self, name: Option<&VmName>) -> anyhow::Result<RunningVm> {
        if let Some(name) = name {
            return self.running_as(name)?.with_context(|| {
                let Words { what, list, .. } = self.words;
                format!("no {what} named \"{name}\" is running: see `{list}`")
            });
        }
        let mut running = self.running()?;
        match running.len() {
            0 | 1 => running.pop().with_context(|| {
                let Words { what, start, .. } = self.words;
                format!("no {what} is running: start one with `{start}`, see its --help")
            }),
            count => {
                let Words { what, list, .. } = self.words;
                bail!("{count} {what}s are running: name one, see `{list}`")
            }
        }
    }

    /// Folders in the root that are named as VMs are.
    fn folders(&self) -> anyhow::Result<Vec<(VmName, VmPaths)>> {
        let entries = self
            .path
            .read_dir()
            .with_context(|| format!("cannot read {}", self.path.display()))?;
        Ok(entries
            .filter_map(|entry| {
                let name: VmName = entry.ok()?.file_name().to_str()?.parse().ok()?;
                let paths = self.paths(&name);
                Some((name, paths))
            })
            .collect())
    }

    /// Removes what dead processes left.
    pub fn clear(&self) -> anyhow::Result<()> {
        let _root_lock = self.lock()?;
        self.clear_leftovers()
    }

    /// Removes the folders of dead processes. The caller holds the root's lock.
    fn clear_leftovers(&self) -> anyhow::Result<()> {
        for (name, paths) in self.folders()? {
            let Ok(pid_file) = File::open(paths.pid_file()) else {
                continue;
            };
            if flock(&pid_file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                tracing::info!(%name, "removing what a dead process left");
                remove(&paths);
            }
        }
        Ok(())
    }

    /// Waits until no other process takes or leaves a name, and keeps others from it.
    fn lock(&self) -> anyhow::Result<File> {
        lock_folder(&self.path)
    }
}

/// Waits until no other process has the folder's lock, and keeps others from it.
pub(crate) fn lock_folder(path: &Path) -> anyhow::Result<File> {
    let folder = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let deadline = Instant::now() + LOCK_TIME;
    while let Err(error) = flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        // Whoever comes or goes just now may be stopped, and is not waited for without end.
        let waits = error == rustix::io::Errno::WOULDBLOCK && Instant::now() < deadline;
        if !waits {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
        std::thread::sleep(LOCK_POLL);
    }
    Ok(folder)
}

/// The folder of this process's VM. Dropping it removes the folder.
#[derive(Debug)]
pub struct VmDir {
    root: RuntimeRoot,
    paths: VmPaths,
    pid_file: File,
    stays: bool,
}

impl VmDir {
    /// The process cannot remove the folder: its sockets go at its end, and the rest when the next
    /// process of the root begins, or with who has waited for the end.
    pub fn stays(&mut self) {
        self.stays = true;
    }

    /// Where the sockets belong.
    pub fn paths(&self) -> &VmPaths {
        &self.paths
    }

    fn write_pid(&self) -> anyhow::Result<()> {
        let mut file = &self.pid_file;
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .with_context(|| format!("cannot write {}", self.paths.pid_file().display()))
    }
}

impl Drop for VmDir {
    fn drop(&mut self) {
        // Without the root's lock a process that starts now could lose its files to us.
        match self.root.lock() {
            Ok(_) if self.stays => remove_files(&self.paths, &SOCKETS),
            Ok(_root_lock) => remove(&self.paths),
            Err(error) => tracing::warn!("{} stays behind: {error:#}", self.paths.dir.display()),
        }
    }
}

/// Creates a folder that only its owner may enter, with the folders above it; one that is there
/// already is left as it is.
pub(crate) fn create_dir(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Removes a VM's folder with everything that belongs to it.
fn remove(paths: &VmPaths) {
    remove_files(paths, &FILES);
    if let Err(error) = std::fs::remove_dir(&paths.dir) {
        tracing::warn!("{} stays behind: {error}", paths.dir.display());
    }
}

fn remove_files(paths: &VmPaths, files: &[&str]) {
    for file in files {
        let path = paths.dir.join(file);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!("{} stays behind: {error}", path.display());
            }
            _ => {}
        }
    }
}

/// The number in a `pid` file.
fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// The process that has the folder of `name`, which is at `paths`, if one has.
fn who_has(name: VmName, paths: VmPaths) -> Option<RunningVm> {
    let mut pid_file = File::open(paths.pid_file()).ok()?;
    let free = flock(&pid_file, FlockOperation::NonBlockingLockShared).is_ok();
    (!free).then(|| RunningVm {
        name,
        pid: read_pid(&mut pid_file),
        paths,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> VmName {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_is_taken_once_and_free_again_afterwards() {
        let temporary = tempfile::tempdir().unwrap();
        let root = RuntimeRoot::new(temporary.path().join("run"));
        let first = root.claim(&name("a")).unwrap();
        let refused = root.claim(&name("a")).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("process {}", std::process::id())),
            "{refused}"
        );
        let other = root.claim(&name("b")).unwrap();
        assert_eq!(root.running().unwrap().len(), 2);
        assert!(root.find(None).is_err());
        for named in ["a", "b"].map(name) {
            let pid = root.running_as(&named).unwrap().unwrap().pid;
            assert_eq!(pid, Some(std::process::id()));
        }
        drop(other);
        assert!(root.running_as(&name("b")).unwrap().is_none());
        assert!(root.find(Some(&name("b"))).is_err());
        assert_eq!(root.find(None).unwrap().name, name("a"));
        drop(first);
        assert!(root.running().unwrap().is_empty());
        assert_eq!(temporary.path().join("run").read_dir().unwrap().count(), 0);
        root.claim(&name("a")).unwrap();
    }

    #[test]
    fn what_a_dead_process_left_is_cleared_away() {
        let temporary = tempfile::tempdir().unwrap();
        let root = RuntimeRoot::new(temporary.path());
        for dead in ["same", "other"] {
            let paths = root.paths(&name(dead));
            std::fs::create_dir(&paths.dir).unwrap();
            std::fs::write(paths.pid_file(), "1\n").unwrap();
            std::os::unix::net::UnixListener::bind(paths.control_socket()).unwrap();
        }
        assert!(root.running().unwrap().is_empty());
        let claimed = root.claim(&name("same")).unwrap();
        assert!(!claimed.paths().control_socket().exists());
        assert!(!root.paths(&name("other")).dir.exists());
    }

    #[test]
    fn files_of_others_in_the_folder_are_kept() {
        let temporary = tempfile::tempdir().unwrap();
        let root = RuntimeRoot::new(temporary.path());
        std::fs::create_dir(temporary.path().join("theirs")).unwrap();
        std::fs::write(temporary.path().join("theirs/file"), "x").unwrap();
        drop(root.claim(&name("mine")).unwrap());
        assert!(temporary.path().join("theirs/file").exists());
    }

    #[test]
    fn device_hosts_have_names_of_their_own() {
        let temporary = tempfile::tempdir().unwrap();
        let root = RuntimeRoot::new(temporary.path());
        let vm = root.claim(&name("a")).unwrap();
        let device = root.devices().claim(&name("a")).unwrap();
        std::os::unix::net::UnixListener::bind(device.paths().device_socket()).unwrap();
        assert_eq!(root.running().unwrap().len(), 1);
        let again = root.devices().claim(&name("a")).unwrap_err().to_string();
        assert!(
            again.contains("device host named") && again.contains("device stop a"),
            "{again}"
        );
        drop(device);
        assert!(root.devices().running().unwrap().is_empty());
        let gone = root.devices().find(Some(&name("a"))).unwrap_err();
        assert!(gone.to_string().contains("device list"), "{gone}");
        assert_eq!(root.devices().path.read_dir().unwrap().count(), 0);
        drop(vm);
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused_before_anything_is_made() {
        let temporary = tempfile::tempdir().unwrap();
        let long = temporary.path().join("x".repeat(100));
        let error = RuntimeRoot::new(&long)
            .claim(&name("a"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("too long"), "{error}");
        assert!(!long.exists());
    }
}
