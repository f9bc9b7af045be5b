//! Processes of this host: what another one does, and how it is made to end.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It runs, or waits for something.
    Lives,
    /// A signal or a debugger has stopped it.
    Stopped,
    /// It has ended, and was not waited for.
    Ended,
}

impl State {
    /// What the process `pid` does; `None` if there is none.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may contain anything, also parentheses (proc_pid_stat(5)).
        let (_, rest) = stat.rsplit_once(')')?;
        Some(match rest.split_whitespace().next()? {
            "T" | "t" => Self::Stopped,
            "Z" | "X" => Self::Ended,
            _ => Self::Lives,
        })
    }
}

/// A process that stays the same one, also when it has ended and its number is another's.
pub struct Process(rustix::fd::OwnedFd);

impl Process {
    /// The process that has the number `pid` now.
    ///
    /// # Errors
    /// There is none, or the host's kernel cannot do that.
    pub fn open(pid: u32) -> std::io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or(std::io::ErrorKind::NotFound)?;
        Ok(Self(pidfd_open(pid, PidfdFlags::empty())?))
    }

    /// Asks it to end (`SIGTERM`).
    ///
    /// # Errors
    /// It has ended already, or is somebody else's.
    pub fn ask_to_end(&self) -> std::io::Result<()> {
        Ok(pidfd_send_signal(&self.0, Signal::TERM)?)
    }

    /// Ends it at once (`SIGKILL`), also if it is stopped.
    ///
    /// # Errors
    /// It has ended already, or is somebody else's.
    pub fn kill(&self) -> std::io::Result<()> {
        Ok(pidfd_send_signal(&self.0, Signal::KILL)?)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_seen_to_live_to_be_stopped_and_to_end() {
        let mut cat = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let process = Process::open(cat.id()).unwrap();
        let wait_for = |state| {
            while State::of(cat.id()) != Some(state) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        };
        wait_for(State::Lives);
        pidfd_send_signal(&process.0, Signal::STOP).unwrap();
        wait_for(State::Stopped);
        process.kill().unwrap();
        wait_for(State::Ended);
        cat.wait().unwrap();
        assert!(process.kill().is_err());
        assert_eq!(State::of(u32::MAX), None);
    }
}
