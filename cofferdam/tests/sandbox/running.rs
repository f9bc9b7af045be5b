//! The walls around processes that run, as the kernel shows them (proc_pid_status(5),
//! proc_pid_limits(5)).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Child;

use crate::common::place::{Place, end, finish, signal};

/// `CAP_IPC_LOCK` as a bit.
pub const IPC_LOCK: u64 = 1 << 14;

/// What `status` says of each thread of a process, by the thread's name and number.
fn threads(process: u32) -> BTreeMap<(String, u32), BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let read = |task: fs::DirEntry| {
        // One that ended meanwhile.
        let text = fs::read_to_string(task.path().join("status")).ok()?;
        let fields = text.lines().filter_map(|line| line.split_once(":\t"));
        let fields: BTreeMap<_, _> = fields
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect();
        let number = task.file_name().to_str().unwrap().parse().unwrap();
        Some(((fields["Name"].clone(), number), fields))
    };
    tasks.filter_map(|task| read(task.unwrap())).collect()
}

fn own_capabilities() -> u64 {
    let own = threads(std::process::id());
    let first = own.values().next().unwrap();
    u64::from_str_radix(&first["CapEff"], 16).unwrap()
}

/// Who may take capabilities out of its bounding set (`CAP_SETPCAP` of linux/capability.h).
const SETPCAP: u64 = 1 << 8;

/// Each thread of the process has a filter, no new privileges, and no capability but of
/// `capabilities`.
#[track_caller]
pub fn are_behind_walls(process: u32, capabilities: u64) {
    let threads = threads(process);
    assert!(!threads.is_empty());
    let namespace = |process| fs::read_link(format!("/proc/{process}/ns/user")).unwrap();
    let is_jailed = namespace(process) != namespace(std::process::id());
    for ((name, _), status) in threads {
        assert_eq!(status["Seccomp"], "2", "{name}: {status:?}");
        assert_eq!(status["NoNewPrivs"], "1", "{name}: {status:?}");
        for set in ["CapEff", "CapPrm"] {
            let found = u64::from_str_radix(&status[set], 16).unwrap();
            assert_eq!(
                found,
                own_capabilities() & capabilities,
                "{name}: {status:?}"
            );
        }
        // An ordinary user's bounding set stays, but in a jail, whose user namespace gives all
        // rights to begin with: there is nothing that it could be given.
        let is_root = status["Uid"].starts_with("0\t");
        let bounded = is_jailed || is_root && own_capabilities() & SETPCAP != 0;
        let sets = ["CapInh", "CapAmb", "CapBnd"].into_iter();
        for set in sets.filter(|set| bounded || *set != "CapBnd") {
            let found = u64::from_str_radix(&status[set], 16).unwrap();
            assert_eq!(found & !capabilities, 0, "{name}, {set}: {status:?}");
        }
    }
}

/// Bytes of the program's text that are in a process's memory, in KiB.
fn resident_text(process: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{process}/smaps")).unwrap();
    let (mut is_text, mut sum) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap(), words.next().unwrap_or_default());
        if second == "r-xp" {
            is_text = line.ends_with("/cofferdam");
        } else if !first.ends_with(':') {
            is_text = false;
        } else if is_text && first == "Rss:" {
            sum += second.parse::<u64>().unwrap();
        }
    }
    sum
}

#[test]
fn a_guest_that_goes_on_is_told_so_from_behind_the_walls_and_does_not_wait_for_text_that_is_dropped()
 {
    let place = Place::new();
    let vm = place.idle("--memory 32M");
    let fresh = resident_text(vm.id());
    let dir = place.path("saved").display().to_string();
    place.ask(&format!("snapshot idle {dir} --stop"));
    finish(vm);
    for way in ["", " --lazy"] {
        let log = place.path("log").display().to_string();
        let words = format!("run --snapshot {dir} --name copy --serial file={log}{way}");
        let copy = place.command().args(words.split(' ')).spawn().unwrap();
        place.wait_for("copy");
        are_behind_walls(copy.id(), IPC_LOCK);
        // There is no agent in there, so it waits for one still.
        let names: Vec<_> = threads(copy.id()).into_keys().collect();
        assert!(
            names.iter().any(|(name, _)| name == "after-restore"),
            "{names:?}"
        );
        // Its memory may have huge pages from now on (proc_pid_status(5); since Linux 5.0).
        let status = threads(copy.id()).into_values().next().unwrap();
        let huge = status.get("THP_enabled").map(String::as_str);
        assert!(matches!(huge, None | Some("1")), "{way}: {huge:?}");
        // What the start needed is there until the guest was told.
        let restored = resident_text(copy.id());
        assert!(restored > fresh + 512, "{fresh} and {restored} KiB");
        end(&place, copy, &[]);
    }
}

