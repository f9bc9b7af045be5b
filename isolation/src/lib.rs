//! Runs chosen functions of an unmodified guest driver in a domain of their own.

pub mod attach;
pub mod domain;
pub mod guest;
pub mod policy;
