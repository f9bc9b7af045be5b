//! Why a machine does not do what it is asked for.

/// Why an operation was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The machine is paused.
    #[error("the machine is paused already")]
    AlreadyPaused,
    /// The machine is not paused.
    #[error("the machine is not paused")]
    NotPaused,
    /// The machine has ended.
    #[error("the machine is turned off")]
    Stopped,
    /// A vCPU thread cannot wait for itself.
    #[error("this cannot be done from inside a trap handler")]
    OnVcpuThread,
    /// Nothing that can be taken out is in the slot.
    #[error("no device that came while the machine ran is in this slot")]
    NotPlugged,
    /// The machine was not started.
    #[error("the machine is not started yet")]
    NotStarted,
    /// A rewind failed.
    #[error(
        "a rewind of the machine failed half-way: rewind it to a mark, reset it, or turn it off"
    )]
    HalfRewound,
    /// Another trap handler is attached.
    #[error("another trap handler is attached: detach it first")]
    TrapHandlerAttached,
}

/// Why a machine did not come to rest.
#[derive(Debug, thiserror::Error)]
pub enum QuiesceError {
    /// It cannot be paused.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Something is open.
    #[error("{who} did not come to rest: {reason}")]
    Unsettled {
        /// What is open.
        who: String,
        /// Why.
        reason: String,
    },
}
