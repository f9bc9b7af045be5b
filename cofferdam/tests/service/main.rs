//! The service as its clients see it, a browser among them: guests of this host's KVM, processes
//! that only speak the protocol, bad input.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

#[path = "../common/mod.rs"]
mod common;

mod agent;
mod bad_input;
mod browser;
mod campaigns;
mod client;
mod clock;
mod console;
mod creating;
mod dashboard;
mod devices;
mod documents;
mod events;
mod guests;
mod looks;
mod made_up;
mod network;
mod over_tcp;
mod page;
mod perfetto;
mod scripted;
mod sockets;
mod upgraded;
