//! Who is at the other end of the unix socket, and what they may do.
//!
//! | | may |
//! | --- | --- |
//! | the service's user, root | do everything |
//! | a member of the group of `--look-group` | look: GET and HEAD |
//! | everybody else | nothing |
//!
//! The kernel says who they were when they connected (`SO_PEERCRED`, `SO_PEERGROUPS`, unix(7)). The
//! socket's mode says the same; what is asked here holds also where somebody has changed it.

use std::fs::{File, Permissions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use rustix::fs::{AtFlags, Gid, Mode, OFlags};
use tokio::net::UnixStream;

use super::role::Role;

/// Most groups of a process (`NGROUPS_MAX` of linux/limits.h).
const MAX_GROUPS: usize = 65536;

/// Groups that there is room for at the first try.
const SOME_GROUPS: usize = 64;

/// Most of the list of groups that is read, in bytes.
const MAX_LIST_BYTES: u64 = 16 << 20;

/// Who may connect.
#[derive(Debug, Clone, Copy)]
pub struct Peers {
    /// The service's user.
    own: u32,
    /// The group whose members may look, if there is one.
    look: Option<u32>,
}

impl Peers {
    /// This process's user and root, and members of the group `look` to look.
    pub fn new(look: Option<u32>) -> Self {
        Self {
            own: rustix::process::geteuid().as_raw(),
            look,
        }
    }

    /// What who is at the other end may do, if anything.
    pub fn role_of(&self, stream: &UnixStream) -> Option<Role> {
        let peer = stream.peer_cred().ok()?;
        // Who cannot be told is in no group.
        let groups = || peer_groups(stream).unwrap_or_default();
        self.role(peer.uid(), peer.gid(), groups)
    }

    fn role(&self, uid: u32, gid: u32, groups: impl FnOnce() -> Vec<u32>) -> Option<Role> {
        if uid == self.own || uid == 0 {
            return Some(Role::Do);
        }
        let look = self.look?;
        (gid == look || groups().contains(&look)).then_some(Role::Look)
    }

    /// Who may, in words for who may not.
    pub fn words(&self) -> &'static str {
        match self.look {
            None => "only the user whose service this is and root may use it",
            Some(_) => {
                "only the user whose service this is, root and the group that may look may use it"
            }
        }
    }
}

/// The supplementary groups of the process that connected (`SO_PEERGROUPS` of asm-generic/socket.h,
/// since Linux 4.13).
fn peer_groups(stream: &impl AsFd) -> io::Result<Vec<u32>> {
    let mut room = SOME_GROUPS;
    loop {
        let mut groups = vec![0_u32; room];
        let bytes = room.saturating_mul(size_of::<u32>());
        let mut length = libc::socklen_t::try_from(bytes).map_err(io::Error::other)?;
        let socket = stream.as_fd().as_raw_fd();
        // SAFETY: the socket is open, and the kernel writes no more bytes into the buffer than
        // `length` says that it has.
        let failed = unsafe {
            libc::getsockopt(
                socket,
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        } != 0;
        let needed = usize::try_from(length).map_err(io::Error::other)? / size_of::<u32>();
        if !failed {
            groups.truncate(needed);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // The length says how much room is needed then.
        if error.raw_os_error() != Some(libc::ERANGE) || needed <= room || needed > MAX_GROUPS {
            return Err(error);
        }
        room = needed;
    }
}

/// The number of a group: a number, or a name in `/etc/group`.
///
/// # Errors
/// There is no such group.
pub fn group(name: &str) -> anyhow::Result<u32> {
    if let Ok(number) = name.parse() {
        // As which nobody is meant (chown(2)).
        ensure!(number != u32::MAX, "{name} is the number of no group");
        return Ok(number);
    }
    let mut list = String::new();
    File::open("/etc/group")
        .and_then(|file| file.take(MAX_LIST_BYTES).read_to_string(&mut list))
        .context("cannot read /etc/group: give the group's number")?;
    number_in(&list, name)
        .with_context(|| format!("there is no group {name} in /etc/group: give one, or its number"))
}

/// The number of the group `name` in a list of them (group(5)).
fn number_in(list: &str, name: &str) -> Option<u32> {
    list.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name) && !name.is_empty()).then_some(())?;
        fields.nth(1)?.parse().ok()
    })
}

/// Lets members of `group` connect to the socket at `path`, whose device and inode are those of
/// `file`, and nobody else but its owner. A folder around it that is the owner's alone is opened
/// for them to pass through.
///
/// # Errors
/// The group cannot be given the socket, or cannot get there.
pub fn open_to(path: &Path, file: (u64, u64), group: u32) -> anyhow::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let cannot = || {
        format!(
            "cannot give {} to the group {group}: the service has to be root's or of a member of it",
            path.display()
        )
    };
    let inside = hold(folder, OFlags::DIRECTORY);
    let inside = inside.with_context(|| format!("cannot look at {}", folder.display()))?;
    let about = inside.metadata().with_context(cannot)?;
    let own = rustix::process::geteuid().as_raw();
    if about.uid() == own && about.mode() & 0o077 == 0 {
        give(&inside, group, 0o710).with_context(cannot)?;
    }
    for around in folder.ancestors() {
        let about = around.metadata();
        let about = about.with_context(|| format!("cannot look at {}", around.display()))?;
        let passes =
            about.mode() & 0o001 != 0 || (about.gid() == group && about.mode() & 0o010 != 0);
        if !passes {
            bail!(
                "the group {group} cannot pass through {}: let it (chmod o+x, or chgrp and chmod g+x), or choose another --socket",
                around.display()
            );
        }
    }
    let other = || format!("{} is not the service's socket any more", path.display());
    let socket = hold(path, OFlags::NOFOLLOW).with_context(other)?;
    let about = socket.metadata().with_context(cannot)?;
    ensure!((about.dev(), about.ino()) == file, other());
    give(&socket, group, 0o660).with_context(cannot)
}

