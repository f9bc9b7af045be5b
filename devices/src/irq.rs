//! How a device raises interrupts, without knowing who delivers them.
//!
//! A device that lives in another process, or in the kernel (VFIO), is given descriptors instead:
//! it writes them, and nobody here takes part.

use vmm_sys_util::eventfd::EventFd;

/// A level-triggered interrupt line, as PCI's INTx pins are (PCI Local Bus 3.0, section 2.2.6).
///
/// Calls that do not change the level are cheap and need no system call.
pub trait IrqLine: Send + Sync {
    /// Drives the line: `true` asserts it, `false` deasserts it.
    fn set_level(&self, asserted: bool);

    /// Has somebody outside drive the line, in VFIO's manner, besides [`IrqLine::set_level`].
    /// `None` where this cannot be.
    fn events(&self) -> Option<LineEvents> {
        None
    }
}

/// The two descriptors of a level-triggered line that is driven from outside, as `KVM_IRQFD` with
/// `KVM_IRQFD_FLAG_RESAMPLE` and `VFIO_DEVICE_SET_IRQS` on INTx understand them.
#[derive(Debug)]
pub struct LineEvents {
    /// Written by the device: asserts the line. The device keeps quiet then, until it is unmasked.
    pub trigger: EventFd,
    /// Written when the interrupt was acknowledged and the line deasserted: the device is unmasked,
    /// and triggers again if it still has something.
    pub unmask: EventFd,
}

/// What a message-signalled interrupt writes and where (PCI Local Bus 3.0, section 6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Address the function writes to, both halves.
    pub address: u64,
    /// Data it writes.
    pub data: u32,
}

/// The message-signalled vectors of one function: routed once, triggered often.
pub trait MsiVectors: Send + Sync {
    /// Number of vectors, fixed for the life of the function.
    fn count(&self) -> u16;
    /// Routes `vector` to `message`, or to nowhere while it is masked (`None`).
    fn route(&self, vector: u16, message: Option<MsiMessage>);
    /// Sends the message of `vector`; nothing happens where it is routed to nowhere.
    fn trigger(&self, vector: u16);
    /// What sends the message of `vector` when it is written, for somebody outside; nothing happens
    /// either where it is routed to nowhere. `None` where there is no such descriptor.
    fn event(&self, _vector: u16) -> Option<EventFd> {
        None
    }
}
