//! What calls that had gone on in the guest are taken back with: kernel functions that the guest
//! calls, in the failing call's own thread, and packets that are kept out meanwhile. When they are
//! taken back is decided where calls are dispatched (`dispatch::taking_back`).

pub mod call_loop;
pub mod effects;
pub(crate) mod guest_calls;
pub(crate) mod guest_time;
pub(crate) mod transmit_queues;
