//! Virtio devices (OASIS virtio 1.2), modern interface only.
//!
//! ```text
//!   guest ──► pci::VirtioPciFunction ──► one VirtioDevice: console, block, network
//!               status, features,           │
//!               interrupts, queues ◄── Queues: chains in, chains out
//! ```
//!
//! The transport owns everything that is common: feature negotiation, queue setup, interrupts. A
//! device sees chains of buffers, already walked and checked for shape. A ring that makes no sense
//! ends in DEVICE_NEEDS_RESET (section 2.1.2): the device stands still until the driver resets it.

pub mod blk;
mod chain;
pub mod console;
#[cfg(test)]
mod history_tests;
pub mod net;
pub mod pci;
mod queue_error;
mod queues;
#[cfg(test)]
mod testing;

use event_manager::{EventOps, Events};

use crate::state::{Part, StateError};

pub use self::chain::Chain;
pub use self::queue_error::QueueError;
pub use self::queues::Queues;

/// What the transport must know to present a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceKind {
    /// Device ID (section 5): 1 network, 2 block, 3 console.
    pub id: u16,
    /// PCI class code, 24 bits.
    pub pci_class: u32,
    /// For log lines.
    pub name: &'static str,
}

/// Why a device cannot go on until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A ring makes no sense.
    #[error("{0}")]
    Queue(#[from] QueueError),
    /// A request breaks the device's own rules so that no answer is possible.
    #[error("{0}")]
    Request(&'static str),
}

/// Fills `data` with the bytes of a configuration structure from `offset` on.
fn read_structure(structure: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = structure.get(start..).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

/// One device behind a transport. Everything it is given comes from the guest and may be anything.
pub trait VirtioDevice: Send {
    /// What it is.
    fn kind(&self) -> DeviceKind;

    /// Feature bits that it offers, besides those that the transport adds.
    fn features(&self) -> u64;

    /// Greatest size of each queue, powers of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads its configuration structure; bytes behind the end are left as they are.
    fn config_read(&self, offset: u64, data: &mut [u8]);

    /// The driver is ready (DRIVER_OK) and accepted `features`.
    fn activate(&mut self, features: u64, queues: &mut Queues<'_>) -> Result<(), DeviceError>;

    /// The driver reset the device: everything but what the host gave it is as new.
    fn reset(&mut self);

    /// The device's own state between two calls; what is in its queues is not part of it.
    fn save(&self) -> Result<Part, StateError>;

    /// Goes on as the device that `state` was taken of. On an error nothing changes. The driver's
    /// buffers are looked at afterwards, as if it had notified about all queues.
    fn restore(&mut self, state: &Part) -> Result<(), StateError>;

    /// The driver put buffers into `queue`.
    fn notify(&mut self, queue: u16, queues: &mut Queues<'_>) -> Result<(), DeviceError>;

    /// Registers the descriptors it needs with the event loop.
    fn watch(&mut self, ops: &mut EventOps<'_>);

    /// One of its descriptors is ready. `queues` gives no buffers while there is no driver.
    fn event(
        &mut self,
        events: Events,
        ops: &mut EventOps<'_>,
        queues: &mut Queues<'_>,
    ) -> Result<(), DeviceError>;
}
