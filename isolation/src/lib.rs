//! See the crate description in Cargo.toml; modules are added as they are built.

pub mod guest;
pub mod policy;
