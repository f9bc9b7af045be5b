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
//! A [`Vm`] is made from a [`VmConfig`], given devices, and run once to its end. Devices come from
//! the crate `devices` and know nothing of KVM; they are put together here. The crate knows nothing
//! of isolation either: an upper layer attaches to the [`trap`] port.

mod acpi;
mod at_work;
mod bar_slots;
mod boot;
mod cpu;
mod dirty;
mod error;
pub mod exits;
mod gate;
mod generation;
mod handle;
mod hotplug;
mod input;
mod irq;
mod kvm;
pub mod layout;
mod lifecycle;
mod machine;
mod main_loop;
mod marks;
pub mod memory;
mod memory_slots;
mod outside;
mod panic;
mod participant;
mod paused;
mod post_mortem;
pub mod power;
mod quiesce;
mod refused;
mod slot;
pub mod snapshot;
mod state;
mod tracking;
pub mod trap;
mod vcpu;
mod vm;
mod waker;

#[cfg(feature = "fuzzing")]
pub use boot::fuzzing as boot_fuzzing;
pub use boot::{BootError, DEFAULT_COMMAND_LINE, Payload};
pub use dirty::{ChangedPages, ring as dirty_ring};
pub use error::{
    DEVICE_STATES_VERSION, DEVICE_STATES_VERSION_WITHOUT_I8042, Error, STATE_VERSION, StateError,
};
pub use gate::kick_signal;
pub use handle::{HoldGuard, VmHandle, VmState, VmStatus};
pub use hotplug::SharedSubscriber;
pub use kvm::show_triple_faults;
pub use marks::{MAX_MARKS, MarkError, MarkInfo, RewindError, RewindPhases, Rewound, SinceMark};
pub use outside::{Others, Outside};
pub use participant::{Kept, Participant, RestFor, Unsettled};
pub use paused::PausedVcpus;
pub use quiesce::Quiesced;
pub use refused::{QuiesceError, Refused};
pub use slot::PciSlot;
pub use state::MachineState;
pub use state::devices::DeviceStates;
pub use tracking::TrackError;
pub use vm::{ExitReason, OnGuestReset, Vm, VmConfig};

/// Most vCPUs a machine can have.
pub const MAX_VCPUS: u8 = 8;
