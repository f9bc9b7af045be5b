//! Ends a process that was started for a measurement.

use std::process::Child;
use std::time::{Duration, Instant};

/// Between two looks whether it has ended.
const POLL: Duration = Duration::from_millis(5);

/// Asks `child` to end and waits for it; one that has not ended after `limit` is killed.
pub fn end(child: &mut Child, limit: Duration) {
    if matches!(child.try_wait(), Ok(Some(_))) {
        return;
    }
    // SAFETY: a plain system call; the child was not waited for, so its number is still its own.
    unsafe { libc::kill(child.id().cast_signed(), libc::SIGTERM) };
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if matches!(child.try_wait(), Ok(Some(_)) | Err(_)) {
            return;
        }
        std::thread::sleep(POLL);
    }
    tracing::warn!(process = child.id(), "does not end when asked: killing it");
    if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
        tracing::warn!(process = child.id(), "cannot be killed: {error}");
    }
}