/// What is at `path` now, to be looked at and given away: what is put there later is not meant.
fn hold(path: &Path, flags: OFlags) -> io::Result<File> {
    let held = rustix::fs::open(path, flags | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    Ok(held.into())
}

/// Gives what is held to `group`, with this mode.
fn give(held: &File, group: u32, mode: u32) -> io::Result<()> {
    let group = Some(Gid::from_raw(group));
    rustix::fs::chownat(held, "", None, group, AtFlags::EMPTY_PATH)?;
    // No call changes the mode of what is held only (`O_PATH`); this name leads to it (proc(5)).
    let name = format!("/proc/self/fd/{}", held.as_raw_fd());
    std::fs::set_permissions(name, Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_services_user_and_root_may_do_and_a_group_may_look() {
        let none = || Vec::new();
        let peers = Peers {
            own: 1000,
            look: Some(50),
        };
        for uid in [0, 1000] {
            assert_eq!(peers.role(uid, 7, none), Some(Role::Do));
        }
        assert_eq!(peers.role(1001, 7, none), None);
        assert_eq!(peers.role(1001, 50, none), Some(Role::Look));
        assert_eq!(peers.role(1001, 7, || vec![4, 50]), Some(Role::Look));
        let alone = Peers {
            own: 1000,
            look: None,
        };
        assert_eq!(alone.role(1001, 50, || vec![50]), None);
        assert_eq!(alone.role(1000, 7, none), Some(Role::Do));
    }

    #[test]
    fn a_link_in_the_sockets_place_gives_nothing_of_another_file_away() {
        use std::os::unix::net::UnixListener;
        let folder = tempfile::tempdir().unwrap();
        let [socket, other] = ["socket", "other"].map(|name| folder.path().join(name));
        let group = rustix::process::getegid().as_raw();
        std::fs::write(&other, "x").unwrap();
        std::fs::set_permissions(&other, Permissions::from_mode(0o600)).unwrap();
        // The folder is opened whatever is in it: it is this user's.
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o711)).unwrap();
        let _listener = UnixListener::bind(&socket).unwrap();
        let about = |path: &Path| path.symlink_metadata().unwrap();
        let file = (about(&socket).dev(), about(&socket).ino());
        if let Err(error) = open_to(&socket, file, group) {
            // Folders for temporary files are in one of their user's alone.
            let why = format!("{error:#}");
            assert!(why.contains("cannot pass through"), "{why}");
            return skipped::skip("serve::peer::tests", &why);
        }
        assert_eq!(about(&socket).mode() & 0o777, 0o660);
        std::fs::remove_file(&socket).unwrap();
        std::os::unix::fs::symlink(&other, &socket).unwrap();
        let why = format!("{:#}", open_to(&socket, file, group).unwrap_err());
        assert!(why.contains("not the service's socket any more"), "{why}");
        assert_eq!(about(&other).mode() & 0o777, 0o600);
        // Nor of another socket of the same user.
        std::fs::remove_file(&socket).unwrap();
        std::fs::rename(&other, folder.path().join("away")).unwrap();
        let _other = UnixListener::bind(&other).unwrap();
        std::fs::rename(&other, &socket).unwrap();
        std::fs::set_permissions(&socket, Permissions::from_mode(0o600)).unwrap();
        open_to(&socket, file, group).unwrap_err();
        assert_eq!(about(&socket).mode() & 0o777, 0o600);
    }

    #[tokio::test]
    async fn the_groups_of_a_peer_are_this_processs_own_here() {
        let (one, _other) = UnixStream::pair().unwrap();
        let mut groups = peer_groups(&one).unwrap();
        let own = rustix::process::getgroups().unwrap();
        let mut own: Vec<u32> = own.iter().map(|group| group.as_raw()).collect();
        groups.sort_unstable();
        own.sort_unstable();
        assert_eq!(groups, own);
    }

    #[test]
    fn a_group_is_a_number_or_a_name() {
        assert_eq!(group("12").unwrap(), 12);
        group("4294967295").unwrap_err();
        let list = "root:x:0:\nbroken\nkvm:x:104:me,you\nodd:x:many:\n";
        assert_eq!(number_in(list, "kvm"), Some(104));
        for none in ["", "odd", "broken", "kv", "kvm:x", "me"] {
            assert_eq!(number_in(list, none), None, "{none}");
        }
    }
}
