//! Measurements: each starts its own VMs from this same program, drives them from outside as a user
//! would (control socket, guest agent) and gives back data for a report.

pub mod boot;
pub(crate) mod child;
pub mod clock;
pub mod clones;
pub mod device_host;
mod device_power;
pub mod drivers;
pub mod guest;
pub mod isolation;
pub mod network;
pub mod operation;
pub mod recovery;
pub mod rollback;
mod stuck;
pub mod suspend;
pub mod switch;
pub mod together;
pub mod traffic;
