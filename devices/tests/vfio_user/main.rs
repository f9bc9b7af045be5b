//! A function served to another process, and one that another process serves.

#![allow(clippy::unwrap_used, reason = "test code")]

mod function;
mod support;
