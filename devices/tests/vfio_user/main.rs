//! A function served to another process, and one that another process serves.

#![allow(clippy::unwrap_used, reason = "test code")]

mod areas;
mod client;
mod function;
mod interop;
mod memory;
mod raw;
mod refusing;
mod registers;
mod replies;
mod server;
mod sizes;
mod state;
mod support;
