//! The control group of a VM's process, on a host that has groups of version 2 and lets this user
//! make some: which processes are in it, and what is left. Its bounds need controllers, which many
//! hosts have in groups of version 1: `tests/linux/group.rs`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::place::{LIMIT, Place, finish, signal};

/// A control group for a test; its end takes those in it away.
struct Parent(PathBuf);

impl Parent {
    /// `None` where this host has no place for one, which is said.
    fn new(test: &str) -> Option<Self> {
        let name = format!("sandbox::group::{test}");
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let point = fields.next()?;
            (fields.next() == Some("cgroup2")).then(|| PathBuf::from(point))
        });
        let Some(mount) = mount else {
            skipped::skip(&name, "no cgroup2 is mounted");
            return None;
        };
        let parent = mount.join(format!("test-{}-{test}", std::process::id()));
        if let Err(error) = fs::create_dir(&parent) {
            skipped::skip(&name, &format!("no control group can be made: {error}"));
            return None;
        }
        Some(Self(parent))
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap().map(Result::unwrap);
        let folders = entries.filter(|entry| entry.path().is_dir());
        let mut names: Vec<_> = folders
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[track_caller]
    fn until(&self, names: &[&str]) {
        let deadline = Instant::now() + LIMIT;
        while self.names() != names {
            assert!(Instant::now() < deadline, "{:?}", self.names());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Has it be as systemd hands one over.
    fn hand_over(&self) {
        let path = std::ffi::CString::new(self.0.to_str().unwrap()).unwrap();
        // SAFETY: both names end with a NUL, and the value is as long as is said (setxattr(2)).
        let set = unsafe {
            libc::setxattr(
                path.as_ptr(),
                c"user.delegate".as_ptr(),
                c"1".as_ptr().cast(),
                1,
                0,
            )
        };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    }

    fn has_all_controllers(&self) -> bool {
        let there = fs::read_to_string(self.0.join("cgroup.controllers")).unwrap();
        ["memory", "pids", "cpu"]
            .iter()
            .all(|name| there.contains(name))
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        for name in self.names() {
            let _ = fs::remove_dir(self.0.join(name));
        }
        let _ = fs::remove_dir(&self.0);
    }
}

/// The control group of a process, as the end of its path.
fn is_in(process: u32, end: &str) -> bool {
    let groups = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap();
    groups
        .lines()
        .any(|line| line.starts_with("0::") && line.ends_with(end))
}

/// Whether this host makes no jails, which is said.
fn makes_no_jails() -> bool {
    let makes_none = cofferdam::sandbox::can_jail().is_err();
    if makes_none {
        skipped::skip("sandbox::group", "this host makes no jails");
    }
    makes_none
}

/// A shell that goes into the group and becomes `cofferdam` with these words there.
fn shell_in(place: &Place, parent: &Path, words: &str) -> Command {
    let script = format!(
        "echo $$ > {}/cgroup.procs && exec {} {words}",
        parent.display(),
        env!("CARGO_BIN_EXE_cofferdam")
    );
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &script])
        .env("COFFERDAM_RUNTIME_DIR", place.path("run"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    shell
}

/// A VM that was started in the group.
fn start_in(place: &Place, parent: &Path, words: &str) -> Child {
    let kernel = place.idle_kernel();
    let words = format!("run --name idle --kernel {kernel} --memory 32M {words}");
    let child = shell_in(place, parent, &words).spawn().unwrap();
    place.wait_for("idle");
    child
}

#[test]
fn a_jailed_vm_has_a_control_group_of_its_own_where_one_was_handed_over() {
    if makes_no_jails() {
        return;
    }
    let Some(parent) = Parent::new("handed_over") else {
        return;
    };
    parent.hand_over();
    let place = Place::new();
    for kill in [libc::SIGTERM, libc::SIGKILL] {
        let vm = start_in(&place, &parent.0, "--jail");
        assert!(is_in(vm.id(), "/cofferdam-idle"));
        // Whoever removes it is outside of it.
        parent.until(&["cofferdam-idle", "keepers"]);
        place.ask("mark idle");
        signal(&vm, kill);
        let said = String::from_utf8(finish(vm).stderr).unwrap();
        parent.until(&["keepers"]);
        let lines: Vec<_> = said
            .lines()
            .filter(|line| line.contains("control group"))
            .collect();
        match parent.has_all_controllers() {
            true => assert!(lines.is_empty(), "{said}"),
            false => {
                assert_eq!(lines.len(), 1, "{said}");
                assert!(lines[0].contains("does not bound"), "{said}");
            }
        }
    }
    // One that was left behind, with its keeper gone too, goes with the next start.
    fs::create_dir(parent.0.join("cofferdam-idle")).unwrap();
    let vm = start_in(&place, &parent.0, "--jail");
    assert!(is_in(vm.id(), "/cofferdam-idle"));
    signal(&vm, libc::SIGTERM);
    finish(vm);
    parent.until(&["keepers"]);
}

/// How many keepers wait for the end of this group.
fn keepers(group: &Path) -> usize {
    let processes = fs::read_dir("/proc").unwrap().map(Result::unwrap);
    let words = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let ours = format!("cofferdam-keeper\0{}\0", group.display());
    words.filter(|words| words == ours.as_bytes()).count()
}

#[test]
fn a_start_that_comes_to_nothing_leaves_no_keeper() {
    if makes_no_jails() {
        return;
    }
    let Some(parent) = Parent::new("refused_starts") else {
        return;
    };
    parent.hand_over();
    let place = Place::new();
    let group = parent.0.join("cofferdam-idle");
    let vm = start_in(&place, &parent.0, "--jail");
    assert_eq!(keepers(&group), 1);
    let again = || {
        let mut again = place.command();
        again.args(["run", "--name", "idle", "--kernel", &place.idle_kernel()]);
        again.args(["--memory", "32M", "--cgroup"]).arg(&parent.0);
        again
    };
    // The name is another's.
    for _ in 0..3 {
        let output = again().output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("is running"), "{said}");
        assert_eq!(keepers(&group), 1);
    }
    signal(&vm, libc::SIGTERM);
    finish(vm);
    parent.until(&["keepers"]);
    // The group is another's.
    fs::create_dir(&group).unwrap();
    let mut other = Command::new("sleep").arg("300").spawn().unwrap();
    fs::write(group.join("cgroup.procs"), other.id().to_string()).unwrap();
    let output = again().output();
    let left = keepers(&group);
    other.kill().unwrap();
    other.wait().unwrap();
    let said = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(said.contains("an earlier VM of this name"), "{said}");
    assert_eq!(left, 0);
}

