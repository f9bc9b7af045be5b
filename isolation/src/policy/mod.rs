//! What an isolated call may change, and what it did change.
//!
//! Pure bookkeeping over addresses and bytes: no guest, no KVM. The addresses come from the guest
//! and are hostile; tables are bounded.

pub mod abort_value;
pub mod call;
pub mod completion;
pub mod diff;
pub mod handed_over;
pub mod range_table;
pub mod reach;
pub mod unheard;
