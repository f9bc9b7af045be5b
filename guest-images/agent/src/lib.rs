//! The agent that runs inside a guest and answers requests from the host.
//!
//! The same program is a guest's `/init` ([`init`]), the child of it that serves the host's channel
//! ([`server`]), and, for tests on a host, a server on a unix socket. It trusts whoever is at the
//! other end of the channel: the host may do anything with its guest. It still never panics on what
//! it reads, because the guest would lose its `/init` or its agent with it.

pub mod channel;
pub mod cmdline;
mod exec;
mod fail;
mod files;
mod hypervisor;
pub mod init;
mod kmsg;
pub mod modules;
mod net;
mod restart;
pub mod server;
mod symbols;
mod sys;

pub use sys::{hear_of_signals, is_asked_to_end};
