//! Each wall of the sandbox, broken at from inside: by this test program behind the walls of a
//! process of ours, and looked at around processes that run.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where something unexpected happens"
)]

mod breaking;
#[path = "../common/mod.rs"]
mod common;
mod files;
mod group;
mod inside;
mod jail;
mod running;
mod tries;
