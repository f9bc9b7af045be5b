//! What a NIC is plugged into: something that carries Ethernet frames both ways.

use std::os::fd::RawFd;

use crate::state::{Part, StateError};

pub mod gateway;
pub mod tap;
pub mod turns;
pub mod unix_link;

/// Longest frame a wire carries: a jumbo frame with header and VLAN tag, without FCS, in bytes.
pub const MAX_FRAME_BYTES: usize = 16 * 1024;

/// What became of a frame that was handed to a wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendOutcome {
    /// The wire has it.
    Sent,
    /// The wire's queue is full. The NIC keeps the frame and tries again when
    /// [`Wire::writable_fd`] says so: nothing is lost on the host's side.
    Full,
    /// Nobody is at the other end, or the frame is longer than the wire carries: it is gone, as on
    /// a cable that was pulled.
    Dropped,
}

/// One end of an Ethernet link. Frames carry no FCS.
///
/// Both descriptors are for an event loop (`epoll`); neither call ever blocks.
pub trait Wire: Send {
    /// Hands `frame` (destination address first, no FCS) to the wire.
    fn send(&mut self, frame: &[u8]) -> SendOutcome;

    /// Takes the next frame into `buffer` and returns its length in bytes; `None` when there is
    /// none. A frame that is longer than `buffer` is dropped. A frame may be shorter than the 60
    /// bytes that Ethernet asks for: the NIC pads it.
    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize>;

    /// Whether a carrier is there; a NIC shows it as its link state.
    fn carrier(&self) -> bool;

    /// Whether what is sent now, without a carrier, is taken and lost. A NIC whose link is down
    /// then gives its frames up instead of keeping them until the link is back: a driver resets a
    /// card that has frames and no link. By default they are kept.
    fn loses_frames(&self) -> bool {
        false
    }

    /// The NIC's own end came up or went down: what the port at the other end would see of the
    /// NIC's PHY. By default nobody is told.
    fn nic_link(&mut self, _up: bool) {}

    /// The NIC receives frames to these unicast addresses from now on, among those that it is told
    /// of: where one wire is several NICs' by turns, each is kept from the others' frames. A NIC
    /// whose addresses change says so each time. By default nobody is told.
    fn stations(&mut self, _addresses: &[[u8; 6]]) {}

    /// Readable (`EPOLLIN`, level-triggered) while [`Wire::receive`] may return a frame or the
    /// carrier changed.
    fn readable_fd(&self) -> RawFd;

    /// What this end of the wire is besides its descriptors, with its kind. What is on its way
    /// through the host is lost, as on a cable that was pulled. `None` for a wire that any other
    /// may take the place of.
    fn save(&self) -> Result<Option<Part>, StateError> {
        Ok(None)
    }

    /// Goes on as the wire that `state` was taken of; with `None`, as the new wire that it is. The
    /// carrier that the NIC saw stays, if it comes back soon.
    ///
    /// # Errors
    /// The state is of another kind of wire. Nothing has changed then.
    fn restore(&mut self, state: &Option<Part>) -> Result<(), StateError> {
        match state {
            None => Ok(()),
            Some(part) => Err(StateError::Kind {
                found: part.kind().to_owned(),
                wanted: "wire without a state",
            }),
        }
    }

    /// A descriptor that signals (`signal`'s event) when a wire that answered
    /// [`SendOutcome::Full`] has room again; `None` where that cannot happen.
    fn writable_fd(&self) -> Option<WritableFd>;
}

/// Where to learn that a full wire has room again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WritableFd {
    /// Descriptor to poll.
    pub fd: RawFd,
    /// What it shows when there is room.
    pub signal: WritableSignal,
}

/// How a descriptor shows that there is room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WritableSignal {
    /// `EPOLLOUT`, on a socket or a TAP.
    Out,
    /// `EPOLLIN` on an eventfd, drained by the next [`Wire::send`].
    In,
}
