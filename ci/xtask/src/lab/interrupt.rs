//! Ctrl-C and SIGTERM as a count that waits look at, so that labs are stopped in order: each thread
//! has a lab of its own, and none hides from another that a signal came.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context;

/// Signals that came.
static SIGNALS: AtomicU32 = AtomicU32::new(0);

thread_local! {
    /// Signals that this thread has dealt with.
    static FORGOTTEN: Cell<u32> = const { Cell::new(0) };
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    SIGNALS.fetch_add(1, Ordering::SeqCst);
}

/// Turns SIGINT and SIGTERM into the count from now on.
pub fn watch() -> anyhow::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        vmm_sys_util::signal::register_signal_handler(signal, on_signal)
            .with_context(|| format!("cannot watch for signal {signal}"))?;
    }
    Ok(())
}

/// Whether a signal came since this thread's last [`clear`].
pub fn seen() -> bool {
    SIGNALS.load(Ordering::SeqCst) != FORGOTTEN.get()
}

/// Lets this thread forget the signal: what follows is its cleaning up, which is not to be
/// interrupted.
pub fn clear() {
    FORGOTTEN.set(SIGNALS.load(Ordering::SeqCst));
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::{Signal, getpid, kill_process};

    use super::*;

    /// Set in a process of its own: signals are for all threads of one.
    const ALONE: &str = "COFFERDAM_TEST_INTERRUPT";

    #[test]
    fn who_forgets_a_signal_hides_it_from_nobody() {
        if std::env::var_os(ALONE).is_none() {
            let name = "lab::interrupt::tests::who_forgets_a_signal_hides_it_from_nobody";
            let program = std::env::current_exe().unwrap();
            let mut alone = Command::new(program);
            alone.args(["--exact", name]).env(ALONE, "1");
            let output = alone.output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{said}");
            assert!(said.contains("1 passed"), "{said}");
            return;
        }
        watch().unwrap();
        assert!(!seen());
        kill_process(getpid(), Signal::TERM).unwrap();
        while !seen() {
            std::thread::yield_now();
        }
        let other = std::thread::spawn(|| {
            assert!(seen());
            clear();
            seen()
        });
        assert!(!other.join().unwrap());
        assert!(seen());
        clear();
        assert!(!seen());
    }
}
