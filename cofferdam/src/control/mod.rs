//! The way into a VM process or a device host: a unix socket that answers requests.
//!
//! One request is one line of JSON, and so is its answer; a connection may carry any number of
//! them, one after the other ([`protocol`], [`crate::device::protocol`]). The socket lies in the
//! process's runtime folder, which only its owner may enter: whoever can connect may do everything.

pub mod client;
pub mod ending;
pub mod listed;
pub mod protocol;
pub mod server;

use std::fmt::Debug;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// What is asked and answered over a control socket.
pub trait Protocol: 'static {
    /// What can be asked.
    type Request: Debug + Serialize + DeserializeOwned;
    /// What a request brings.
    type Reply: Debug + Serialize + DeserializeOwned;
    /// Who answers, for a person.
    const WHO: &'static str;
    /// The command that ends who does not answer, without its name.
    const END: &'static str;

    /// How long work on a request may take, where that can be long: what is done is told at least
    /// every [`protocol::BEAT`] then. The others are answered at once.
    fn may_take(request: &Self::Request) -> Option<Duration>;
}
