//! What a device host has and its VMs get by turns: a model of a NIC, or a function of the host's
//! PCI bus.
//!
//! ```text
//!   Host ── Card: makes shares, carries out switches
//!     └─ Context ── Share: one VM's part of the card, which has the turn or has not
//! ```

use devices::wire::turns::TurnTimes;
use recovery::switch::{Outcome, Phases};

use super::context::Context;
use super::protocol::HostStatus;
use super::share::Share;
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
    /// Whether its state is what the drivers in the guests keep of it: they suspend it while their
    /// guest runs.
    fn is_suspended_by_drivers(&self) -> bool {
        false
    }
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
