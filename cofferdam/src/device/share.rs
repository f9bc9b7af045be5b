//! A VM's part of what a device host has.

use devices::vfio_user::Offered;
use devices::vfio_user::server::ServerEvent;
use vmm::SharedSubscriber;

use super::protocol::ContextStatus;
use crate::options::MacAddress;

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
    /// reaches no memory; when the guest goes on from a snapshot, its NIC is given `address` with the
    /// state that it had there, once.
    fn listener(&self, address: Option<MacAddress>) -> Listener;
    /// Says what it knows of itself.
    fn fill(&self, status: &mut ContextStatus);
}
