//! The control group of a VM's process (cgroup v2, Linux
//! `Documentation/admin-guide/cgroup-v2.rst`): bounds of its memory, its tasks and its processor
//! time, which are the kernel's to keep.
//!
//! ```text
//!  PARENT, which this user may divide            controllers handed on: memory, pids, cpu
//!  └── cofferdam-NAME     memory.max pids.max cpu.max        the VM's process, all of its threads
//!        ▲ removed by a keeper: a process of ours outside of it, which hears by a pipe that the VM has ended
//! ```
//!
//! Who has taken the process over must not get out: nothing that could move it is left open. So it
//! cannot remove its group either; the keeper does, and where that was killed too the next start.

mod keeper;

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::ChildStdin;

use anyhow::{Context, anyhow, ensure};

pub use keeper::keeper;

use crate::options::{MemorySize, VmName};
use keeper::Keeper;

/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2: i64 = 0x6367_7270;

/// What names of our groups begin with.
const PREFIX: &str = "cofferdam-";

/// What is bounded, by the controller that does it.
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

/// Where keepers are, and the service, whose own group is divided. No group of a VM is called that.
const KEEPERS: &str = "keepers";
const SERVICE: &str = "service";

/// Tasks where nobody says: a VM with all vCPUs, clients and isolated modules has some fifty.
const DEFAULT_TASKS: u32 = 512;

/// What a VM may have of memory where nobody says: so many times its guest's (marks and private
/// VMs are copies of parts of it), and for all else so many bytes.
const DEFAULT_TIMES: u64 = 4;
const DEFAULT_MORE: u64 = 512 << 20;

/// Processors for devices, recovery and clients, beside one for each vCPU.
const MORE_CPUS: u32 = 2;

/// The period in which processor time is bounded, in microseconds: the kernel's own
/// (cgroup-v2.rst, `cpu.max`).
const PERIOD_US: u64 = 100_000;

/// How often a new group is made that a keeper removes before somebody is in it.
const ENTER_TRIES: u32 = 100;

/// A control group of a process's own.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct GroupOptions {
    /// Put this process into a control group of its own below this one (cgroup v2), which this user
    /// may divide and which has no processes itself; with --jail below its own, where that was
    /// handed to it (systemd: Delegate=yes)
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// In a control group: most memory of this process and its guest; 4 times the guest's and 512M
    /// when not given
    #[arg(long, value_name = "SIZE")]
    max_memory: Option<MemorySize>,
    /// In a control group: most threads and processes; 512 when not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(16..=1_000_000))]
    max_tasks: Option<u32>,
    /// In a control group: most processors at a time; one a vCPU and two more when not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_cpus: Option<u32>,
}

/// The control group of this process, as far as there is one; dropping it has the keeper look for
/// its end.
#[derive(Debug, Default)]
pub struct Group {
    /// The keeper hears when this closes.
    _input: Option<ChildStdin>,
    /// What is done without.
    without: Option<String>,
}

impl Group {
    /// Says what is done without, if it is anything.
    pub fn tell(&self) {
        if let Some(without) = &self.without {
            tracing::warn!("{without}");
        }
    }
}

/// A group that came to be, and what of it could not be bounded.
struct Made {
    input: ChildStdin,
    missing: Vec<&'static str>,
}

impl From<Made> for Group {
    fn from(made: Made) -> Self {
        let missing = made.missing.join(", ");
        let without = format!(
            "the control group around this process does not bound {missing}: that was not handed to it"
        );
        Self {
            _input: Some(made.input),
            without: (!made.missing.is_empty()).then_some(without),
        }
    }
}

