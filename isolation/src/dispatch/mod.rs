//! What happens when a vCPU of the guest comes to a gate: its call is run in the domain, goes on
//! there, or is answered without being run.
//!
//! ```text
//!   attach::trap (others held, devices held) ─► serve ─► armed ─► Domain::call ─► registers
//!                       run: step by step ◄────────────────┘
//!                        ├── supervisor, platform: what the domain asks meanwhile
//!                        ├── after_fault: what its failure means; fault: faults on purpose
//!                        ├── call_trace: what happened, with times, for who asks
//!                        ├── failed, reporter: what is said of failed calls, behind them
//!                        └── taking_back, completing: what the guest calls then
//! ```

pub mod after_fault;
pub(crate) mod armed;
pub mod call_trace;
mod completing;
mod domain_failure;
mod due;
pub(crate) mod failed;
pub(crate) mod failures;
pub mod fault;
mod knowledge;
pub(crate) mod overdue;
mod platform;
pub(crate) mod reporter;
pub(crate) mod returning;
mod run;
pub(crate) mod serve;
pub(crate) mod supervisor;
mod taking_back;
