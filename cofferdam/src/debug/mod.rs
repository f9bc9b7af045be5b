//! `debug`: a guest at the fault of an isolated call, as `isolate --keep-faults` has kept it,
//! looked at by a person or by `gdb`.
//!
//! ```text
//!   FaultImage ─┬─ words, types ─► summary for people
//!               │       └────────► `monitor` commands
//!               └─ target ─► session (packets) ─► serve (sockets) ◄─► gdb
//! ```

mod registers;
pub mod serve;
mod session;
mod target;
mod types;
pub mod words;

#[cfg(test)]
mod tests;

pub use session::Session;
