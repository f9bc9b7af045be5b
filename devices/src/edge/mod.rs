//! The edge of a PCI function: what stands between the guest and the function, and can be told to
//! let things go wrong.
//!
//! ```text
//!   guest ─► configuration space, BARs ─► Edge ─► function (a model, another process's, the host's)
//!   guest ◄─ line, vectors ◄───────────── Edge ◄─ function
//!                                          ▲
//!            host: arm, disarm, statuses ──┘
//! ```
//!
//! A fault ([`EdgeOrder`]) says which events it is for, at which of them it strikes, and what it
//! does ([`EdgeKind`]). With none armed an access costs two more relaxed loads, and interrupts
//! cost as many. The function knows nothing of its edge: saving, restoring, holding, checkpoints,
//! resets and accesses of the host itself go past, and what is armed is the host's, in no saved
//! state. A power-on reset leaves faults armed; what they held up is lost with it, and so it is
//! where a state is put back.
//!
//! What the edge does not see:
//! - Memory. What a function reads and writes by itself goes on, also of one that does not answer
//!   any more.
//! - Interrupts of a function in another process or of the host's: they go through the kernel into
//!   the guest. Faults of interrupts are refused there, and one that is silent or removed goes on
//!   interrupting.
//! - Accesses that do not exit. While a fault is armed there are none: areas of base address
//!   registers that are memory ([`crate::pci::areas`]) are taken out of the guest then, and no store
//!   goes by an ioeventfd.
//! - What the guest does in one access of more than 8 bytes: the bus hands on at most 8.
//!
//! Lock order: the telling of links, the function, the edge, a line. The edge is not locked while
//! the function is called. A card's link is told with neither locked ([`Edge::tell_link`]): pulling
//! a cable is no access, and who can do it is the card's business ([`SetCable`]).

mod fault;
mod function;
mod held;
mod interrupts;
mod kind;
mod order;
mod sequence;
mod state;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use self::fault::Fault;
use self::function::Registers;
use self::state::State;
use crate::pci::PciFunction;

pub use self::fault::EdgeStatus;
pub use self::function::AtEdge;
pub use self::kind::EdgeKind;
pub use self::order::{Direction, EdgeOrder, MAX_SPAN, MILLION, OrderError, When};
pub use self::sequence::Sequence;

/// Most faults at one edge.
pub const MAX_FAULTS: usize = 16;

/// Pulls the network cable of a card, or plugs it in again, whatever is at its other end: the link
/// goes and comes as such a link does. It is in until told otherwise, and no part of the card's
/// state. Not to be called with the card's function locked.
pub type SetCable = Arc<dyn Fn(bool) + Send + Sync>;

/// See the module.
#[derive(Default)]
pub struct Edge {
    /// There are faults. Changes with the state locked.
    armed: AtomicBool,
    /// The function's interrupts go to the guest by descriptors.
    unseen: AtomicBool,
    state: Mutex<State>,
    /// How the function's link goes, if it has one.
    cable: OnceLock<SetCable>,
    /// Locked while the link is told, so that it is told in the order in which it goes.
    telling: Mutex<()>,
}

impl std::fmt::Debug for Edge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Edge")
            .field("armed", &self.armed)
            .finish_non_exhaustive()
    }
}

impl Edge {
    /// `function` as the guest reaches it. It is a guest's while it is locked, so this one is made
    /// for each access.
    pub fn around<'a>(&'a self, function: &'a mut dyn PciFunction) -> AtEdge<'a> {
        AtEdge {
            edge: self,
            function,
        }
    }

    /// The function has a link, which goes and comes by `cable`.
    pub fn has_link(&self, cable: SetCable) {
        // It is told once, when the card is made.
        let _ = self.cable.set(cable);
    }

    /// An access to the function's registers is over, and the function not locked any more.
    pub fn accessed(&self) {
        if self.is_armed() {
            self.tell_link();
        }
    }

    /// Tells the card of its link, if that has changed. To be called behind [`Edge::disarm`], when
    /// the function is not locked any more.
    pub fn tell_link(&self) {
        let Some(set_cable) = self.cable.get() else {
            return;
        };
        let _telling = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
        let news = self.state().cable.news();
        if let Some(plugged) = news {
            set_cable(plugged);
        }
    }

    /// Arms a fault. `function` is the one that this is the edge of.
    ///
    /// # Errors
    /// It would never strike, or this function cannot fail so.
    pub fn arm(
        &self,
        order: EdgeOrder,
        function: &mut dyn PciFunction,
    ) -> Result<EdgeStatus, OrderError> {
        order.check()?;
        if order.kind.needs_interrupts() && self.unseen.load(Ordering::Relaxed) {
            return Err(OrderError::InterruptsUnseen(order.kind));
        }
        let has_link = self.cable.get().is_some();
        let mut state = self.state();
        if state.faults.len() >= MAX_FAULTS {
            return Err(OrderError::TooMany(state.faults.len()));
        }
        if order.kind == EdgeKind::LinkFlap && !has_link {
            return Err(OrderError::NoLink);
        }
        state.last_number += 1;
        let fault = Fault::new(state.last_number, order);
        let status = fault.status().clone();
        state.faults.push(fault);
        self.armed.store(true, Ordering::Relaxed);
        state.look_who_is_there();
        drop(state);
        // The function is the caller's: none comes back meanwhile.
        for area in function.areas() {
            area.take_out();
        }
        Ok(status)
    }

    /// Takes fault number `number` back, or all of them. What they held up arrives: stores and
    /// interrupts now, the link with [`Edge::tell_link`]. Gives those that were taken back, with
    /// their last counters.
    pub fn disarm(&self, number: Option<u64>, function: &mut dyn PciFunction) -> Vec<EdgeStatus> {
        let mut state = self.state();
        let is_it = |fault: &mut Fault| number.is_none_or(|it| fault.status().number == it);
        let gone: Vec<_> = state.faults.extract_if(.., is_it).collect();
        let late = state.settle();
        if state.faults.is_empty() {
            self.armed.store(false, Ordering::Relaxed);
        }
        drop(state);
        let mut function = function;
        function.store_all(late);
        gone.iter().map(|fault| fault.status().clone()).collect()
    }

    /// The faults that are armed, in the order in which they were.
    pub fn statuses(&self) -> Vec<EdgeStatus> {
        let state = self.state();
        let faults = state.faults.iter();
        faults.map(|fault| fault.status().clone()).collect()
    }

    /// Whether a fault is armed.
    pub fn is_armed(&self) -> bool {
        self.armed.load(Ordering::Relaxed)
    }

    fn set_interrupts_unseen(&self) {
        self.unseen.store(true, Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
