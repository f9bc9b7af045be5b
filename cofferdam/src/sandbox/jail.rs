//! The jail of a VM's process: a user namespace, in which its user is the only one and has no
//! rights over anything outside, and a mount namespace, in which there are no files but those that
//! it needs (user_namespaces(7), mount_namespaces(7)).
//!
//! ```text
//!  start, one thread          files, disks, TAPs, sockets, memory        before Landlock and filters
//!  ──► begin: namespaces ───► opened as without a jail, by this user ──► close: another root ──► ...
//!                                                                          /dev    kvm null urandom
//!                                                                          /proc   its own process
//!                                                                          its runtime folder, --allow-dir
//! ```
//!
//! A process joins a user namespace only while it has one thread, and mounts nothing once Landlock
//! limits it: so the namespaces come first and the files go when everything is open. What is open
//! stays so. Of the runtime folder there is only the part that is its own: sockets of other VMs and
//! of the service are not to be reached. There is no namespace of processes, which would take a
//! second process; of `/proc` there is its own part only.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow, bail, ensure};
use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat, symlinkat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{fchdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Devices in a jail: a TAP or a function of the host is given at the start.
const DEVICES: [&str; 3] = ["/dev/kvm", "/dev/null", "/dev/urandom"];

/// Folders that may be mounted over while the new root is made, in this process's namespace only.
const MOUNT_POINTS: [&str; 3] = ["/mnt", "/tmp", "/sys"];

/// Most that can be written into the root of a jail before it can only be read, in bytes: it has
/// names and nothing else.
const ROOT_BYTES: &str = "256k";

/// What is said where a host makes no namespaces.
const ALLOW: &str = "have the host allow them (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, \
                     kernel.apparmor_restrict_unprivileged_userns), or leave --jail away; see `cofferdam doctor`";

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Default)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    namespace: u64,
}

/// The namespaces of this process, whose files are still those of the host.
#[derive(Debug, Clone, Copy)]
pub struct Namespaces(());

impl Namespaces {
    /// Puts this process into namespaces of its own. It has one thread.
    ///
    /// # Errors
    /// The host does not let this user, or there are other threads.
    pub fn begin() -> anyhow::Result<Self> {
        enter().map_err(|error| {
            anyhow!("this host makes no user namespaces for this user ({error}): {ALLOW}")
        })?;
        Ok(Self(()))
    }

    /// The same of a process whose namespaces were made before its program was started.
    #[doc(hidden)]
    pub fn made_before() -> Self {
        Self(())
    }

    /// Leaves this process no files but `folders`, and some of `/dev` and `/proc`.
    ///
    /// # Errors
    /// A folder is not there, or the kernel refuses a step.
    pub fn close(self, folders: &[PathBuf]) -> anyhow::Result<()> {
        let folders = literal(folders)?;
        let home = std::env::current_dir().context("this process has no folder")?;
        mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )
        .context("cannot take mounts from the host's")?;
        // Before anything is mounted over.
        let mut parts = Vec::new();
        for path in &folders {
            parts.push(Part::of(path, true)?);
        }
        for device in DEVICES
            .map(Path::new)
            .into_iter()
            .filter(|path| path.exists())
        {
            parts.push(Part::of(device, false)?);
        }
        let process = format!("/proc/{}", std::process::id());
        parts.push(Part::of(Path::new(&process), true)?);
        let root =
            empty_root().with_context(|| format!("cannot make the jail's files: {ALLOW}"))?;
        let made = build(root.as_fd(), &parts, &home, &process);
        made.context("cannot make the jail's files")?;
        pivot(root.as_fd(), &home).context("cannot leave the host's files")
    }
}

/// Whether this host can jail a process of this user; the error is why not, in a line.
///
/// # Errors
/// It cannot.
pub fn can_jail() -> Result<(), String> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: what is called allocates a little between fork and exec, which the C library allows
    // after its own fork; nothing of it takes a lock of this program.
    unsafe {
        command.pre_exec(|| {
            enter()?;
            empty_root().map(drop)
        });
    }
    match command.status() {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// Joins new namespaces, in which this user is the only one, by its own number.
fn enter() -> io::Result<()> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    // SAFETY: memory and descriptors stay shared; there is no other thread whose view of files
    // would differ.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) }?;
    // Without rights outside a process maps its own user, and its group once it cannot drop groups
    // (user_namespaces(7)).
    fs::write("/proc/self/setgroups", "deny")?;
    let own = |number: u32| format!("{number} {number} 1");
    fs::write("/proc/self/uid_map", own(user.as_raw()))?;
    fs::write("/proc/self/gid_map", own(group.as_raw()))
}

