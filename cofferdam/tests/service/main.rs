//! The service as its clients see it: guests of this host's KVM, processes that only speak the protocol, bad input.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

#[path = "../common/mod.rs"]
mod common;

mod agent;
mod bad_input;
mod client;
mod creating;
mod devices;
mod documents;
mod events;
mod guests;
mod scripted;
mod sockets;
