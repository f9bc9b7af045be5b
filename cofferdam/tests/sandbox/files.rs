//! Files that are none of a process's business.

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use cofferdam::sandbox::landlock_version;

use crate::common::place::{Place, end};
use crate::inside::{Kind, attempt};

/// Whether the host has version `least` of Landlock; else the test `name` is told to be skipped.
fn landlock(name: &str, least: u32) -> bool {
    let is_there = landlock_version().is_some_and(|version| version >= least);
    if !is_there {
        let why = format!("this host's kernel has no Landlock of version {least}");
        skipped::skip(&format!("sandbox::files::{name}"), &why);
    }
    is_there
}

#[test]
fn folders_of_the_system_and_devices_are_not_written_and_nothing_is_run() {
    if !landlock(
        "folders_of_the_system_and_devices_are_not_written_and_nothing_is_run",
        1,
    ) {
        return;
    }
    let place = Place::new();
    let file = place.file("theirs", b"");
    for what in ["", "elder "] {
        for (words, errno) in [
            ("create /etc/cofferdam-test", libc::EACCES),
            ("create /usr/cofferdam-test", libc::EACCES),
            ("write /dev/zero", libc::EACCES),
            ("write /proc/self/comm", libc::EACCES),
            ("open /etc/hostname", 0),
            ("open /dev/zero", 0),
            ("write /dev/null", 0),
            (format!("write {file}").as_str(), 0),
        ] {
            attempt(&place, Kind::Machine, "", &format!("{what}{words}")).returned(errno);
        }
    }
    let (folder, new) = (place.path("folder"), place.path("new"));
    attempt(
        &place,
        Kind::Machine,
        "",
        &format!("mkdir {}", folder.display()),
    )
    .returned(0);
    attempt(
        &place,
        Kind::Machine,
        "",
        &format!("create {}", new.display()),
    )
    .returned(0);
    attempt(
        &place,
        Kind::Machine,
        "",
        &format!("remove {}", new.display()),
    )
    .returned(0);
    attempt(&place, Kind::Machine, "--sandbox off", "write /dev/zero").returned(0);
}

#[test]
fn with_a_folder_named_no_other_is_read_or_written() {
    if !landlock("with_a_folder_named_no_other_is_read_or_written", 1) {
        return;
    }
    let place = Place::new();
    let theirs = place.file("theirs", b"");
    fs::create_dir(place.path("ours")).unwrap();
    let ours = place.path("ours").display().to_string();
    let run = place.path("run/file").display().to_string();
    let options = format!("--allow-dir {ours}");
    for (words, errno) in [
        (format!("open {theirs}"), libc::EACCES),
        (format!("write {theirs}"), libc::EACCES),
        (format!("remove {theirs}"), libc::EACCES),
        (format!("create {theirs}-too"), libc::EACCES),
        ("open /etc/hostname".to_owned(), libc::EACCES),
        ("open /proc/self/smaps".to_owned(), 0),
        ("open /dev/urandom".to_owned(), 0),
        (format!("create {ours}/file"), 0),
        (format!("open {ours}/file"), 0),
        (format!("create {run}"), 0),
    ] {
        attempt(&place, Kind::Machine, &options, &words).returned(errno);
    }
    assert_eq!(fs::read(place.path("theirs")).unwrap(), b"");
}

#[test]
fn a_socket_without_a_file_is_not_reached() {
    if !landlock("a_socket_without_a_file_is_not_reached", 6) {
        return;
    }
    let place = Place::new();
    let name = format!("cofferdam-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let _listener = UnixListener::bind_addr(&address).unwrap();
    let words = format!("abstract {name}");
    attempt(&place, Kind::Machine, "", &words).returned(libc::EPERM);
    attempt(&place, Kind::Machine, "--sandbox off", &words).returned(0);
}

#[test]
fn the_service_runs_its_own_program_and_no_other() {
    if !landlock("the_service_runs_its_own_program_and_no_other", 1) {
        return;
    }
    let place = Place::new();
    attempt(&place, Kind::Service, "", "run /bin/true").returned(libc::EACCES);
    attempt(&place, Kind::Service, "", "run /proc/self/exe").returned(0);
}

#[test]
fn a_guest_is_saved_into_the_folder_that_was_named_and_into_no_other() {
    if !landlock(
        "a_guest_is_saved_into_the_folder_that_was_named_and_into_no_other",
        1,
    ) {
        return;
    }
    let place = Place::new();
    fs::create_dir(place.path("ours")).unwrap();
    let path = |name: &str| place.path(name).display().to_string();
    let vm = place.idle(&format!("--memory 32M --allow-dir {}", path("ours")));
    place.ask(&format!("snapshot idle {}", path("ours/one")));
    place.ask(&format!("snapshot check {}", path("ours/one")));
    place.ask_refused(&format!("snapshot idle {}", path("two")), "denied");
    assert_eq!(place.status()["state"], "running");
    end(&place, vm, &[]);
    place.refused(
        &format!(
            "--name x --kernel {} --allow-dir {}",
            path("idle"),
            path("nowhere")
        ),
        &["nowhere"],
    );
}
