//! System calls that are not to be made.

use cofferdam::sandbox::FORBIDDEN;

use crate::common::place::Place;
use crate::inside::{Kind, attempt};

/// Calls that end a VM's process, with the name that it says.
const REFUSED: [(&str, &str); 21] = [
    ("execve", "execve"),
    ("fork", "fork"),
    ("clone", "clone"),
    ("clone_namespace", "clone"),
    ("clone_user", "clone"),
    ("socket_inet", "socket"),
    ("socket_inet6", "socket"),
    ("socket_netlink", "socket"),
    ("socket_packet", "socket"),
    ("socket_vsock", "socket"),
    ("mmap_exec", "mmap"),
    ("mprotect_exec", "mprotect"),
    ("kill_parent", "kill"),
    ("tgkill_parent", "tgkill"),
    ("ioctl_tiocsti", "ioctl"),
    ("ioctl_userfault_api", "ioctl"),
    ("ioctl_userfault_protect", "ioctl"),
    ("fcntl_setown", "fcntl"),
    ("prctl_dumpable", "prctl"),
    ("prlimit_set", "prlimit64"),
    ("x32", ""),
];

#[test]
fn calls_that_a_vm_has_no_use_for_end_its_process_with_a_line_that_names_them() {
    let place = Place::new();
    for (call, name) in REFUSED {
        let tried = attempt(&place, Kind::Machine, "", call);
        match name {
            "" => {
                let error = String::from_utf8_lossy(&tried.0.stderr);
                assert!(
                    error.contains("refused the system call 1073741863 to"),
                    "{error}"
                );
            }
            name => tried.is_ended_for(name),
        }
    }
}

#[test]
fn calls_that_are_for_no_process_of_ours_end_it() {
    let place = Place::new();
    for (name, number) in FORBIDDEN {
        // It has no arguments and hangs up a terminal.
        if *number == libc::SYS_vhangup {
            continue;
        }
        let name = name.strip_prefix("SYS_").unwrap();
        let words = format!("number={number}");
        attempt(&place, Kind::Machine, "", &words).is_ended_for(name);
        // Guests of the service give up capabilities, and those that begin lazily open a
        // userfaultfd before they have walls of their own.
        if ![libc::SYS_capset, libc::SYS_userfaultfd].contains(number) {
            attempt(&place, Kind::Service, "", &words).is_ended_for(name);
        }
    }
}

#[test]
fn calls_that_have_another_way_look_as_if_the_kernel_had_none() {
    let place = Place::new();
    for call in ["clone3", "fsopen"] {
        attempt(&place, Kind::Machine, "", call).returned(libc::ENOSYS);
    }
    attempt(&place, Kind::Service, "", "clone3").returned(libc::ENOSYS);
    // The kernel's own answer: guests of the service have guest memory with huge pages.
    attempt(&place, Kind::Service, "", "fsopen").returned(libc::EFAULT);
}

#[test]
fn a_vcpus_thread_makes_no_names_and_touches_no_terminal_and_others_do() {
    let place = Place::new();
    let bind = format!("bind {}", place.path("run/socket").display());
    for (call, name) in [
        (bind.as_str(), "bind"),
        ("socketpair", "socketpair"),
        ("flock", "flock"),
        ("ioctl_tunsetiff", "ioctl"),
    ] {
        attempt(&place, Kind::Vcpu, "", call).is_ended_for(name);
    }
    attempt(&place, Kind::Vcpu, "", "execve").is_ended_for("execve");
    attempt(&place, Kind::Vcpu, "", "ioctl_kvm").returned(libc::EBADF);
    attempt(&place, Kind::Machine, "", &bind).returned(0);
    attempt(&place, Kind::Machine, "", "socketpair").returned(0);
    attempt(&place, Kind::Machine, "", "socket_unix").returned(0);
    attempt(&place, Kind::Machine, "", "kill_self").returned(0);
    attempt(&place, Kind::Machine, "", "flock").returned(libc::EBADF);
    attempt(&place, Kind::Machine, "", "ioctl_tunsetiff").returned(libc::EBADF);
    attempt(&place, Kind::Machine, "", "ioctl_userfault_copy").returned(libc::EBADF);
}

#[test]
fn a_thread_that_was_there_before_is_behind_the_walls_too() {
    let place = Place::new();
    attempt(&place, Kind::Machine, "", "elder socket_inet").is_ended_for("socket");
    attempt(&place, Kind::Machine, "", "elder socket_unix").returned(0);
}

/// Or the others would show nothing.
#[test]
fn what_is_refused_goes_through_where_there_are_no_walls() {
    let place = Place::new();
    for options in ["--sandbox off", "--sandbox log"] {
        for call in [
            "fork",
            "socket_inet",
            "mmap_exec",
            "mprotect_exec",
            "kill_parent",
        ] {
            attempt(&place, Kind::Machine, options, call).returned(0);
        }
    }
}