fn has_no_core(process: u32) {
    let limits = fs::read_to_string(format!("/proc/{process}/limits")).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max core"));
    let words: Vec<_> = line.unwrap().split_whitespace().collect();
    assert_eq!(words[4..6], ["0", "0"], "{limits}");
}

#[test]
fn all_threads_of_a_vm_are_behind_walls_and_vcpus_behind_one_more() {
    let place = Place::new();
    let vm = place.idle("--net user --vcpus 2");
    are_behind_walls(vm.id(), IPC_LOCK);
    has_no_core(vm.id());
    let filters = |is_vcpu: bool| -> Vec<u32> {
        let threads = threads(vm.id()).into_iter();
        // KVM makes a thread of its own of that of the first vCPU.
        let ours = threads.filter(|((name, _), _)| !name.starts_with("kvm-"));
        let of = ours.filter(|((name, _), _)| name.starts_with("vcpu") == is_vcpu);
        // Since Linux 5.9.
        of.filter_map(|(_, status)| status.get("Seccomp_filters")?.parse().ok())
            .collect()
    };
    assert!(
        filters(true).iter().all(|count| *count == 3),
        "{:?}",
        threads(vm.id())
    );
    assert!(
        filters(false).iter().all(|count| *count == 2),
        "{:?}",
        threads(vm.id())
    );
    // And it does all that a VM does.
    place.ask("pause idle");
    place.ask("resume idle");
    place.ask("mark idle");
    place.ask("rewind idle");
    place.ask("reset idle");
    assert_eq!(place.status()["state"], "running");
    are_behind_walls(vm.id(), IPC_LOCK);
    end(&place, vm, &[]);
}

#[test]
fn without_the_sandbox_nothing_is_given_up() {
    let place = Place::new();
    let vm = place.idle("--sandbox off");
    for ((name, _), status) in threads(vm.id()) {
        assert_eq!(status["Seccomp"], "0", "{name}: {status:?}");
        assert_eq!(status["NoNewPrivs"], "0", "{name}: {status:?}");
        let found = u64::from_str_radix(&status["CapEff"], 16).unwrap();
        assert_eq!(found, own_capabilities(), "{name}: {status:?}");
    }
    end(&place, vm, &[]);
}

#[test]
fn a_vm_that_is_only_watched_runs_as_before() {
    let place = Place::new();
    let vm = place.idle("--sandbox log");
    for ((name, _), status) in threads(vm.id()) {
        assert_eq!(status["Seccomp"], "2", "{name}: {status:?}");
        let found = u64::from_str_radix(&status["CapEff"], 16).unwrap();
        assert_eq!(found, own_capabilities(), "{name}: {status:?}");
    }
    place.ask("pause idle");
    end(&place, vm, &[]);
}

/// Starts `cofferdam` with these words and waits for its socket `path` in the runtime folder.
pub fn started(place: &Place, words: &str, path: &str) -> Child {
    let mut command = place.command();
    command.stderr(std::process::Stdio::inherit());
    let child = command.args(words.split(' ')).spawn().unwrap();
    let socket = place.path("run").join(path);
    while UnixStream::connect(&socket).is_err() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child
}

