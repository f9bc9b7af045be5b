//! The way into a VM process: a unix socket that answers requests.
//!
//! One request is one line of JSON, and so is its answer; a connection may carry any number of them,
//! one after the other ([`protocol`]). The socket lies in the VM's runtime folder, which only its owner
//! may enter: whoever can connect may do everything.

pub mod client;
pub mod protocol;
pub mod server;
