//! A systemd that runs: the first process of namespaces of its own, over a copy of this host's root
//! that is thrown away.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Puts the root together in the folder `$1`, and becomes systemd in it. What it could do to the
/// host's clock, modules and log it may not, and of its devices it has a few.
const ENTER: &str = r#"
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty kvm; do
    touch "dev/$device"
    mount --bind "/dev/$device" "dev/$device"
done
mkdir dev/shm dev/pts run/old
ln -s /proc/self/fd dev/fd
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
rm -rf etc/systemd/system var/lib/cofferdam etc/cofferdam
mkdir etc/systemd/system
: > etc/fstab
pivot_root . run/old
cd /
umount -l run/old
rmdir run/old
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    setpriv --bounding-set=-sys_module,-sys_time,-syslog,-sys_rawio \
    /lib/systemd/systemd --system --unit=basic.target
"#;

/// It.
pub struct System {
    unshare: Child,
    /// The number of systemd's process here.
    init: u32,
    group: PathBuf,
    /// What of this host is seen there, too.
    pub folder: tempfile::TempDir,
}

impl System {
    /// Starts it and waits until it is there. The error is why this host has none.
    pub fn start() -> Result<Self, String> {
        let mount = able()?;
        let group = mount.join(format!("test-{}-systemd", std::process::id()));
        fs::create_dir(&group).map_err(|error| format!("no control group: {error}"))?;
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let root = folder.path().join("root");
        fs::create_dir(&root).unwrap();
        // In its group before it has namespaces, so that it sees nothing above.
        let join = r#"echo $$ > "$1/cgroup.procs"; exec unshare -mpuinC --fork --kill-child sh -c "$3" sh "$2""#;
        let unshare = Command::new("sh")
            .args(["-c", join, "sh"])
            .args([&group, &root])
            .arg(ENTER)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut system = Self {
            unshare,
            init: 0,
            group,
            folder,
        };
        let deadline = Instant::now() + LIMIT;
        while !system.is_up() {
            if let Some(status) = system.unshare.try_wait().unwrap() {
                return Err(format!("systemd cannot be started here ({status})"));
            }
            assert!(Instant::now() < deadline, "systemd does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(system)
    }

    fn is_up(&mut self) -> bool {
        let parent = self.unshare.id();
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
        let child = children.unwrap_or_default();
        let Some(init) = child.split_whitespace().next() else {
            return false;
        };
        let name = fs::read_to_string(format!("/proc/{init}/comm")).unwrap_or_default();
        self.init = init.parse().unwrap();
        name.trim() == "systemd" && self.tries("systemctl is-active basic.target").0
    }

    /// Runs a line of shell in it: whether it succeeded, and what it said.
    pub fn tries(&self, line: &str) -> (bool, String) {
        let output = Command::new("nsenter")
            .args(["-t", &self.init.to_string(), "-a", "-r", "-w", "--"])
            .args(["sh", "-c", line])
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env_remove("COFFERDAM_RUNTIME_DIR")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).trim_end().to_owned();
        (output.status.success(), text)
    }

    /// The same; it must succeed.
    #[track_caller]
    pub fn does(&self, line: &str) -> String {
        let (done, text) = self.tries(line);
        if !done {
            let log = self.tries("journalctl --no-pager -n 40 -o cat").1;
            panic!("{line}: {text}\n{log}");
        }
        text
    }

    /// Waits until it succeeds.
    #[track_caller]
    pub fn until(&self, line: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            let (done, text) = self.tries(line);
            if done {
                return text;
            }
            if Instant::now() >= deadline {
                return self.does(line);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A file of this host for it: its path there.
    pub fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path.display().to_string()
    }
}

impl Drop for System {
    fn drop(&mut self) {
        // systemd, as the first process of its namespace, goes with it, and all others with systemd.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        let deadline = Instant::now() + LIMIT;
        while !remove(&self.group) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Removes a control group with those below it; whether it is gone.
fn remove(group: &Path) -> bool {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove(&entry.path());
        }
    }
    fs::remove_dir(group).is_ok() || !group.exists()
}

/// Where control groups are mounted, on a host that can have this.
fn able() -> Result<PathBuf, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("only root can start a systemd of its own".to_owned());
    }
    for program in ["unshare", "nsenter", "setpriv", "dpkg", "curl"] {
        if !super::is_there(program) {
            return Err(format!("there is no {program}"));
        }
    }
    for path in ["/lib/systemd/systemd", "/dev/kvm"] {
        if !Path::new(path).exists() {
            return Err(format!("there is no {path}"));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mount = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let point = fields.next()?;
        (fields.next() == Some("cgroup2")).then(|| PathBuf::from(point))
    });
    mount.ok_or_else(|| "no cgroup2 is mounted".to_owned())
}
