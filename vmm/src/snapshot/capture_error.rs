//! Why a snapshot is not taken, which includes that nobody wants it any more.

use std::path::PathBuf;

use super::SnapshotError;
use crate::error::Error;
use crate::refused::QuiesceError;

/// Why no snapshot was taken. The guest goes on, and earlier snapshots are as they were.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The machine did not come to rest.
    #[error(transparent)]
    Quiesce(#[from] QuiesceError),
    /// The directory cannot be written, or the parent cannot be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The machine does not give its state away.
    #[error(transparent)]
    Machine(#[from] Error),
    /// The parent is of another machine.
    #[error("{path} has {there} MiB of memory, this VM {here}: it is no parent of its snapshots")]
    OtherMemory {
        /// The parent.
        path: PathBuf,
        /// MiB of its memory.
        there: u64,
        /// MiB of this machine's.
        here: u64,
    },
    /// Others write guest memory, and changes were to be followed.
    #[error(
        "what devices in other processes write is not followed: take the snapshot without --track"
    )]
    NotTracked,
    /// What is beside the machine cannot be saved.
    #[error("{0}")]
    Beside(String),
    /// Whoever wanted it does not any more.
    #[error("the snapshot was given up, nothing of it is left")]
    GivenUp,
}

/// Tells what is done, and stops if nobody wants it any more.
pub(super) fn still_wanted(
    tell: &mut dyn FnMut(&str) -> bool,
    what: &str,
) -> Result<(), CaptureError> {
    match tell(what) {
        true => Ok(()),
        false => Err(CaptureError::GivenUp),
    }
}
