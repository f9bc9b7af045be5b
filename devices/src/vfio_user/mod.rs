//! A PCI function in another process, over a unix socket: the vfio-user protocol, both sides of it.
//!
//! ```text
//!   VMM                                               device's process
//!   PciBus ─► VfioUserFunction ─► Client ══ socket ══ Server ─► SharedFunction
//!                 │                  guest memory, by descriptor ─► its DmaSpace
//!                 └ IrqLine, MsiVectors ◄─ eventfds, by descriptor ─ ClientInterrupts
//! ```
//!
//! Source: the vfio-user protocol specification (QEMU, `docs/interop/vfio-user.rst`), "the
//! specification" below, and `<linux/vfio.h>` where that refers to it. Neither side trusts the
//! other: what comes in is bounded and checked, nothing waits without a deadline, and who breaks
//! the protocol loses the connection.

mod channel;
pub mod client;
pub mod function;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod message;
pub mod server;

pub use channel::{ChannelError, Counters, MessageCounts};
pub use client::{Client, ClientError, Limits};
pub use function::{FunctionError, VfioUserFunction};
pub use server::{ClientInterrupts, Offered, Server, ServerEvent};
