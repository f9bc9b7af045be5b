//! `run`: one VM in this process.

pub mod escape;
pub mod signals;
pub mod terminal;