#[test]
fn a_device_host_is_behind_walls() {
    let place = Place::new();
    let host = started(
        &place,
        "device serve nic --net user",
        ".devices/nic/control.sock",
    );
    are_behind_walls(host.id(), IPC_LOCK);
    has_no_core(host.id());
    place.ask("device status nic");
    place.ask("device stop nic");
    finish(host);
}

/// It keeps capabilities for guests to begin with, and can be given none.
#[test]
fn the_service_is_behind_walls_that_its_guests_can_live_behind() {
    let place = Place::new();
    let service = started(&place, "serve", "service.sock");
    are_behind_walls(service.id(), u64::MAX);
    signal(&service, libc::SIGTERM);
    finish(service);
}

/// An ordinary user who may use `/dev/kvm` runs a guest, has nothing to give up but is filtered all
/// the same.
#[test]
fn a_user_of_the_devices_group_runs_a_guest_without_root() {
    let name = "sandbox::running::a_user_of_the_devices_group_runs_a_guest_without_root";
    run_as_nobody(name, &[], 0);
}

/// So that user may jail it, too: a capability that is shown is one in the jail's own user
/// namespace.
#[test]
fn a_user_of_the_devices_group_runs_a_guest_in_a_jail_without_root() {
    let name = "sandbox::running::a_user_of_the_devices_group_runs_a_guest_in_a_jail_without_root";
    match cofferdam::sandbox::can_jail() {
        Ok(()) => run_as_nobody(name, &["--jail"], IPC_LOCK),
        Err(why) => skipped::skip(name, &format!("this host makes no jails: {why}")),
    }
}

fn run_as_nobody(name: &str, words: &[&str], capabilities: u64) {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() || !std::path::Path::new("/dev/kvm").exists() {
        skipped::skip(
            name,
            "only root can be another user, and there has to be KVM",
        );
        return;
    }
    let place = Place::new();
    let folder = place.folder.path();
    // What that user can reach: the program, a folder, and a node of the device for its group.
    let program = place.path("cofferdam");
    fs::copy(env!("CARGO_BIN_EXE_cofferdam"), &program).unwrap();
    place.idle_kernel();
    let node = std::ffi::CString::new(place.path("kvm").to_str().unwrap()).unwrap();
    let made = std::process::Command::new("sh")
        .args(["-ec", "chown -R 65534:65534 \"$0\"; mknod \"$0\"/kvm c 10 232; chmod 660 \"$0\"/kvm; chown 0:65534 \"$0\"/kvm"])
        .arg(folder)
        .status()
        .unwrap();
    assert!(made.success());
    let mut command = std::process::Command::new(&program);
    command
        .args(["run", "--name", "idle", "--memory", "32M", "--kernel"])
        .arg(place.path("idle"))
        .args(words)
        .env("COFFERDAM_RUNTIME_DIR", place.path("run"))
        .current_dir("/")
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null());
    // SAFETY: system calls only, between fork and exec; pointers are to strings that live as long
    // as the command.
    unsafe {
        command.pre_exec(move || {
            let root = c"/".as_ptr();
            let none = std::ptr::null::<libc::c_char>();
            let private = libc::MS_REC | libc::MS_PRIVATE;
            let there = c"/dev/kvm".as_ptr();
            let done = libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(none, root, none, private, std::ptr::null()) == 0
                && libc::mount(node.as_ptr(), there, none, libc::MS_BIND, std::ptr::null()) == 0
                && libc::setgroups(0, std::ptr::null()) == 0
                && libc::setgid(NOBODY) == 0
                && libc::setuid(NOBODY) == 0;
            match done {
                true => Ok(()),
                false => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let vm = match command.spawn() {
        Ok(vm) => vm,
        Err(error) => {
            skipped::skip(name, &format!("no process of another user: {error}"));
            return;
        }
    };
    place.wait_for("idle");
    are_behind_walls(vm.id(), capabilities);
    let status = threads(vm.id());
    let user = status.values().next().unwrap()["Uid"].clone();
    assert!(user.starts_with("65534\t65534\t65534"), "{user}");
    place.ask("mark idle");
    place.ask("stop --force idle");
    assert!(finish(vm).status.success());
    place.assert_empty();
}