impl GroupOptions {
    /// Puts this process, the VM `name`'s, into a control group, if it is to be in one or `jail`
    /// asks for what there is. The last two are its guest's memory in bytes and its vCPUs.
    ///
    /// # Errors
    /// The group that was named cannot be divided; bounds were given for no group.
    pub fn enter(
        &self,
        name: &VmName,
        jail: bool,
        memory: u64,
        vcpus: u8,
    ) -> anyhow::Result<Group> {
        let bounded =
            self.max_memory.is_some() || self.max_tasks.is_some() || self.max_cpus.is_some();
        ensure!(
            !bounded || jail || self.cgroup.is_some(),
            "--max-memory, --max-tasks and --max-cpus are bounds of a control group: give --cgroup DIR too, or --jail"
        );
        let limits = self.limits(memory, vcpus);
        if let Some(dir) = &self.cgroup {
            let made = group_at(dir).and_then(|dir| make(&dir, name, &limits));
            let made =
                made.with_context(|| format!("cannot use the control group {}", dir.display()))?;
            ensure!(
                made.missing.is_empty(),
                "the control group {} cannot bound {}: hand it the controllers (cgroup.subtree_control of the one above)",
                dir.display(),
                made.missing.join(", ")
            );
            return Ok(made.into());
        }
        if !jail {
            return Ok(Group::default());
        }
        match delegated().and_then(|dir| make(&dir, name, &limits)) {
            Ok(made) => Ok(made.into()),
            Err(why) if bounded => Err(why).context("there can be no control group"),
            Err(why) => {
                let why = crate::error_text::one_line(&why);
                let what = "its memory, tasks and processor time are as its user's";
                Ok(Group {
                    without: Some(format!(
                        "no control group around this process, {what}: {why}"
                    )),
                    ..Group::default()
                })
            }
        }
    }

    /// What is written where.
    fn limits(&self, memory: u64, vcpus: u8) -> [(&'static str, &'static str, String); 3] {
        let of_guest = memory
            .saturating_mul(DEFAULT_TIMES)
            .saturating_add(DEFAULT_MORE);
        let memory = self.max_memory.map_or(of_guest, MemorySize::bytes);
        let tasks = self.max_tasks.unwrap_or(DEFAULT_TASKS);
        let cpus = self
            .max_cpus
            .unwrap_or_else(|| u32::from(vcpus) + MORE_CPUS);
        let quota = u64::from(cpus) * PERIOD_US;
        [
            ("memory", "memory.max", memory.to_string()),
            ("pids", "pids.max", tasks.to_string()),
            ("cpu", "cpu.max", format!("{quota} {PERIOD_US}")),
        ]
    }
}

/// Has the service leave `dir`, in which its guests' control groups are to be, if it is in there
/// itself; the directory as it is named for guests.
///
/// # Errors
/// It is no control group, or cannot be divided.
pub fn divide(dir: &Path) -> anyhow::Result<PathBuf> {
    let divided = group_at(dir).and_then(|dir| {
        if own()?.as_deref() == Some(&dir) {
            let other = dir.join(SERVICE);
            new_group(&other)?;
            move_to(&other, std::process::id())?;
        }
        Ok(dir)
    });
    divided.with_context(|| format!("cannot use the control group {}", dir.display()))
}

/// The same with this process's own group, where it was handed to it with all that a guest's has
/// bounds of.
///
/// # Errors
/// It was not, or cannot be divided.
pub fn divide_delegated() -> anyhow::Result<PathBuf> {
    let own = delegated()?;
    let missing = missing(&controllers(&own)?);
    ensure!(
        missing.is_empty(),
        "its own, {}, was handed to it without {}",
        own.display(),
        missing.join(", ")
    );
    let dir = divide(&own)?;
    // Others may be in there.
    CONTROLLERS
        .iter()
        .try_for_each(|name| hand_on(&dir, name))?;
    Ok(dir)
}

/// The control group of version 2 at this directory.
fn group_at(dir: &Path) -> anyhow::Result<PathBuf> {
    let dir = fs::canonicalize(dir)?;
    let there = rustix::fs::statfs(&dir)?;
    ensure!(
        there.f_type == CGROUP2,
        "it is no control group of version 2 (mount -t cgroup2)"
    );
    Ok(dir)
}

