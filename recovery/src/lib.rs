//! What becomes of a driver's call that failed in its domain, and of the driver.
//!
//! | module | what it is |
//! | --- | --- |
//! | `asker` | who asked for something that takes long |
//! | `campaign` | faults by the thousand: which ones, what is seen of each, what it comes to |
//! | `fault` | faults that are put into calls on purpose, and where in a function |
//! | `guest` | what is needed of a live guest: two traits, with doubles in tests |
//! | `interface` | network interfaces' configuration, read and put back |
//! | `ladder` | what is tried, in which order, after a fault |
//! | `lock` | locks, whoever panicked under them |
//! | `model` | what kernel functions do that outlasts a call |
//! | `module_file` | a module's file that is to take a running one's place |
//! | `request` | what was asked for when a module was isolated |
//! | `rest` | the supervisor at rest with its machine, and after a rewind |
//! | `resting` | devices that were suspended |
//! | `resume_device` | a driver's own suspend and resume functions, called |
//! | `rungs` | resume, restart and reset, carried out |
//! | `supervisor` | the isolated modules of a guest with their ladders |
//! | `sweep` | modules of a kernel's package, one after the other: what they do, and what came of it |
//! | `switch` | a device goes from one guest to another: the steps, and what becomes of it when one fails |
//! | `turn` | whose turn it is to change drivers |
//! | `upgrade` | another build of a driver in the place of the one that runs |
//! | `violations` | what calls did wrong, counted |
//!
//! Knows nothing of processes, sockets and the command line.

pub mod asker;
pub mod by_turns;
pub mod campaign;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod double;
pub mod fault;
pub mod guest;
pub mod interface;
pub mod ladder;
mod lock;
pub mod model;
pub mod module_file;
pub mod request;
mod rest;
mod resting;
pub mod resume_device;
mod rungs;
pub mod supervisor;
pub mod sweep;
pub mod switch;
mod turn;
pub mod upgrade;
pub mod violations;
