//! Signals as something to wait for: the ones that ask a run to end, or to stop and go on.
//!
//! They are blocked in every thread and taken by one thread that does nothing else, so that they
//! are heard even while the event loop or a vCPU is stuck in a write to a terminal that nobody
//! reads. A run that was asked to end by a signal ends *by* that signal, after all is cleaned up: a
//! shell or a supervisor sees what it expects.

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

/// The signals of this process that concern a run, blocked.
pub struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks the signals in this thread and those it starts from now on. Call it before the first
    /// thread is started.
    ///
    /// A signal that the parent has set to be ignored (`nohup`) stays ignored.
    pub fn block() -> std::io::Result<Self> {
        // SAFETY: the set is initialised by sigemptyset before it is used.
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
            Ok(Self(set))
        }
    }

    /// Waits for the next signal.
    pub fn wait(&self) -> std::io::Result<Asked> {
        let mut number = 0;
        // SAFETY: the set was initialised by `block`; the number is written to memory of its size.
        let error = unsafe { libc::sigwait(&raw const self.0, &raw mut number) };
        match (error, number) {
            (0, libc::SIGTSTP) => Ok(Asked::Stop),
            (0, libc::SIGCONT) => Ok(Asked::Continued),
            (0, ending) => Ok(Asked::End(EndingSignal(ending))),
            (error, _) => Err(std::io::Error::from_raw_os_error(error)),
        }
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