/// This process's own control group, if it was handed to it to divide.
///
/// # Errors
/// There is none, or it was not.
pub fn delegated() -> anyhow::Result<PathBuf> {
    let own = own()?.context("this host has no control groups of version 2 (cgroup2)")?;
    // systemd marks what it hands over (CGROUP_DELEGATION of systemd, "Delegation").
    let is_marked = ["user.delegate", "trusted.delegate"].iter().any(|name| {
        let mut value = [0; 8];
        let read = rustix::fs::getxattr(&own, *name, &mut value[..]);
        read.is_ok_and(|length| value.get(..length) == Some(b"1"))
    });
    ensure!(
        is_marked,
        "its own, {}, was not handed to it (systemd: Delegate=yes); name another with --cgroup",
        own.display()
    );
    Ok(own)
}

/// Which controllers there are in a group.
///
/// # Errors
/// It cannot be read.
pub fn controllers(dir: &Path) -> io::Result<Vec<&'static str>> {
    let there = fs::read_to_string(dir.join("cgroup.controllers"))?;
    let is_there = |name: &&str| there.split_whitespace().any(|there| there == *name);
    Ok(CONTROLLERS.into_iter().filter(is_there).collect())
}

/// The control group of this process, where it is mounted.
fn own() -> io::Result<Option<PathBuf>> {
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(place(&groups, &mounts))
}

/// The same out of these two (cgroups(7), proc_pid_mountinfo(5)).
fn place(groups: &str, mounts: &str) -> Option<PathBuf> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // A group that this process does not see begins so, as does one that was removed.
    if path.split('/').any(|part| part == "..") || path.ends_with(" (deleted)") {
        return None;
    }
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let is_ours = kind.split(' ').next() == Some("cgroup2") && root == "/";
        is_ours.then(|| Path::new(point).join(path))
    })
}

/// Makes the group of `name` in `parent` and puts this process into it. Where that fails it is where
/// it was, and nothing is left of trying.
fn make(
    parent: &Path,
    name: &VmName,
    limits: &[(&'static str, &'static str, String)],
) -> anyhow::Result<Made> {
    let group = parent.join(format!("{PREFIX}{name}"));
    let before = own()?;
    if let Err(error) = fs::remove_dir(&group)
        && error.kind() != ErrorKind::NotFound
    {
        return Err(error)
            .context("processes of an earlier VM of this name are in its control group");
    }
    let mut keeper = Keeper::start(&group)?;
    if before.as_deref() == Some(parent) {
        // What is in the group that is divided would keep its controllers from being handed on
        // ("no internal processes").
        let other = parent.join(KEEPERS);
        new_group(&other)?;
        move_to(&other, keeper.child.id())?;
    }
    enter_new(&group)?;
    match bound(parent, &group, limits) {
        Ok(missing) => Ok(Made {
            input: keeper.stays()?,
            missing,
        }),
        Err(error) => {
            let is_back = before.is_some_and(|before| move_to(&before, std::process::id()).is_ok());
            if !is_back {
                // It hears of the end of this process as it would of a VM's.
                std::mem::forget(keeper.stays()?);
            }
            Err(error)
        }
    }
}

/// Puts this process into a new group, made anew where the keeper of an earlier VM removes it
/// before there is a process in it.
fn enter_new(group: &Path) -> anyhow::Result<()> {
    const NODEV: i32 = rustix::io::Errno::NODEV.raw_os_error();
    let mut last = None;
    for _ in 0..ENTER_TRIES {
        new_group(group)?;
        match put_into(group, std::process::id()) {
            Err(error)
                if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(NODEV) =>
            {
                last = Some(error);
            }
            done => return done.with_context(|| format!("cannot enter {}", group.display())),
        }
    }
    Err(anyhow!(
        "{} is removed again and again: {last:?}",
        group.display()
    ))
}

