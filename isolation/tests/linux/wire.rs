//! A wire whose far end counts how often it saw the NIC's link go. The gateway behind it goes back
//! with the guest: it would know the guest by the address that a test had given it otherwise, and
//! answer to that.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::state::{Part, StateError};
use devices::wire::gateway::Gateway;
use devices::wire::{SendOutcome, Wire, WritableFd};

/// The gateway, and the count.
pub struct CountingWire {
    pub gateway: Gateway,
    pub losses: Arc<AtomicU64>,
}

impl Wire for CountingWire {
    fn send(&mut self, frame: &[u8]) -> SendOutcome {
        self.gateway.send(frame)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize> {
        self.gateway.receive(buffer)
    }

    fn carrier(&self) -> bool {
        self.gateway.carrier()
    }

    fn nic_link(&mut self, up: bool) {
        self.losses.fetch_add(u64::from(!up), Ordering::Relaxed);
        self.gateway.nic_link(up);
    }

    fn loses_frames(&self) -> bool {
        self.gateway.loses_frames()
    }

    fn stations(&mut self, addresses: &[[u8; 6]]) {
        self.gateway.stations(addresses);
    }

    fn save(&self) -> Result<Option<Part>, StateError> {
        self.gateway.save()
    }

    fn restore(&mut self, state: &Option<Part>) -> Result<(), StateError> {
        self.gateway.restore(state)
    }

    fn readable_fd(&self) -> RawFd {
        self.gateway.readable_fd()
    }

    fn writable_fd(&self) -> Option<WritableFd> {
        self.gateway.writable_fd()
    }
}
