//! The control group of a VM's process, on a kernel that has the controllers: its bounds hold for
//! whoever is in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::wait_until;

/// Control groups of version 2, mounted for a test, and those that it makes.
struct Groups {
    folder: tempfile::TempDir,
    made: Vec<PathBuf>,
}

impl Groups {
    /// `None` where they cannot be had, which is said.
    fn mount(test: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "cgroup2", "none"])
            .arg(folder.path())
            .output();
        if !mounted.is_ok_and(|output| output.status.success()) {
            skipped::skip(test, "cgroup2 cannot be mounted: this takes root");
            return None;
        }
        let groups = Self {
            folder,
            made: Vec::new(),
        };
        let control = groups.folder.path().join("cgroup.subtree_control");
        if let Err(error) = fs::write(control, "+memory +pids +cpu") {
            skipped::skip(test, &format!("cgroup2 has not all controllers: {error}"));
            return None;
        }
        Some(groups)
    }

    /// A new group that can hand on all of its controllers.
    fn made(&mut self, name: &str) -> PathBuf {
        let name = format!("test-{}-{name}", std::process::id());
        let group = self.folder.path().join(name);
        fs::create_dir(&group).unwrap();
        self.made.push(group.clone());
        group
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for group in &self.made {
            let _ = fs::remove_dir(group);
        }
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.folder.path())
            .status();
    }
}

/// Runs a shell's script in a group: its status and what it said.
fn inside(group: &Path, script: &str) -> (Option<i32>, String) {
    let script = format!(
        "echo $$ > {}/cgroup.procs || exit 99; {script}",
        group.display()
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), said)
}

#[test]
#[ignore = "needs a kernel with control groups of version 2: cargo xtask test runs it in the lab"]
fn the_bounds_of_a_vms_control_group_hold_and_it_goes_with_the_vm() {
    let name = "linux::group::the_bounds_of_a_vms_control_group_hold_and_it_goes_with_the_vm";
    let Some(mut groups) = Groups::mount(name) else {
        return;
    };
    let parent = groups.made("vms");
    let folder = tempfile::tempdir().unwrap();
    let images = std::path::absolute(super::options().images).unwrap();
    let start = |name: &str, words: &str| {
        Command::new(env!("CARGO_BIN_EXE_cofferdam"))
            .env("COFFERDAM_RUNTIME_DIR", folder.path())
            .args(["run", "--name", name, "--serial", "control", "--kernel"])
            .arg(images.join("vmlinux"))
            .arg("--cgroup")
            .arg(&parent)
            .args(words.split_whitespace())
            .stdin(Stdio::null())
            .spawn()
            .unwrap()
    };
    let read = |file: &str| fs::read_to_string(parent.join(file)).unwrap_or_default();
    let socket = |name: &str| folder.path().join(name).join("control.sock");
    let words = "--memory 128M --vcpus 2 --max-tasks 40 --max-memory 256M --max-cpus 1";
    let mut vm = start("one", words);
    wait_until("the VM", || {
        std::os::unix::net::UnixStream::connect(socket("one")).is_ok()
    });
    let own = fs::read_to_string(format!("/proc/{}/cgroup", vm.id())).unwrap();
    assert!(own.contains("-vms/cofferdam-one\n"), "{own}");
    let values = ["memory.max", "pids.max", "cpu.max", "memory.oom.group"]
        .map(|file| read(&format!("cofferdam-one/{file}")).trim().to_owned());
    assert_eq!(values, ["268435456", "40", "100000 100000", "1"]);
    // What of it is in the guest's memory goes to no swap either, where the kernel counts that.
    let swap = read("cofferdam-one/memory.swap.max");
    assert!(matches!(swap.trim(), "" | "0"), "{swap}");
    // Its time is counted in periods against the bound; that it is held to it is the kernel's.
    wait_until("a period", || {
        let counts = read("cofferdam-one/cpu.stat");
        let periods = counts
            .lines()
            .find_map(|line| line.strip_prefix("nr_periods "));
        periods.is_some_and(|periods| periods != "0")
    });
    // No more tasks than there may be.
    let group = parent.join("cofferdam-one");
    // Who holds what it says on is waited for.
    let fork = "for i in $(seq 60); do sleep 30 > /dev/null 2>&1 & done";
    let (_, said) = inside(&group, fork);
    // As dash says it, or bash.
    let refused = ["Cannot fork", "Resource temporarily unavailable"];
    assert!(refused.iter().any(|words| said.contains(words)), "{said}");
    let events = read("cofferdam-one/pids.events");
    assert!(!events.contains("max 0"), "{events}");
    let _ = vm.kill();
    let _ = vm.wait();
    // Whoever is in it yet is somebody else; then it goes, though the VM was killed.
    let _ = fs::write(group.join("cgroup.kill"), "1");
    wait_until("the group's end", || !group.exists());
    // With too little memory the VM ends, as one.
    let mut vm = start("two", "--memory 128M --max-memory 16M");
    let status = vm.wait().unwrap();
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(status.signal(), Some(libc::SIGKILL), "{status:?}");
    wait_until("the group's end", || !parent.join("cofferdam-two").exists());
    // A group with processes of its own is not divided, and nothing is left of trying.
    let taken = groups.made("taken");
    let mut other = Command::new("sleep").arg("300").spawn().unwrap();
    fs::write(taken.join("cgroup.procs"), other.id().to_string()).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_cofferdam"))
        .env("COFFERDAM_RUNTIME_DIR", folder.path())
        .args(["run", "--name", "three", "--serial", "control", "--kernel"])
        .arg(images.join("vmlinux"))
        .arg("--cgroup")
        .arg(&taken)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("has processes of its own"), "{said}");
    wait_until("the group's end", || {
        !taken.join("cofferdam-three").exists()
    });
    other.kill().unwrap();
    other.wait().unwrap();
}
