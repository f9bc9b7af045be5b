//! What works beside the guest and has to come to rest with it, see [`crate::quiesce`].

use std::any::Any;
use std::sync::Arc;

use crate::paused::PausedVcpus;

/// What a participant keeps with a mark of the machine, which only it understands; nothing if there
/// is nothing.
pub type Kept = Option<Arc<dyn Any + Send + Sync>>;

/// What a machine is brought to rest for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestFor {
    /// Its state is taken or changed: what is open has to be ended, or be in that state.
    State,
    /// It is taken back to a mark: what has been open since is of no account, as what it did to the
    /// guest goes too. It may never end, which is why somebody rewinds. Nothing of it may be ended
    /// or given up yet, for the rewind can still be refused; [`Participant::put_back`] does that.
    Rewind,
}

/// What has to come to rest before a machine's state can be taken.
pub trait Participant: Send + Sync {
    /// What it is, for messages.
    fn name(&self) -> String;
    /// Finishes or takes back what is open; nothing new begins until [`Participant::go_on`]. The
    /// vCPUs run no guest code and their registers are complete. To be done in milliseconds.
    fn settle(&self, rest: RestFor, vcpus: &mut PausedVcpus<'_>) -> Result<(), Unsettled>;
    /// The machine goes on. Called once for each [`Participant::settle`] that succeeded.
    fn go_on(&self);
    /// What of its own state in this process has to be put back when the machine is rewound to this
    /// moment. Called at rest.
    ///
    /// # Errors
    /// The machine cannot be marked now.
    fn keep(&self) -> Result<Kept, Unsettled> {
        Ok(None)
    }
    /// Puts back what [`Participant::keep`] gave. Called at rest, when memory, devices and vCPUs
    /// are those of the mark.
    ///
    /// # Errors
    /// It cannot: the machine stays paused, and the error, which is a part of a sentence, is told.
    fn put_back(&self, _kept: &Kept) -> Result<(), String> {
        Ok(())
    }
}

/// Why something is not at rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsettled {
    /// The reason, as a part of a sentence.
    pub reason: String,
    /// It ends by itself if the guest goes on.
    pub soon: bool,
}
