//! The terminal of an interactive run: raw while the guest has it, and put back whatever happens.
//!
//! ```text
//! normal end, error, panic   Drop of `RawTerminal`, or the panic hook before the message
//! SIGINT, SIGTERM, ...       the run ends in order, then as above (see `signals`)
//! SIGSEGV, SIGABRT, ...      a handler that only calls tcsetattr, then the signal does its work
//! SIGSYS                     the same, by `sandbox::refusal`, which says why besides
//! SIGTSTP, SIGCONT           put back, stop; raw again
//! SIGKILL                    cannot be caught: `stty sane`
//! ```
//!
//! A run in the background of a shell does not touch the terminal at all.

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Settings to go back to, in static memory so that a signal handler reaches them.
static ORIGINAL: OnceLock<libc::termios> = OnceLock::new();

/// Whether the terminal is raw now.
static RAW: AtomicBool = AtomicBool::new(false);

/// Signals that end a process on the spot.
const FATAL: [libc::c_int; 6] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
    libc::SIGTRAP,
];

/// The terminal on standard input in raw mode. Dropping it puts the terminal back.
#[derive(Debug)]
pub struct RawTerminal(());

/// Whether standard input is a terminal that is ours to use at this moment.
pub fn available() -> bool {
    std::io::stdin().is_terminal() && in_foreground()
}

impl RawTerminal {
    /// Makes the terminal raw; `None` where standard input is no terminal, or is the foreground of
    /// another process group.
    pub fn take() -> std::io::Result<Option<Self>> {
        if !available() {
            return Ok(None);
        }
        let mut original = std::mem::MaybeUninit::uninit();
        // SAFETY: the pointer is to memory large enough for a termios.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, original.as_mut_ptr()) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: tcgetattr succeeded and filled it.
        let _ = ORIGINAL.set(unsafe { original.assume_init() });
        restore_on_fatal_signals()?;
        restore_on_panic();
        make_raw()?;
        Ok(Some(Self(())))
    }
}

/// Makes the terminal raw again after the process was stopped and went on, if it was raw before.
pub fn resume() -> std::io::Result<()> {
    if available() { make_raw() } else { Ok(()) }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether the terminal on standard input would take our settings without stopping us.
fn in_foreground() -> bool {
    // SAFETY: neither call takes a pointer.
    unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) == libc::getpgrp() }
}

/// Switches to raw mode, but for output: log lines come out as lines.
fn make_raw() -> std::io::Result<()> {
    let Some(original) = ORIGINAL.get() else {
        return Ok(());
    };
    let mut raw = *original;
    // SAFETY: `raw` is a valid termios.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    raw.c_oflag |= libc::OPOST;
    RAW.store(true, Ordering::SeqCst);
    // SAFETY: `raw` is a valid termios.
    if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const raw) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// Puts the terminal back if it is raw. Calls nothing that a signal handler may not call.
pub fn restore() {
    if !RAW.swap(false, Ordering::SeqCst) {
        return;
    }
    if let Some(original) = ORIGINAL.get() {
        // SAFETY: `original` is a valid termios; tcsetattr is async-signal-safe (POSIX 2.4.3).
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, original) };
    }
}

/// Puts the terminal back before a panic's message is printed.
fn restore_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        before(info);
    }));
}

/// Handler of [`FATAL`]: puts the terminal back and lets the signal do its work.
extern "C" fn on_fatal_signal(signal: libc::c_int) {
    restore();
    // SAFETY: both calls are async-signal-safe. The signal is blocked while its handler runs, so it
    // takes its default effect when the handler returns.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

fn restore_on_fatal_signals() -> std::io::Result<()> {
    for signal in FATAL {
        // SAFETY: an all-zero sigaction is valid; the handler only calls what is async-signal-safe.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_fatal_signal as *const () as usize;
            action.sa_flags = libc::SA_ONSTACK;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        if result != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}
