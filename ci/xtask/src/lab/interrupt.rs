//! Ctrl-C and SIGTERM as a flag that waits look at, so that a lab is stopped in order.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// Turns SIGINT and SIGTERM into the flag from now on.
pub fn watch() -> anyhow::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        vmm_sys_util::signal::register_signal_handler(signal, on_signal)
            .with_context(|| format!("cannot watch for signal {signal}"))?;
    }
    Ok(())
}

/// Whether a signal came since the last [`clear`].
pub fn seen() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Forgets the signal: what follows is the cleaning up, which is not to be interrupted.
pub fn clear() {
    INTERRUPTED.store(false, Ordering::SeqCst);
}
