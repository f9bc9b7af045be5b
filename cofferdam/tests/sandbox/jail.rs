//! The jail of a VM's process, looked at from outside and broken at from inside.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use cofferdam::sandbox::can_jail;

use crate::common::place::{Place, end, finish, signal};
use crate::inside::{Kind, attempt};
use crate::running::{IPC_LOCK, are_behind_walls, started};

/// Whether this host can jail a process; else the test `name` is told to be skipped.
fn jails(name: &str) -> bool {
    let can = can_jail();
    if let Err(why) = &can {
        let why = format!("this host makes no user namespace with mounts: {why}");
        skipped::skip(&format!("sandbox::jail::{name}"), &why);
    }
    can.is_ok()
}

/// The namespace of `process` (proc_pid_ns(5)).
fn namespace(process: u32, kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/{process}/ns/{kind}")).unwrap()
}

/// What is in the folder `path` of the root that `process` has.
fn names(process: u32, path: &Path) -> Vec<String> {
    let path = path.strip_prefix("/").unwrap();
    let folder = Path::new("/proc")
        .join(process.to_string())
        .join("root")
        .join(path);
    let names = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = names
        .map(|name| name.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_jailed_vm_has_its_own_files_alone_and_does_all_that_a_vm_does() {
    if !jails("a_jailed_vm_has_its_own_files_alone_and_does_all_that_a_vm_does") {
        return;
    }
    let place = Place::new();
    let other = place.start("other", &place.idle_kernel(), "--memory 32M");
    fs::create_dir(place.path("ours")).unwrap();
    let path = |name: &str| place.path(name).display().to_string();
    let vm = place.idle(&format!(
        "--memory 32M --net user --jail --allow-dir {}",
        path("ours")
    ));
    for kind in ["user", "mnt"] {
        assert_ne!(
            namespace(vm.id(), kind),
            namespace(std::process::id(), kind)
        );
    }
    let users = fs::read_to_string(format!("/proc/{}/uid_map", vm.id())).unwrap();
    let users: Vec<_> = users.split_whitespace().collect();
    assert_eq!(users[2], "1", "{users:?}");
    are_behind_walls(vm.id(), IPC_LOCK);
    assert_eq!(
        names(vm.id(), Path::new("/dev")),
        ["kvm", "null", "urandom"]
    );
    assert_eq!(
        names(vm.id(), Path::new("/proc")),
        [vm.id().to_string(), "self".to_owned()]
    );
    // Neither the other VM nor what else is there.
    assert_eq!(names(vm.id(), &place.path("run")), ["idle"]);
    assert_eq!(names(vm.id(), &place.path("")), ["ours", "run"]);
    // No folder of the host is open, from which a way would lead to the rest.
    for open in fs::read_dir(format!("/proc/{}/fd", vm.id())).unwrap() {
        let is_folder = open
            .unwrap()
            .path()
            .metadata()
            .is_ok_and(|file| file.is_dir());
        assert!(!is_folder);
    }
    for words in [
        "pause idle",
        "resume idle",
        "mark idle",
        "rewind idle",
        "reset idle",
    ] {
        place.ask(words);
    }
    place.ask(&format!("snapshot idle {}", path("ours/one")));
    place.ask(&format!("snapshot check {}", path("ours/one")));
    place.ask_refused(&format!("snapshot idle {}", path("two")), "");
    assert_eq!(place.status()["state"], "running");
    // It ends, and whoever has waited for that has cleared its folder away.
    place.ask("stop --force idle");
    assert!(finish(vm).status.success());
    assert_eq!(place.left(), ["other"]);
    end(&place, other, &[]);
}

#[test]
fn a_jailed_vm_goes_on_from_a_snapshot_and_has_its_turn_at_a_shared_nic() {
    if !jails("a_jailed_vm_goes_on_from_a_snapshot_and_has_its_turn_at_a_shared_nic") {
        return;
    }
    let place = Place::new();
    let snapshot = place.path("snapshot").display().to_string();
    let vm = place.idle("--memory 32M --net user");
    place.ask(&format!("snapshot idle {snapshot} --stop"));
    finish(vm);
    let vm = place
        .command()
        .args([
            "run",
            "--name",
            "idle",
            "--jail",
            "--snapshot",
            &snapshot,
            "--lazy",
        ])
        .spawn();
    let vm = vm.unwrap();
    place.wait_for("idle");
    for words in ["mark idle", "reset idle", "rewind idle"] {
        place.ask(words);
    }
    place.ask("stop --force idle");
    assert!(finish(vm).status.success());
    let host = started(
        &place,
        "device serve nic --net user",
        ".devices/nic/control.sock",
    );
    let vm = place.idle("--memory 32M --jail --nic device=nic");
    assert_eq!(names(vm.id(), &place.path("run")), [".devices", "idle"]);
    let device = place.ask("device status nic --json");
    assert!(device.contains("\"idle\""), "{device}");
    place.ask("stop --force idle");
    assert!(finish(vm).status.success());
    place.ask("device stop nic");
    finish(host);
}

#[test]
fn what_a_jailed_vm_cannot_remove_goes_with_the_next() {
    if !jails("what_a_jailed_vm_cannot_remove_goes_with_the_next") {
        return;
    }
    let place = Place::new();
    let vm = place.idle("--memory 32M --jail");
    signal(&vm, libc::SIGTERM);
    finish(vm);
    assert_eq!(place.left(), ["idle"]);
    let file = |path: &str| place.path(path).exists();
    assert!(file("run/idle/pid") && !file("run/idle/control.sock") && !file("run/idle/agent.sock"));
    assert_eq!(place.ask("list --json").trim(), "[]");
    let next = place.start("next", &place.idle_kernel(), "--memory 32M");
    end(&place, next, &[]);
}

/// With the jail alone: no Landlock, no filter.
#[test]
fn there_is_nothing_of_the_host_in_a_jail() {
    if !jails("there_is_nothing_of_the_host_in_a_jail") {
        return;
    }
    let place = Place::new();
    fs::create_dir(place.path("run/own")).unwrap();
    fs::create_dir(place.path("run/other")).unwrap();
    let path = |name: &str| place.path(name).display().to_string();
    let _listener = UnixListener::bind(place.path("run/other/control.sock")).unwrap();
    let parent = std::process::id();
    for what in ["", "elder "] {
        for (words, errno) in [
            ("open /etc/hostname".to_owned(), libc::ENOENT),
            ("open /".to_owned(), 0),
            (format!("open /proc/{parent}/status"), libc::ENOENT),
            (
                format!("open /proc/{parent}/root/etc/hostname"),
                libc::ENOENT,
            ),
            ("open /proc/self/status".to_owned(), 0),
            ("open /proc/self/root/etc/hostname".to_owned(), libc::ENOENT),
            ("open /sys/class".to_owned(), libc::ENOENT),
            ("open /dev/net/tun".to_owned(), libc::ENOENT),
            ("create /new".to_owned(), libc::EROFS),
            ("mkdir /dev/new".to_owned(), libc::EROFS),
            ("remove /proc/self".to_owned(), libc::EROFS),
            (format!("create {}", path("new")), libc::EROFS),
            (
                format!("connect {}", path("run/other/control.sock")),
                libc::ENOENT,
            ),
            (format!("create {}", path("run/own/new")), 0),
            (format!("run {}", path("run/own/new")), libc::EACCES),
            ("node".to_owned(), libc::EPERM),
        ] {
            if words == "node" && what == "elder " {
                continue;
            }
            let words = words.replace("node", &format!("node {}", path("run/own/node")));
            attempt(
                &place,
                Kind::Jail,
                &path("run/own"),
                &format!("{what}{words}"),
            )
            .returned(errno);
        }
    }
    // Outside it is there.
    let words = format!("connect {}", path("run/other/control.sock"));
    attempt(&place, Kind::Machine, "--sandbox off", &words).returned(0);
}

#[test]
fn a_jail_that_cannot_be_is_refused_in_a_line() {
    if !jails("a_jail_that_cannot_be_is_refused_in_a_line") {
        return;
    }
    let place = Place::new();
    let kernel = place.idle_kernel();
    let run = |words: &str, says: &str| {
        place.refused(
            &format!("--name x --kernel {kernel} --memory 32M --jail {words}"),
            &[says],
        );
    };
    for mode in ["off", "log"] {
        run(&format!("--sandbox {mode}"), "--sandbox on");
    }
    let socket = place.path("console").display().to_string();
    run(&format!("--serial unix={socket}"), "would stay behind");
    run(&format!("--net unix={socket},listen"), "would stay behind");
    run("--nic vfio=0000:00:1f.0", "a function of the host");
    run("--allow-dir /", "below it");
    run("--allow-dir /tmp/..", "..");
    run("--allow-dir /no/such/folder", "no folder");
    assert!(!Path::new(&socket).exists());
    let folder = place.path("").display().to_string();
    // One that it can remove is made, and is gone with it.
    let vm = place.idle(&format!(
        "--jail --serial unix={socket} --allow-dir {folder}"
    ));
    assert!(Path::new(&socket).exists());
    place.ask("stop --force idle");
    assert!(finish(vm).status.success());
    assert!(!Path::new(&socket).exists());
    place.assert_empty();
}
