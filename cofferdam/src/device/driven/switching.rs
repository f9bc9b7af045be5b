//! The steps of a switch of a function whose state its drivers keep. The drivers are asked in the
//! first step and in the last one, in which no function is held: they need their registers for it.
//! In between both VMs' functions are held: what their guests do to them meanwhile waits.

use std::sync::atomic::Ordering;

use devices::vfio::passed::driven::DrivenFunction;
use devices::vfio::passed::hardware::Hardware;
use devices::vfio::passed::silence;
use recovery::by_turns::GivenAway;
use recovery::switch::Switchable;

use super::DrivenShare;
use super::drivers::Drivers;
use crate::control::client::AskError;
use crate::device::context::Context;
use crate::device::held::{Held, lock};

/// See the module.
pub struct DrivenSwitch<'a> {
    /// The hardware, while no VM has it.
    shelf: &'a mut Option<Box<dyn Hardware>>,
    drivers: &'a dyn Drivers,
    /// The functions of the VMs that take part.
    held: Held<'a, DrivenShare, DrivenFunction>,
    /// Whose driver did not suspend the device, and works on if it goes on.
    works: Option<&'a Context<DrivenShare>>,
}

impl<'a> DrivenSwitch<'a> {
    /// Nothing is held.
    pub fn new(shelf: &'a mut Option<Box<dyn Hardware>>, drivers: &'a dyn Drivers) -> Self {
        Self {
            shelf,
            drivers,
            held: Held::new(),
            works: None,
        }
    }

    /// The function of `guest`, which is held from now on.
    fn of(&mut self, guest: &'a Context<DrivenShare>) -> &mut DrivenFunction {
        self.held.of(guest, &guest.share.function)
    }
}

/// Whether `guest` has a driver that can be asked: nobody waits for a VM that has gone, one that has
/// not begun finds the device by itself, and one whose driver was given up runs no call of it.
fn can_be_asked(guest: &Context<DrivenShare>) -> bool {
    guest.is_connected()
        && !guest.driver_lost.load(Ordering::Relaxed)
        && lock(&guest.share.function).has_memory()
}

impl<'a> Switchable for DrivenSwitch<'a> {
    type Guest = &'a Context<DrivenShare>;

    fn prepare(&mut self, guest: &Self::Guest) -> Result<(), String> {
        if !can_be_asked(guest) {
            return Ok(());
        }
        match self.drivers.hand_over(&guest.vm) {
            Ok(GivenAway::Suspended) => Ok(()),
            Ok(GivenAway::Forgotten) => {
                lock(&guest.share.function).forget();
                Ok(())
            }
            // One that goes meanwhile is not waited for.
            Err(_) if !guest.is_connected() => Ok(()),
            Err(error) => {
                // One of which nothing was heard may have suspended it.
                let refused = error.downcast_ref();
                if let Some(AskError::Refused(_)) = refused {
                    self.works = Some(guest);
                }
                Err(format!("{}: {error:#}", guest.vm))
            }
        }
    }

    fn quiesce(&mut self, guest: &Self::Guest) -> Result<(), String> {
        self.of(guest).quiesce().map_err(|error| error.to_string())
    }

    /// Its driver has it.
    fn save(&mut self, guest: &Self::Guest) -> Result<(), String> {
        match self.of(guest).has_device() {
            true => Ok(()),
            false => Err(format!("{} does not have the device", guest.vm)),
        }
    }

    fn unmap(&mut self, guest: &Self::Guest) -> Result<(), String> {
        let function = self.of(guest);
        function.unmap().map_err(|error| error.to_string())?;
        if let Some(hardware) = function.take() {
            *self.shelf = Some(hardware);
        }
        guest.share.turn.store(false, Ordering::Release);
        Ok(())
    }

    fn map(&mut self, guest: &Self::Guest) -> Result<(), String> {
        if !guest.is_connected() {
            return Err(format!("{} has gone", guest.vm));
        }
        let hardware = self.shelf.take();
        let function = self.of(guest);
        if let Some(hardware) = hardware {
            function.put(hardware);
        }
        // What the other driver left is taken away before the device reaches this one's memory.
        let given = function.begin_anew().and_then(|()| function.map());
        given.map_err(|error| error.to_string())
    }

    /// Its driver has it.
    fn load(&mut self, _guest: &Self::Guest) -> Result<(), String> {
        Ok(())
    }

    fn resume(&mut self, guest: &Self::Guest) -> Result<(), String> {
        self.of(guest).resume().map_err(|error| error.to_string())?;
        guest.share.turn.store(true, Ordering::Release);
        Ok(())
    }

    fn complete(&mut self, guest: &Self::Guest) -> Result<(), String> {
        self.held.let_go();
        let works = self.works.is_some_and(|works| std::ptr::eq(works, *guest));
        if works || !can_be_asked(guest) {
            return Ok(());
        }
        match self.drivers.take_over(&guest.vm) {
            Ok(how) => {
                tracing::debug!(vm = %guest.vm, ?how, "has the device");
                Ok(())
            }
            Err(error) => {
                // Whoever silences the device then finds it.
                self.of(guest);
                Err(format!("{}: {error:#}", guest.vm))
            }
        }
    }

    fn silence(&mut self) {
        for (guest, function) in self.held.all() {
            if let Some(hardware) = function.silence() {
                *self.shelf = Some(hardware);
            }
            guest.share.turn.store(false, Ordering::Release);
        }
        if let Some(hardware) = self.shelf {
            silence(hardware.as_mut());
        }
    }
}
