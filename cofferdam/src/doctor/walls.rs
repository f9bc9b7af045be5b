//! What of the sandbox this host can do ([`crate::sandbox`]), and whether guests run without root.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::report::Check;
use crate::sandbox::{can_jail, controllers, delegated, landlock_version};

/// The first version of Landlock that knows truncation, devices' requests and abstract sockets:
/// Linux 6.12.
const WHOLE_LANDLOCK: u32 = 6;

/// What a filter may do with a call that it refuses: all of these are used.
const ACTIONS: [&str; 4] = ["trap", "errno", "log", "allow"];

/// Filters of system calls, and that no program can give a process new privileges, which they need.
pub fn seccomp() -> Check {
    let name = "seccomp";
    let known = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    let missing = |action: &&str| !known.split_whitespace().any(|known| known == *action);
    let missing: Vec<_> = ACTIONS.into_iter().filter(missing).collect();
    // SAFETY: numbers only (prctl(2)).
    let no_new_privileges = unsafe { libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) } >= 0;
    match (missing.is_empty(), no_new_privileges) {
        (true, true) => Check::good(name, "system calls can be filtered, privileges given up"),
        (false, _) => Check::limited(
            name,
            format!("filters cannot do this: {}", missing.join(", ")),
            "guests run without: the host's kernel needs CONFIG_SECCOMP_FILTER and Linux 4.14",
        ),
        (true, false) => Check::limited(
            name,
            "the kernel has no PR_SET_NO_NEW_PRIVS",
            "guests run without: the host's kernel is older than Linux 3.5",
        ),
    }
}

/// Landlock, which limits access to files.
pub fn landlock() -> Check {
    let name = "landlock";
    match landlock_version() {
        Some(version) if version >= WHOLE_LANDLOCK => {
            Check::good(name, format!("version {version}"))
        }
        Some(version) => Check::limited(
            name,
            format!("version {version}, {WHOLE_LANDLOCK} has all that is used"),
            "less of what a process may do with files is limited: Linux 6.12 has the rest",
        ),
        None => Check::limited(
            name,
            "not in the kernel, or turned off",
            "guests run without: build the kernel with CONFIG_SECURITY_LANDLOCK and boot it with landlock in lsm=",
        ),
    }
}

/// Namespaces for `--jail`: one is made, in a process that ends at once.
pub fn jail() -> Check {
    let name = "jail";
    match can_jail() {
        Ok(()) => Check::good(name, "user and mount namespaces can be made"),
        Err(why) => Check::limited(
            name,
            format!("no user namespace with mounts of its own: {why}"),
            "guests run without --jail: allow it (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, \
             kernel.apparmor_restrict_unprivileged_userns); Linux 5.12 has all that it takes",
        ),
    }
}

/// The control group that `--jail` would divide.
pub fn control_group() -> Check {
    let name = "control group";
    let dir = match delegated() {
        Ok(dir) => dir,
        Err(why) => {
            let why = crate::error_text::one_line(&why);
            return Check::limited(
                name,
                format!("none to put guests in: {why}"),
                "guests have memory, tasks and processor time as their user: start them in a unit with Delegate=yes, \
                 or give run and serve --cgroup DIR, one that this user may divide",
            );
        }
    };
    let there = controllers(&dir).unwrap_or_default().join(", ");
    match there.as_str() {
        "memory, pids, cpu" => Check::good(name, format!("{}: {there}", dir.display())),
        _ => Check::limited(
            name,
            format!("{} has of memory, pids, cpu: {there}", dir.display()),
            "what is missing is not bounded: have it handed on (systemd: Delegate=memory pids cpu)",
        ),
    }
}

/// Whether users that are not root can run guests.
pub fn ordinary_user() -> Check {
    let name = "without root";
    let Ok(device) = Path::new("/dev/kvm").metadata() else {
        return Check::missing(name, "there is no /dev/kvm", "see above");
    };
    let read_and_write = |shift: u32| device.mode() >> shift & 0o6 == 0o6;
    let group = group_name(device.gid()).unwrap_or_else(|| device.gid().to_string());
    match (read_and_write(0), read_and_write(3) && device.gid() != 0) {
        (true, _) => Check::good(name, "every user may use /dev/kvm"),
        (_, true) => Check::good(name, format!("users in group {group} may use /dev/kvm")),
        _ => Check::limited(
            name,
            "only root may use /dev/kvm",
            "give it to a group, such as kvm (chgrp kvm /dev/kvm; chmod 660 /dev/kvm), and have users be in it",
        ),
    }
}

/// The name of group `number` (group(5)).
fn group_name(number: u32) -> Option<String> {
    let groups = fs::read_to_string("/etc/group").ok()?;
    let group = groups.lines().find(|line| {
        let third = line.split(':').nth(2);
        third.and_then(|text| text.parse().ok()) == Some(number)
    });
    group?.split(':').next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_have_their_names() {
        assert_eq!(group_name(0).as_deref(), Some("root"));
        assert_eq!(group_name(u32::MAX), None);
    }
}
