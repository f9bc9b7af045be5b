//! What the host knows about a running guest: its page tables, symbols, types and code.
//!
//! Everything here only reads. All of it (memory, symbol text, type data) comes from the guest and
//! is hostile: readers check every offset, bound their work and their memory, and never panic. What
//! a hostile guest can get out of a lie is a refusal, or harm to itself.

pub mod addr;
pub mod allocations;
pub mod btf;
pub mod bystanders;
pub mod cold;
pub mod fault_tables;
pub(crate) mod field;
pub mod gate;
pub mod memory_model;
pub mod module_text;
pub mod modules;
pub mod names;
pub mod paging;
mod per_cpu;
pub mod phys;
mod sheaves;
mod slab;
pub mod stack;
pub mod symbols;
pub mod timers;