/// Writes the bounds of a group as far as `parent` has the controllers; what has none.
fn bound(
    parent: &Path,
    group: &Path,
    limits: &[(&'static str, &'static str, String)],
) -> anyhow::Result<Vec<&'static str>> {
    let there = controllers(parent)?;
    for (controller, file, value) in limits {
        if !there.contains(controller) {
            continue;
        }
        hand_on(parent, controller)?;
        let file = group.join(file);
        write(&file, value).with_context(|| format!("cannot write {}", file.display()))?;
    }
    match write(&group.join("memory.swap.max"), "0") {
        // A kernel without swap, or without the controller.
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        done => done.context("cannot bound its swap")?,
    }
    // All of it ends at once where there is too little memory; kernels before 4.19 have no such
    // file.
    let _ = write(&group.join("memory.oom.group"), "1");
    Ok(missing(&there))
}

/// Controllers that are not among these.
fn missing(there: &[&str]) -> Vec<&'static str> {
    let is_missing = |name: &&str| !there.contains(name);
    CONTROLLERS.into_iter().filter(is_missing).collect()
}

/// Has groups in `parent` have this controller.
fn hand_on(parent: &Path, controller: &str) -> anyhow::Result<()> {
    let file = parent.join("cgroup.subtree_control");
    let there = fs::read_to_string(&file)?;
    if there.split_whitespace().any(|there| there == controller) {
        return Ok(());
    }
    write(&file, &format!("+{controller}")).map_err(|error| match error.kind() {
        ErrorKind::ResourceBusy => anyhow!(
            "{} has processes of its own, so that it cannot be divided: name one that has none",
            parent.display()
        ),
        _ => anyhow!("cannot hand on {controller}: {error}"),
    })
}

/// Makes a group, if it is not there.
fn new_group(group: &Path) -> anyhow::Result<()> {
    match fs::create_dir(group) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("cannot make {}", group.display()))
        }
        _ => Ok(()),
    }
}

fn move_to(group: &Path, process: u32) -> anyhow::Result<()> {
    put_into(group, process)
        .with_context(|| format!("cannot move a process to {}", group.display()))
}

fn put_into(group: &Path, process: u32) -> io::Result<()> {
    write(&group.join("cgroup.procs"), &process.to_string())
}

/// Writes to a file that is there: a group makes none.
fn write(file: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().write(true).open(file)?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_group_is_found_where_it_is_mounted() {
        let mounts = "25 1 0:22 / /sys rw,nosuid - sysfs sysfs rw\n\
                      30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let at = |groups: &str| place(groups, mounts);
        assert_eq!(at("0::/a/b\n"), Some("/sys/fs/cgroup/a/b".into()));
        assert_eq!(at("9:pids:/x\n0::/\n"), Some("/sys/fs/cgroup/".into()));
        for none in ["", "9:pids:/x\n", "0::/../x\n", "0::/x (deleted)\n"] {
            assert_eq!(at(none), None, "{none:?}");
        }
        assert_eq!(
            place("0::/a\n", "30 25 0:26 /sub /c rw - cgroup2 x rw\n"),
            None
        );
        assert_eq!(place("0::/a\n", "cut"), None);
    }

    #[test]
    fn bounds_follow_from_the_guest_where_nobody_says() {
        let values = |options: &GroupOptions, memory, vcpus| {
            options.limits(memory, vcpus).map(|(_, _, value)| value)
        };
        let all = values(&GroupOptions::default(), 64 << 20, 2);
        assert_eq!(all, ["805306368", "512", "400000 100000"]);
        let given = GroupOptions {
            max_memory: Some("64M".parse().unwrap()),
            max_tasks: Some(99),
            max_cpus: Some(1),
            ..GroupOptions::default()
        };
        assert_eq!(
            values(&given, u64::MAX, 8),
            ["67108864", "99", "100000 100000"]
        );
        assert!(values(&GroupOptions::default(), u64::MAX, 1)[0] == u64::MAX.to_string());
    }
}
