//! Runs chosen functions of an unmodified guest driver in a domain of their own.
//!
//! ```text
//!   attach ─► dispatch ─► compensation      a live guest: gates, what a vCPU at a gate does, calls taken back
//!        └───────┴──► domain ◄──┘           the private VM and one call in it
//!                  policy ─► guest          what a call may write; what there is to know of the guest
//!                     └── analysis          what a module's file says of the driver, before it runs
//!   dispatch ─► fault_image ─► guest        a guest at a fault, kept as a directory and read again
//! ```

pub mod analysis;
pub mod attach;
pub mod compensation;
pub mod dispatch;
pub mod domain;
pub mod fault_image;
pub mod guest;
mod models;
pub mod mutation;
pub mod policy;
pub mod status;
pub mod suspend_resume;
