//! The device host: the process that has a NIC for good, and the guests that share it by turns.

pub mod client;
pub mod hello;
