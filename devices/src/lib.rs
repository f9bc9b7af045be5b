//! What a guest sees besides its processors and its memory.
//!
//! The crate knows nothing of KVM. It is given guest memory ([`dma::DmaSpace`]), interrupt lines
//! ([`irq`]) and wires ([`wire::Wire`]), and offers devices that answer register accesses.
//! Everything that a guest writes is hostile: no access may panic, loop without bound or reach
//! outside what the device owns.

pub mod bus;
pub mod clock;
pub mod dma;
pub mod e1000;
pub mod edge;
pub mod hold;
pub mod i8042;
pub mod irq;
pub mod moments;
pub mod nic;
pub mod pci;
pub mod rate_limit;
pub mod serial;
pub mod state;
pub mod vfio;
pub mod vfio_user;
pub mod virtio;
pub mod wire;
