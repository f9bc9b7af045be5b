//! One wire for several NICs that have it by turns.
//!
//! ```text
//!   NIC of guest A ── Port ─┐
//!   NIC of guest B ── Port ─┼─ Turns: whose turn, sorting of frames ── the one real wire
//!   NIC of guest C ── Port ─┘
//! ```
//!
//! At most one port has the turn. Its NIC sends to and receives from the real wire itself: no frame
//! is copied once more. All others are parked. Their carrier is gone, or, with [`Parked::Stall`],
//! stays for a while in which what they send waits in their rings (the wire is full) and frames for
//! them wait here, within bounds; a port that has waited too long loses its carrier, before a
//! guest's transmit time-out would find that its card hangs. What is sent without a carrier is
//! lost, and does not stay in the rings ([`Wire::loses_frames`]).
//!
//! Who is sent what: a unicast frame to the address that a port was given belongs to that port,
//! whoever has the turn. One to an address that NICs have asked for themselves ([`Wire::stations`])
//! belongs to the port with the turn if its NIC has, or else to the other. Such a frame of another
//! port waits for that port or is dropped, and is counted; never does the port with the turn get
//! it, also where its guest listens to everything. All other frames, groups among them, are those
//! of the port with the turn. Each frame is taken from the wire once and has one receiver, in the
//! order of the wire. A guest whose NIC is promiscuous and has an address that it never told its
//! NIC of (a bridge in it) has no protection for that address.
//!
//! Everything is under one lock, which a port takes once for a frame: a turn never changes in the
//! middle of one. Whoever holds a NIC takes its lock first.

mod member;
mod port;
mod state;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::member::Member;
pub use self::port::Port;
use self::state::State;
use super::Wire;

/// What a port without the turn shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parked {
    /// No carrier, as with the cable pulled.
    Down,
    /// A carrier, for this long at most; frames wait.
    Stall(Duration),
}

impl Parked {
    /// [`Parked::Stall`] for as long as no guest takes its card to hang: Linux waits five seconds
    /// for a transmitter, but its `e1000` looks by itself for frames that are older than one.
    pub const STALL: Self = Self::Stall(Duration::from_secs(1));
}

/// Which port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId(u64);

/// What passed at a port, in frames where nothing else is said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortCounters {
    /// Taken from the wire by its NIC, those that had waited too.
    pub received: u64,
    /// Bytes of them.
    pub received_bytes: u64,
    /// Given to the wire.
    pub sent: u64,
    /// Bytes of them.
    pub sent_bytes: u64,
    /// Sent while there was no carrier: lost.
    pub sent_without_carrier: u64,
    /// Came for it while another had the turn, and were lost.
    pub lost_while_parked: u64,
    /// Came for it while another had the turn, and waited.
    pub waited: u64,
    /// Delivered after they had waited.
    pub delivered_after_wait: u64,
    /// Lost after they had waited, because the turn did not come back in time.
    pub lost_after_wait: u64,
    /// Came while it had the turn, were another's, and were kept from it.
    pub refused_as_anothers: u64,
    /// How often it got the turn.
    pub turns: u64,
}

/// A turn, and the frames at its edges. Times are of `CLOCK_MONOTONIC`, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TurnTimes {
    /// Which turn; they are counted from 1.
    pub serial: u64,
    /// When it began.
    pub since_ns: u64,
    /// Last frame before it, sent or received by whoever had a turn then.
    pub last_frame_before_ns: Option<u64>,
    /// First frame that its port sent or received.
    pub first_frame_ns: Option<u64>,
}

/// Why a turn cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum TurnError {
    /// There is no such port any more.
    #[error("whoever was to have the turn is gone")]
    Gone,
    /// The host refuses to watch the wire for another one.
    #[error("the wire cannot be watched for another NIC: {0}")]
    Watch(std::io::Error),
}

/// The wire and whose turn it is. Clones are the same.
#[derive(Clone)]
pub struct Turns(Arc<Mutex<State>>);

impl std::fmt::Debug for Turns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Turns");
        shown
            .field("holder", &self.holder())
            .finish_non_exhaustive()
    }
}

impl Turns {
    /// Nobody has a turn at `wire` yet.
    pub fn new(wire: Box<dyn Wire>, parked: Parked) -> Self {
        Self(Arc::new(Mutex::new(State::new(wire, parked))))
    }

    /// One more port, parked, whose NIC was given `address`. It is unplugged until [`Turns::plug`].
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn port(&self, address: [u8; 6]) -> std::io::Result<Port> {
        let member = Member::new(address)?;
        let fds = member.descriptors();
        let id = self.lock().add(member);
        Ok(Port::new(self.0.clone(), id, fds))
    }

    /// Gives the turn to a port, or takes it away from whoever has it. Answers which turn it is.
    ///
    /// One step: before it the old one may send and receive, after it the new one may, and there is
    /// no moment in which both may or a frame is lost in between. If nobody had the turn, what the
    /// wire has kept since then is dropped first.
    ///
    /// # Errors
    /// All is as it was.
    pub fn give(&self, to: Option<PortId>) -> Result<u64, TurnError> {
        self.lock().give(to)
    }

    /// Whose turn it is.
    pub fn holder(&self) -> Option<PortId> {
        self.lock().holder()
    }

    /// A guest uses the port's NIC from now on, or none does any more. An unplugged port has no
    /// carrier, neither sends nor receives, and keeps its turn if it has it.
    ///
    /// # Errors
    /// The port is gone, or the host refuses to watch the wire.
    pub fn plug(&self, port: PortId, plugged: bool) -> Result<(), TurnError> {
        self.lock().plug(port, plugged)
    }

    /// The port's NIC was given another address.
    pub fn set_address(&self, port: PortId, address: [u8; 6]) {
        self.lock().set_address(port, address);
    }

    /// Whether the port's NIC sees a carrier.
    pub fn carrier(&self, port: PortId) -> bool {
        self.lock().carrier(port)
    }

    /// What passed at a port; `None` if it is gone.
    pub fn counters(&self, port: PortId) -> Option<PortCounters> {
        self.lock().counters(port)
    }

    /// Frames that the wire had kept while nobody had the turn, and that were no port's: dropped.
    pub fn lost_without_turn(&self) -> u64 {
        self.lock().lost_without_turn()
    }

    /// That turn, if it is one of the last ones.
    pub fn times(&self, serial: u64) -> Option<TurnTimes> {
        self.lock().times(serial)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // Each change is whole before anything that could panic.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
