//! Guests that end with the process that has them, however that ends.
//!
//! ```text
//!   SIGTERM, SIGINT, ...  ─┐                        each VM asked to end (pidfd), waited for,
//!   standard input closes ─┴► a thread of its own ─► killed if it does not; its folder removed ─► the process ends
//!   the process is killed ──► the kernel asks each VM to end (PR_SET_PDEATHSIG); folders stay
//! ```
//!
//! What the process was at is broken off in the middle: whoever has begun this writes files that
//! can be gone on with.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::signals::{Asked, EndingSignal, Signals, stop_process};

/// How long VMs may take to end once they were asked, all together.
const END_TIME: Duration = Duration::from_secs(10);

/// Exit status of a process that was told to end by its standard input's end.
const GIVEN_UP: i32 = 3;

static RUNNING: Mutex<Running> = Mutex::new(Running {
    are_bound: false,
    is_ending: false,
    last: 0,
    guests: Vec::new(),
});

/// Held by who ends all VMs.
static ENDS: Mutex<()> = Mutex::new(());

/// The VMs that this process has.
struct Running {
    /// They end with this process.
    are_bound: bool,
    /// It is ending: no other is begun.
    is_ending: bool,
    last: u64,
    guests: Vec<(u64, OwnedFd, PathBuf)>,
}

fn running() -> MutexGuard<'static, Running> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A VM that is known here, until this is dropped.
#[derive(Debug)]
pub struct Known(Option<u64>);

impl Drop for Known {
    fn drop(&mut self) {
        if let Some(number) = self.0 {
            running().guests.retain(|(other, ..)| *other != number);
        }
    }
}

/// Starts a VM's process, with `folder` for what it makes.
///
/// # Errors
/// It cannot be started, or this process is ending.
pub fn spawn(command: &mut Command, folder: &Path) -> anyhow::Result<(Child, Known)> {
    let mut running = running();
    ensure!(!running.is_ending, "this process is asked to end");
    if !running.are_bound {
        return Ok((command.spawn()?, Known(None)));
    }
    let parent = std::process::id().cast_signed();
    // SAFETY: system calls with numbers, which may be made between fork and exec
    // (signal-safety(7), prctl(2)).
    unsafe {
        command.pre_exec(move || {
            let signal = libc::c_ulong::from(libc::SIGTERM.cast_unsigned());
            if libc::prctl(libc::PR_SET_PDEATHSIG, signal, 0, 0, 0) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // Of a parent that has ended before there is no signal any more.
            match libc::getppid() == parent {
                true => Ok(()),
                false => Err(std::io::Error::from_raw_os_error(libc::ESRCH)),
            }
        });
    }
    let child = command.spawn()?;
    let pidfd = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .map(|pid| pidfd_open(pid, PidfdFlags::empty()));
    let Some(Ok(pidfd)) = pidfd else {
        // Linux before 5.3: the kernel's signal remains.
        return Ok((child, Known(None)));
    };
    running.last += 1;
    let number = running.last;
    running.guests.push((number, pidfd, folder.to_owned()));
    Ok((child, Known(Some(number))))
}

/// From now on VMs that this process starts end with it. It has one thread.
#[derive(Debug)]
pub struct Together(());

impl Together {
    /// Begins. With `input`, the end of standard input is the end of this process, too.
    ///
    /// # Errors
    /// There can be no threads for it.
    pub fn begin(input: bool) -> anyhow::Result<Self> {
        let signals = Signals::block().context("cannot block signals")?;
        running().are_bound = true;
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
        thread("signals")
            .spawn(move || {
                loop {
                    match signals.wait() {
                        Ok(Asked::End(signal)) => end_by(signal),
                        Ok(Asked::Stop) => stop_process(),
                        Ok(Asked::Continued) => {}
                        Err(error) => return tracing::warn!("cannot wait for signals: {error}"),
                    }
                }
            })
            .context("cannot start a thread")?;
        if input {
            thread("input")
                .spawn(|| {
                    // What is said there is nothing to us.
                    let mut bytes = [0; 256];
                    while std::io::stdin().read(&mut bytes).is_ok_and(|read| read > 0) {}
                    end_all();
                    std::process::exit(GIVEN_UP);
                })
                .context("cannot start a thread")?;
        }
        Ok(Self(()))
    }
}

impl Drop for Together {
    /// Whoever was broken off waits for the end.
    fn drop(&mut self) {
        while running().is_ending {
            std::thread::park();
        }
    }
}

fn end_by(signal: EndingSignal) -> ! {
    end_all();
    signal.end_process()
}

/// Ends all VMs and removes what they made. Who comes second waits until the first has done it.
fn end_all() {
    let _ends = ENDS.lock().unwrap_or_else(PoisonError::into_inner);
    let guests = {
        let mut running = running();
        running.is_ending = true;
        std::mem::take(&mut running.guests)
    };
    for (_, guest, _) in &guests {
        // One that has ended is not there any more.
        let _ = pidfd_send_signal(guest, Signal::TERM);
    }
    let deadline = Instant::now() + END_TIME;
    for (_, guest, folder) in &guests {
        if !ends_before(guest, deadline) {
            let _ = pidfd_send_signal(guest, Signal::KILL);
            ends_before(guest, Instant::now() + END_TIME);
        }
        // Whoever has it may be removing it at the same time.
        let _ = std::fs::remove_dir_all(folder);
    }
}

/// Whether a process has ended by then: a pidfd can be read from when it has (pidfd_open(2)).
fn ends_before(process: &OwnedFd, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).ok();
        let mut polled = [PollFd::new(process, PollFlags::IN)];
        match poll(&mut polled, left.as_ref()) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}
