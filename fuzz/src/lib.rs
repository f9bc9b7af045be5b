//! What parses bytes of others, each given one input after the other: it has to end within its
//! bounds, with an answer or an error, and not with a panic. libFuzzer looks for such inputs
//! (`cargo xtask fuzz`; the targets are in `fuzz_targets/`), and this library's own tests run each
//! with its seeds and with inputs made of a few random numbers.

#![allow(
    clippy::expect_used,
    reason = "that something is wrong is said by a panic"
)]

pub mod agent_stream;
pub mod btf;
pub mod control_socket;
pub mod e1000_registers;
pub mod guest_symbols;
pub mod http_requests;
pub mod kernel_image;
pub mod keyboard_controller;
pub mod ko_reader;
pub mod page_tables;
pub mod parked_nic;
pub mod pci_bus;
pub mod saved_state;
pub mod vfio_user_client;
pub mod vfio_user_server;
pub mod virtio_queues;

#[cfg(test)]
mod blind;
