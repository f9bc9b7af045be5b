//! Which files a process may use (landlock(7)). What is open already stays so.
//!
//! | | a VM's process, a device host | with `--allow-dir DIR` | the service and its guests |
//! | --- | --- | --- | --- |
//! | read | all | `/proc`, `/sys`, the runtime folder, `DIR` | all |
//! | write, make, remove | all but folders of the system | the runtime folder, `DIR`; remove sockets of the command line | all |
//! | devices | `/dev/kvm`, `/dev/net/tun`, `/dev/vfio`, `/dev/null` | the same | all |
//! | run | nothing | nothing | this program and its loader |
//!
//! A snapshot, kept faults and a wire's socket are named while the guest runs, by whoever may use
//! the control socket, and may be anywhere: that is why a process without `--allow-dir` may write
//! so much.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, Scope,
};

/// The newest version of Landlock whose rights are looked at. On an older kernel as many as that
/// has are.
const VERSION: ABI = ABI::V6;

/// Folders in `/` that only the host's administrator writes in.
const OF_THE_SYSTEM: [&str; 13] = [
    "bin",
    "boot",
    "dev",
    "etc",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "lost+found",
    "proc",
    "sbin",
    "sys",
    "usr",
];

/// The one below them that all users write in.
const SHARED_MEMORY: &str = "/dev/shm";

/// Devices of VMs and NICs.
const DEVICES: [&str; 4] = ["/dev/kvm", "/dev/net/tun", "/dev/vfio", "/dev/null"];

/// What is read of the host: this process's memory, NICs and PCI functions, random numbers.
const OF_THE_HOST: [&str; 3] = ["/proc", "/sys", "/dev/urandom"];

/// Where a process has business with files, when it is set up.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// The folder of sockets of VMs and device hosts.
    pub runtime: PathBuf,
    /// Folders that a person lets it write in; all but those of the system if there are none.
    pub allowed: Vec<PathBuf>,
    /// Sockets that it made and removes at its end.
    pub sockets: Vec<PathBuf>,
    /// It is in a jail, where there is nothing but these.
    pub jailed: bool,
}

impl Places {
    /// The rules, for each thread to take on; `None` where this host's kernel has no Landlock.
    ///
    /// # Errors
    /// A folder is not there, or the kernel refuses the rules.
    pub fn ruleset(&self) -> anyhow::Result<Option<OwnedFd>> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let write = AccessFs::from_all(VERSION)
            & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev);
        let device = read | AccessFs::WriteFile | AccessFs::IoctlDev;
        let mut rules = Rules::default();
        rules.if_there(DEVICES, device);
        rules.if_there([&self.runtime], write);
        match self.allowed.is_empty() && !self.jailed {
            true => {
                rules.if_there(["/"], read);
                rules.if_there([SHARED_MEMORY], write);
                rules.if_there(writable_in_root()?, write);
            }
            false => {
                rules.if_there(OF_THE_HOST, read);
                for folder in &self.allowed {
                    rules.add(folder, write)?;
                }
            }
        }
        let folders = self.sockets.iter().filter_map(|path| path.parent());
        let folders = folders.map(|folder| match folder.as_os_str().is_empty() {
            true => Path::new("."),
            false => folder,
        });
        rules.if_there(folders, AccessFs::RemoveFile.into());
        let ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(VERSION))?
            .scope(Scope::AbstractUnixSocket)?;
        Ok(rules.given_to(ruleset)?)
    }
}

/// The rules of the service: nothing may be run but this program, and nothing else is limited.
///
/// # Errors
/// The kernel refuses the rules, or does not say which program this is.
pub fn only_this_program() -> anyhow::Result<Option<OwnedFd>> {
    let mut rules = Rules::default();
    rules.add(Path::new("/proc/self/exe"), AccessFs::Execute.into())?;
    if let Some(loader) = loader()? {
        rules.add(&loader, AccessFs::Execute.into())?;
    }
    // What a kernel with Landlock refuses to all that do not ask for it.
    rules.add(Path::new("/"), AccessFs::Refer.into())?;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::Execute | AccessFs::Refer)?;
    Ok(rules.given_to(ruleset)?)
}

/// Paths, with what may be done there and below.
#[derive(Default)]
struct Rules(Vec<(PathFd, BitFlags<AccessFs>)>);

impl Rules {
    fn add(&mut self, path: &Path, access: BitFlags<AccessFs>) -> anyhow::Result<()> {
        let opened = PathFd::new(path)?;
        self.push(path, opened, access);
        Ok(())
    }

    fn if_there<P: AsRef<Path>>(
        &mut self,
        paths: impl IntoIterator<Item = P>,
        access: BitFlags<AccessFs>,
    ) {
        for path in paths {
            let path = path.as_ref();
            if let Ok(opened) = PathFd::new(path) {
                self.push(path, opened, access);
            }
        }
    }

    fn push(&mut self, path: &Path, opened: PathFd, access: BitFlags<AccessFs>) {
        // Rights of folders are refused in a rule about a file.
        let access = match path.is_dir() {
            true => access,
            false => access & AccessFs::from_file(VERSION),
        };
        if !access.is_empty() {
            self.0.push((opened, access));
        }
    }

    fn given_to(self, ruleset: Ruleset) -> Result<Option<OwnedFd>, RulesetError> {
        let mut created = ruleset.create()?;
        for (opened, access) in self.0 {
            created = created.add_rule(PathBeneath::new(opened, access))?;
        }
        Ok(created.into())
    }
}

/// Folders in `/` that are not the system's.
fn writable_in_root() -> io::Result<Vec<PathBuf>> {
    let mut folders = Vec::new();
    for entry in std::fs::read_dir("/")? {
        let entry = entry?;
        let name = entry.file_name();
        // A link leads to what is in the list anyhow, or to what may not be.
        let is_link = entry.file_type()?.is_symlink();
        if !is_link && !OF_THE_SYSTEM.iter().any(|system| name == *system) {
            folders.push(entry.path());
        }
    }
    Ok(folders)
}

/// The program that the kernel starts to load this one; `None` if it needs none.
fn loader() -> io::Result<Option<PathBuf>> {
    // SAFETY: a number for a number (getauxval(3)).
    let base = unsafe { libc::getauxval(libc::AT_BASE) };
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let start = format!("{base:x}-");
    let mapped = maps.lines().find(|line| line.starts_with(&start));
    let path = mapped.and_then(|line| line.split_whitespace().nth(5));
    Ok(path.filter(|path| path.starts_with('/')).map(PathBuf::from))
}

/// The version of Landlock that this host's kernel has, if it has any and it is turned on
/// (`LANDLOCK_CREATE_RULESET_VERSION`, landlock_create_ruleset(2)).
pub fn landlock_version() -> Option<u32> {
    const ASK_FOR_VERSION: libc::c_uint = 1;
    let nothing = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag the kernel takes no structure and only answers.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            nothing,
            0_usize,
            ASK_FOR_VERSION,
        )
    };
    u32::try_from(answer).ok().filter(|version| *version > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_of_this_program_is_found() {
        // The tests are linked as the program is.
        let loader = loader().unwrap().unwrap();
        assert!(loader.is_file(), "{}", loader.display());
    }

    #[test]
    fn no_folder_of_the_system_is_written_in() {
        let folders = writable_in_root().unwrap();
        assert!(folders.contains(&PathBuf::from("/tmp")));
        for system in ["/etc", "/usr", "/proc", "/dev"] {
            assert!(!folders.contains(&PathBuf::from(system)));
        }
    }
}
