//! Signals as something to read: the ones that ask a run to end, or to stop and go on.
//!
//! They are blocked in every thread and read from a `signalfd`, so that they arrive at the event loop
//! like everything else and whatever was made is taken down in order. A run that was asked to end by a
//! signal ends *by* that signal, after all is cleaned up: a shell or a supervisor sees what it expects.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Signals that ask for an end.
const ENDING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// An end, by this signal.
    End(EndingSignal),
    /// A stop, as Ctrl-Z or `kill -TSTP` asks for.
    Stop,
    /// Nothing: the process was stopped and goes on.
    Continued,
}

/// A signal that asks for an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndingSignal(libc::c_int);

impl EndingSignal {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self.0 {
            libc::SIGINT => "SIGINT",
            libc::SIGTERM => "SIGTERM",
            libc::SIGHUP => "SIGHUP",
            _ => "SIGQUIT",
        }
    }

    /// Ends this process by the signal. Everything must be cleaned up already.
    pub fn end_process(self) -> ! {
        // SAFETY: plain system calls on this process; the set is initialised by sigemptyset.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, self.0);
            libc::signal(self.0, libc::SIG_DFL);
            libc::raise(self.0);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        }
        // Reached only where the signal is ignored by design of the caller (a pid 1).
        std::process::exit(128 + self.0)
    }
}

/// The signals of this process that concern a run.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals in this thread and those it starts from now on. Call it before the first
    /// thread is started.
    ///
    /// A signal that the parent has set to be ignored (`nohup`) stays ignored.
    pub fn block() -> std::io::Result<Self> {
        // SAFETY: the set is initialised by sigemptyset before it is used; signalfd gives a new
        // descriptor that nobody else owns.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in ENDING.into_iter().chain([libc::SIGTSTP, libc::SIGCONT]) {
                if !ignored(signal) {
                    libc::sigaddset(&raw mut set, signal);
                }
            }
            let error =
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            if error != 0 {
                return Err(std::io::Error::from_raw_os_error(error));
            }
            let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(Self(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// The next signal that came, if any.
    pub fn next(&self) -> std::io::Result<Option<Asked>> {
        let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.0, &mut info[..]) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
            Ok(_) => {
                // `ssi_signo` is the first field.
                let number = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
                Ok(Some(match number {
                    libc::SIGTSTP => Asked::Stop,
                    libc::SIGCONT => Asked::Continued,
                    ending => Asked::End(EndingSignal(ending)),
                }))
            }
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Stops this process until it is told to go on, as an unblocked `SIGTSTP` would.
pub fn stop_process() {
    // SAFETY: a plain system call on this process.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// Whether the parent has set `signal` to be ignored.
fn ignored(signal: libc::c_int) -> bool {
    // SAFETY: the old action is written to memory of its size; nothing is changed.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
    }
}
