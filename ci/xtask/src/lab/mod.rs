//! The lab: an AMD server with nested paging and an IOMMU, played by QEMU's software processor. A
//! stock Debian kernel is its host kernel (L1); our programs run there as on any host, with a KVM
//! that boots Linux.
//!
//! ```text
//!  host                                   L1, emulated
//!  cargo xtask lab -- CMD                 agent (/init)
//!     │  agent.sock ── virtserialport ──► exec CMD, chroot into the host's root
//!     │                                      │
//!  / ────────────── 9p, read-only ────────► /host
//!  target/lab/out ─ 9p, writable ─────────► the same path in the chroot
//! ```
//!
//! Every lab run has an end: a limit for the boot, one for the command, one for an agent that says
//! nothing. A lab that hangs is thrown away and the command tried once more in a new one;
//! [`ledger`] counts that, and the output says it.

mod channel;
pub mod command;
mod instance;
mod interrupt;
mod kick;
mod ledger;
mod machine;
mod request;
mod session;
mod settings;

pub use command::pass_on;
pub use interrupt::{seen as interrupted, watch as watch_interrupts};
pub use machine::CABLED;
pub use request::{Ended, Request};
pub use session::{Kind, Lab};
pub use settings::Settings;
