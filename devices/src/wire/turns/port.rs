//! A NIC's end of the wire that it has by turns.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use super::super::{SendOutcome, Wire, WritableFd, WritableSignal};
use super::member::Descriptors;
use super::state::State;
use super::{PortId, lock};

/// A wire while it is its turn. Dropping it gives the turn up.
pub struct Port {
    state: Arc<Mutex<State>>,
    id: PortId,
    fds: Descriptors,
}

impl Port {
    pub(super) fn new(state: Arc<Mutex<State>>, id: PortId, fds: Descriptors) -> Self {
        Self { state, id, fds }
    }

    /// Which port it is.
    pub fn id(&self) -> PortId {
        self.id
    }
}

impl Wire for Port {
    fn send(&mut self, frame: &[u8]) -> SendOutcome {
        lock(&self.state).send(self.id, frame)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize> {
        lock(&self.state).receive(self.id, buffer)
    }

    fn carrier(&self) -> bool {
        lock(&self.state).carrier(self.id)
    }

    fn loses_frames(&self) -> bool {
        lock(&self.state).loses_frames(self.id)
    }

    fn nic_link(&mut self, up: bool) {
        lock(&self.state).nic_link(self.id, up);
    }

    fn stations(&mut self, addresses: &[[u8; 6]]) {
        lock(&self.state).set_stations(self.id, addresses);
    }

    fn readable_fd(&self) -> RawFd {
        self.fds[0]
    }

    fn writable_fd(&self) -> Option<WritableFd> {
        Some(WritableFd {
            fd: self.fds[1],
            signal: WritableSignal::In,
        })
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        lock(&self.state).remove(self.id);
    }
}
