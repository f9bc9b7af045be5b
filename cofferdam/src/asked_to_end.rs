//! The end that a person or a service manager asks a process for.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

/// Hears signals from now on; what comes back ends with one that asks for the end.
pub(crate) fn asked_to_end() -> anyhow::Result<impl Future<Output = ()>> {
    let hear = |kind| signal(kind).context("cannot hear signals");
    let mut interrupt = hear(SignalKind::interrupt())?;
    let mut terminate = hear(SignalKind::terminate())?;
    let mut hangup = hear(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}
