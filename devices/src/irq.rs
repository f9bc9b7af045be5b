//! How a device raises interrupts, without knowing who delivers them.

/// A level-triggered interrupt line, as PCI's INTx pins are (PCI Local Bus 3.0, section 2.2.6).
///
/// Calls that do not change the level are cheap and need no system call.
pub trait IrqLine: Send + Sync {
    /// Drives the line: `true` asserts it, `false` deasserts it.
    fn set_level(&self, asserted: bool);
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
}
