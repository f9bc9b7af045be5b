//! What works beside the guest and has to come to rest with it, see [`crate::quiesce`].

use crate::paused::PausedVcpus;

/// What has to come to rest before a machine's state can be taken.
pub trait Participant: Send + Sync {
    /// What it is, for messages.
    fn name(&self) -> String;
    /// Finishes or takes back what is open; nothing new begins until [`Participant::go_on`]. The vCPUs run no guest
    /// code and their registers are complete. To be done in milliseconds.
    fn settle(&self, vcpus: &mut PausedVcpus<'_>) -> Result<(), Unsettled>;
    /// The machine goes on. Called once for each [`Participant::settle`] that succeeded.
    fn go_on(&self);
}

/// Why something is not at rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsettled {
    /// The reason, as a part of a sentence.
    pub reason: String,
    /// It ends by itself if the guest goes on.
    pub soon: bool,
}