/// A new file system in memory, mounted at a place that nobody needs meanwhile.
fn empty_root() -> io::Result<OwnedFd> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(tmpfs.as_fd(), "size", ROOT_BYTES)?;
    fsconfig_set_string(tmpfs.as_fd(), "mode", "0755")?;
    fsconfig_create(tmpfs.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(tmpfs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let place = MOUNT_POINTS
        .into_iter()
        .find(|path| Path::new(path).is_dir());
    let place = place.ok_or(io::ErrorKind::NotFound)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(root.as_fd(), "", CWD, place, flags)?;
    Ok(root)
}

/// Paths as they are to be in the jail: absolute, shorter ones first, so that what is below them is
/// mounted after them.
fn literal(folders: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for folder in folders {
        let path = std::path::absolute(folder)
            .with_context(|| format!("cannot name {}", folder.display()))?;
        let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
        ensure!(
            path.components().all(plain),
            "a jail has no .. in its paths: give another one than {}",
            folder.display()
        );
        ensure!(
            path.parent().is_some(),
            "with all of / in it a jail is none: give folders below it"
        );
        paths.push(path);
    }
    paths.sort();
    paths.dedup();
    Ok(paths)
}

/// A part of the host's files, mounted nowhere yet.
struct Part {
    path: PathBuf,
    is_folder: bool,
    mount: OwnedFd,
}

impl Part {
    fn of(path: &Path, is_folder: bool) -> anyhow::Result<Self> {
        let cannot = || format!("cannot take {} into the jail", path.display());
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        if is_folder {
            ensure!(path.is_dir(), "{} is no folder", path.display());
            flags |= OpenTreeFlags::AT_RECURSIVE;
            attributes |= MountAttrFlags::MOUNT_ATTR_NODEV;
        }
        let mount = open_tree(CWD, path, flags).with_context(cannot)?;
        set_attributes(mount.as_fd(), attributes, libc::AT_RECURSIVE).with_context(cannot)?;
        Ok(Self {
            path: path.to_owned(),
            is_folder,
            mount,
        })
    }
}

/// Sets attributes of a mount, with `below` (`AT_RECURSIVE`) of those in it too (mount_setattr(2),
/// Linux 5.12).
fn set_attributes(
    mount: BorrowedFd<'_>,
    attributes: MountAttrFlags,
    below: libc::c_int,
) -> io::Result<()> {
    let change = MountAttributes {
        set: attributes.bits().into(),
        ..MountAttributes::default()
    };
    let flags = libc::AT_EMPTY_PATH | below;
    // SAFETY: the path is empty and ends, the structure is as long as is said, and the kernel only
    // reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            size_of::<MountAttributes>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts `parts` into the new root, where nothing can be written afterwards but in them.
fn build(root: BorrowedFd<'_>, parts: &[Part], home: &Path, process: &str) -> anyhow::Result<()> {
    make_folder(root, home)?;
    for part in parts {
        let cannot = || format!("cannot have {} in the jail", part.path.display());
        let parent = part.path.parent().unwrap_or(Path::new("/"));
        let place = inside(&part.path)?;
        if part.is_folder {
            make_folder(root, &part.path)?;
        } else {
            make_folder(root, parent)?;
            let mode = Mode::RUSR | Mode::WUSR;
            let new = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
            openat(root, place, new, mode).with_context(cannot)?;
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(part.mount.as_fd(), "", root, place, flags).with_context(cannot)?;
    }
    let own = process.strip_prefix("/proc/").unwrap_or(process);
    symlinkat(own, root, "proc/self").context("cannot make /proc/self")?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
    set_attributes(root, attributes, 0).context("cannot have the jail's root only be read")
}

/// An absolute path, from the new root.
fn inside(path: &Path) -> anyhow::Result<&Path> {
    let place = path.strip_prefix("/");
    place.with_context(|| format!("{} is no absolute path", path.display()))
}

/// Makes a folder with those above it.
fn make_folder(root: BorrowedFd<'_>, path: &Path) -> anyhow::Result<()> {
    let mut made = PathBuf::new();
    for part in inside(path)?.components() {
        made.push(part);
        there_or(mkdirat(
            root,
            &made,
            Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH,
        ))
        .with_context(|| format!("cannot make {} in the jail", path.display()))?;
    }
    Ok(())
}

/// What is there already is as good.
fn there_or(result: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match result {
        Err(rustix::io::Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// Makes `root` the root of this process, all of its threads, and lets go of the one before.
fn pivot(root: BorrowedFd<'_>, home: &Path) -> anyhow::Result<()> {
    fchdir(root)?;
    // The old root is put on top of the new one, and taken off (pivot_root(2)).
    if let Err(error) = pivot_root(".", ".") {
        bail!(
            "{error}: a jail needs a root that can be left, which one in an initramfs or a chroot cannot"
        );
    }
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    // Relative paths lead where they did.
    Ok(rustix::process::chdir(home)?)
}

/// The words for a socket that could not be removed at the end.
pub fn outside(socket: &Path) -> anyhow::Error {
    let folder = socket.parent().unwrap_or(Path::new("/"));
    anyhow!(
        "{} would stay behind, for it is in no folder of the jail: give --allow-dir {} too, or another path",
        socket.display(),
        folder.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_a_jail_are_absolute_and_plain_and_not_everything() {
        let of = |paths: &[&str]| literal(&paths.iter().map(PathBuf::from).collect::<Vec<_>>());
        let all = of(&["/b/c", "/a", "/b", "/a"]).unwrap();
        assert_eq!(all, ["/a", "/b", "/b/c"].map(PathBuf::from));
        assert!(of(&["x"]).unwrap()[0].is_absolute());
        for wrong in ["/", "/a/../b", ".."] {
            of(&[wrong]).unwrap_err();
        }
    }

    #[test]
    fn whether_a_host_can_is_said_in_a_line() {
        if let Err(why) = can_jail() {
            assert!(!why.is_empty() && why.lines().count() == 1, "{why}");
        }
    }
}
