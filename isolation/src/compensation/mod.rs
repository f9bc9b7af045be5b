//! Taking back calls that had gone on in the guest: kernel functions that the guest calls, in the
//! failing call's own thread, and packets that are kept out meanwhile.

pub mod call_loop;
pub(crate) mod completing;
pub mod effects;
pub(crate) mod guest_calls;
pub(crate) mod guest_time;
mod taking_back;
pub(crate) mod transmit_queues;
