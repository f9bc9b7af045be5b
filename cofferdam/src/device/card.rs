//! What a device host has and its VMs get by turns: a model of a NIC, or a function of the host's
//! PCI bus.
//!
//! ```text
//!   Host ── Card: makes shares, carries out switches
//!     └─ Context ── Share: one VM's part of the card, which has the turn or has not
//! ```

use devices::vfio_user::Offered;
use devices::vfio_user::server::ServerEvent;
use devices::wire::turns::TurnTimes;
use recovery::switch::{Outcome, Phases};
use vmm::SharedSubscriber;

use super::context::Context;
use super::protocol::{ContextStatus, HostStatus};
use crate::options::MacAddress;

/// How a switch ended.
#[derive(Debug)]
pub struct Passing {
    /// Who has the turn now.
    pub outcome: Outcome,
    /// How long its steps took.
    pub phases: Phases,
    /// Which turn was given, where frames are counted by turns.
    pub turn: Option<u64>,
}

/// What guests have by turns.
pub trait Card: Send + Sync + Sized + 'static {
    /// A VM's part of it.
    type Share: Share;

    /// What it is, in a word: the name of a model, or of a device.
    fn name(&self) -> String;
    /// A share for a VM whose NIC has the address `mac`, without the turn.
    ///
    /// # Errors
    /// The host has no descriptors left.
    fn share(&self, mac: MacAddress) -> anyhow::Result<Self::Share>;
    /// Takes the turn from one VM, if one has it, and gives it to another, if there is one. One at
    /// a time.
    fn pass_on(
        &self,
        from: Option<&Context<Self::Share>>,
        to: Option<&Context<Self::Share>>,
    ) -> Passing;
    /// The frames at the edges of that turn, if they are known.
    fn times(&self, turn: u64) -> Option<TurnTimes>;
    /// Nobody has the turn any more: the process ends.
    fn end(&self);
    /// Says what it knows of itself.
    fn fill(&self, status: &mut HostStatus);
}

/// Hears of a client on the thread of its context, while no lock is held.
pub type Listener = Box<dyn FnMut(&ServerEvent) + Send>;

/// A VM's part of a card.
pub trait Share: Send + Sync + 'static {
    /// What its client is shown.
    fn offered(&self) -> Offered;
    /// What its event loop serves besides the client.
    fn events(&self) -> Option<SharedSubscriber>;
    /// Gives its NIC another address.
    fn set_address(&self, mac: MacAddress);
    /// A client uses it from now on, or none does any more.
    ///
    /// # Errors
    /// It is gone, or the host refuses to watch for it.
    fn plug(&self, plugged: bool) -> anyhow::Result<()>;
    /// Whether it has the turn.
    fn has_turn(&self) -> bool;
    /// Does what has to be done when something happens to its client: when that has gone, its NIC
    /// reaches no memory.
    fn listener(&self) -> Listener;
    /// Says what it knows of itself.
    fn fill(&self, status: &mut ContextStatus);
}
