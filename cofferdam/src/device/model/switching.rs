//! The steps of a switch between models of NICs, each of which is its guest's context itself:
//! registers, rings and the map of memory stay where they are, so saving, mapping and loading are
//! nothing, whatever the size of a guest. What goes on is the turn at the wire.

use std::sync::{MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use devices::pci::PciFunction;
use devices::wire::turns::Turns;
use recovery::switch::Switchable;

use super::ModelShare;
use crate::device::context::Context;

/// How long a NIC may be held by somebody else: a call of its driver that is being taken back.
const QUIESCE_TIME: Duration = Duration::from_secs(2);
/// Between two looks whether it is free.
const LOOK: Duration = Duration::from_micros(50);

/// See the module.
pub struct ModelSwitch<'a> {
    turns: &'a Turns,
    /// The NIC of the guest that has the turn, while it stands still: its thread can neither send
    /// nor receive for it, nor reach memory.
    held: Option<MutexGuard<'a, dyn PciFunction + 'static>>,
    /// Which turn was given last.
    pub turn: Option<u64>,
}

impl<'a> ModelSwitch<'a> {
    /// Nothing is held.
    pub fn new(turns: &'a Turns) -> Self {
        Self {
            turns,
            held: None,
            turn: None,
        }
    }
}

impl<'a> Switchable for ModelSwitch<'a> {
    type Guest = &'a Context<ModelShare>;

    fn quiesce(&mut self, guest: &&'a Context<ModelShare>) -> Result<(), String> {
        let guest: &'a Context<ModelShare> = guest;
        let deadline = Instant::now() + QUIESCE_TIME;
        while self.held.is_none() {
            match guest.share.nic.function.try_lock() {
                Ok(held) => self.held = Some(held),
                Err(TryLockError::Poisoned(held)) => {
                    self.held = Some(PoisonError::into_inner(held));
                }
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(LOOK);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(format!("the NIC of {} is held; try again", guest.vm));
                }
            }
        }
        Ok(())
    }

    fn save(&mut self, _: &&'a Context<ModelShare>) -> Result<(), String> {
        Ok(())
    }

    fn unmap(&mut self, _: &&'a Context<ModelShare>) -> Result<(), String> {
        Ok(())
    }

    fn map(&mut self, guest: &&'a Context<ModelShare>) -> Result<(), String> {
        match guest.is_connected() {
            true => Ok(()),
            false => Err(format!("{} has gone", guest.vm)),
        }
    }

    fn load(&mut self, _: &&'a Context<ModelShare>) -> Result<(), String> {
        Ok(())
    }

    fn resume(&mut self, guest: &&'a Context<ModelShare>) -> Result<(), String> {
        let turn = self.turns.give(Some(guest.share.port));
        self.turn = Some(turn.map_err(|error| error.to_string())?);
        self.held = None;
        Ok(())
    }

    fn silence(&mut self) {
        // Taking a turn away cannot fail.
        let _ = self.turns.give(None);
        self.held = None;
    }
}