#[test]
fn a_jail_says_in_a_line_that_it_has_no_control_group() {
    if makes_no_jails() {
        return;
    }
    if cofferdam::sandbox::delegated().is_ok() {
        return skipped::skip("sandbox::group", "the tests have a control group to divide");
    }
    let place = Place::new();
    let vm = place.idle("--memory 32M --jail");
    signal(&vm, libc::SIGTERM);
    let said = String::from_utf8(finish(vm).stderr).unwrap();
    let lines: Vec<_> = said
        .lines()
        .filter(|line| line.contains("no control group"))
        .collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(
        lines[0].contains("memory, tasks and processor time"),
        "{said}"
    );
}

#[test]
fn a_control_group_that_cannot_be_is_refused_in_a_line_and_nothing_is_left() {
    let place = Place::new();
    let kernel = place.idle_kernel();
    let run = |words: &str, says: &str| {
        let words = format!("--name x --kernel {kernel} --memory 32M {words}");
        place.refused(&words, &[says]);
    };
    for bound in ["--max-tasks 99", "--max-memory 64M", "--max-cpus 1"] {
        run(bound, "give --cgroup DIR too");
    }
    run("--max-tasks 3 --jail", "16..");
    run("--cgroup /nonexistent", "/nonexistent");
    let folder = place.path("").display().to_string();
    run(
        &format!("--cgroup {folder}"),
        "no control group of version 2",
    );
    let Some(parent) = Parent::new("refused") else {
        return;
    };
    if !parent.has_all_controllers() {
        run(&format!("--cgroup {}", parent.0.display()), "cannot bound");
        parent.until(&[]);
    }
}

/// A service that was started in the group, once it has its socket.
fn serve_in(place: &Place, parent: &Path, words: &str) -> Child {
    let mut shell = shell_in(place, parent, &format!("serve {words}"));
    let service = shell.spawn().unwrap();
    let deadline = Instant::now() + LIMIT;
    while !place.path("run/service.sock").exists() {
        assert!(Instant::now() < deadline, "no service");
        std::thread::sleep(Duration::from_millis(5));
    }
    service
}

#[test]
fn a_service_leaves_the_group_that_its_guests_are_to_have_theirs_in() {
    let Some(parent) = Parent::new("service") else {
        return;
    };
    let place = Place::new();
    let service = serve_in(
        &place,
        &parent.0,
        &format!("--cgroup {}", parent.0.display()),
    );
    assert!(is_in(service.id(), "/service"));
    assert_eq!(
        fs::read_to_string(parent.0.join("cgroup.procs")).unwrap(),
        ""
    );
    signal(&service, libc::SIGTERM);
    finish(service);
}

#[test]
fn a_service_that_jails_divides_its_own_group_or_says_that_guests_have_none() {
    if makes_no_jails() {
        return;
    }
    let Some(parent) = Parent::new("service_jails") else {
        return;
    };
    let place = Place::new();
    for is_handed_over in [false, true] {
        if is_handed_over {
            parent.hand_over();
        }
        let divides = is_handed_over && parent.has_all_controllers();
        let service = serve_in(&place, &parent.0, "--jail");
        assert_eq!(is_in(service.id(), "/service"), divides);
        let handed_on = fs::read_to_string(parent.0.join("cgroup.subtree_control")).unwrap();
        let all = ["memory", "pids", "cpu"];
        assert_eq!(all.iter().all(|name| handed_on.contains(name)), divides);
        signal(&service, libc::SIGTERM);
        let said = String::from_utf8(finish(service).stderr).unwrap();
        let lines = said
            .lines()
            .filter(|line| line.contains("no control groups around guests"));
        assert_eq!(lines.count(), usize::from(!divides), "{said}");
    }
}
