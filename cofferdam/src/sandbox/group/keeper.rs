//! The process that removes the control group of a VM when that has ended: this program, outside of
//! the group.

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use super::PREFIX;

/// How the program is called as a keeper.
const KEEPER: &str = "cofferdam-keeper";

/// Between two tries to remove a group whose process is ending, and between later ones.
const POLL: Duration = Duration::from_millis(20);
const SLOW_POLL: Duration = Duration::from_millis(500);
const QUICK_POLLS: u32 = 100;

/// The keeper of a group that is being made. Dropping it ends it, and removes the group if nobody is
/// in there.
pub(super) struct Keeper<'a> {
    pub(super) child: Child,
    group: &'a Path,
    stays: bool,
}

impl<'a> Keeper<'a> {
    pub(super) fn start(group: &'a Path) -> anyhow::Result<Self> {
        Ok(Self {
            child: keep(group).context("cannot start its keeper")?,
            group,
            stays: false,
        })
    }

    /// Leaves the group to it: by what it hears of this process's end.
    pub(super) fn stays(&mut self) -> anyhow::Result<ChildStdin> {
        let input = self.child.stdin.take();
        let input = input.context("its keeper hears nothing")?;
        self.stays = true;
        Ok(input)
    }
}

impl Drop for Keeper<'_> {
    fn drop(&mut self) {
        if !self.stays {
            let _ = self.child.kill();
            let _ = self.child.wait();
            let _ = fs::remove_dir(self.group);
        }
    }
}

/// Starts the keeper of a group: this program, outside of it.
fn keep(group: &Path) -> io::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(KEEPER)
        .arg(group)
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: `setsid` is a plain system call, which may be made between fork and exec
    // (signal-safety(7)).
    unsafe {
        command.pre_exec(|| {
            // Signals of the VM's terminal are not for it.
            rustix::process::setsid()?;
            Ok(())
        });
    }
    command.spawn()
}

/// What the program does where it was started as a keeper: waits for the VM's end and removes its
/// group. `None` where it was not.
pub fn keeper(words: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let mut words = words.into_iter();
    words.next().filter(|word| word == KEEPER)?;
    let group = PathBuf::from(words.next()?);
    Some(match remove_at_end(&group) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}

fn remove_at_end(group: &Path) -> anyhow::Result<()> {
    let name = group.file_name().unwrap_or_default().as_bytes();
    ensure!(
        name.starts_with(PREFIX.as_bytes()),
        "this is no group of ours"
    );
    let mut bytes = [0; 64];
    while std::io::stdin().read(&mut bytes)? > 0 {}
    // Who has been taken over may close its end early: the group stays for as long as somebody is
    // in it.
    for polls in 0.. {
        match fs::remove_dir(group) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error.into()),
            Ok(()) => return Ok(()),
        }
        std::thread::sleep(match polls {
            0..QUICK_POLLS => POLL,
            _ => SLOW_POLL,
        });
    }
    bail!("it never ended")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_keeper_keeps_and_only_groups_of_ours() {
        let words = |words: &[&str]| keeper(words.iter().map(OsString::from)).is_some();
        assert!(!words(&["cofferdam", "run"]) && !words(&[]));
        assert!(!words(&[KEEPER]), "without a group it is none");
        remove_at_end(Path::new("/tmp")).unwrap_err();
        remove_at_end(Path::new("/")).unwrap_err();
    }
}
