//! One virtual machine: memory, vCPUs, boot, ACPI, interrupts, event loop.
//!
//! ```text
//!            Vm (main thread)                        vCPU threads, one each
//!   ┌─────────────────────────────┐         ┌───────────────────────────────────┐
//!   │ event loop: wires, serial   │         │ gate ─► KVM_RUN ─► exit            │
//!   │ input, timers, requests     │         │   ▲                │ PIO, MMIO: bus │
//!   └──────────────┬──────────────┘         │   └── trap handler ◄┘ trap port     │
//!                  │ reset, power-off       └───────────────────────────────────┘
//!   VmHandle (any thread): pause, resume, reset, power off, look at paused vCPUs
//! ```
//!
//! A [`Vm`] is made from a [`VmConfig`], given devices, and run once to its end. Devices come from the
//! crate `devices` and know nothing of KVM; they are put together here. The crate knows nothing of
//! isolation either: an upper layer attaches to the [`trap`] port.

mod acpi;
mod boot;
mod cpu;
mod error;
pub mod exits;
mod gate;
mod handle;
mod irq;
pub mod layout;
mod lifecycle;
mod machine;
pub mod memory;
mod post_mortem;
pub mod power;
pub mod trap;
mod vcpu;
mod vm;

pub use boot::{BootError, DEFAULT_COMMAND_LINE, Payload};
pub use error::Error;
pub use gate::kick_signal;
pub use handle::{HoldGuard, PausedVcpus, Refused, VmHandle, VmState, VmStatus};
pub use vm::{ExitReason, OnGuestReset, PciSlot, SharedSubscriber, Vm, VmConfig};

/// Most vCPUs a machine can have.
pub const MAX_VCPUS: u8 = 8;
