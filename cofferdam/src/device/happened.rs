//! What the thread hears of that keeps house in a device host.

use std::time::Duration;

use crate::options::VmName;

/// What the keeper hears of.
#[derive(Debug)]
pub enum Happened {
    /// A client's connection has ended.
    Gone {
        /// Its VM.
        vm: VmName,
        /// Which of its clients.
        serial: u64,
        /// Why.
        why: String,
    },
    /// A switch has left the turn with nobody.
    Nobody,
    /// The time slice is another one.
    Slices(Option<Duration>),
}
