//! The steps of a switch of a function of the host. Both VMs' functions are held from the first
//! step that touches them to the end: what their guests do to them meanwhile waits.

use std::time::{Duration, Instant};

use devices::vfio::passed::hardware::Hardware;
use devices::vfio::passed::{PassedError, PassedFunction, silence};
use recovery::switch::Switchable;

use super::PassedShare;
use crate::device::context::Context;
use crate::device::held::{Held, lock};

/// See the module.
pub struct PassedSwitch<'a> {
    /// The hardware, while no VM has it.
    shelf: &'a mut Option<Box<dyn Hardware>>,
    /// The functions of the VMs that take part.
    held: Held<'a, PassedShare, PassedFunction>,
}

/// How long others wait for a function to which something is done little by little.
const WAIT: Duration = Duration::from_millis(1);
/// How long they may have it then. Whoever waits for it is not the next one otherwise.
const LET_OTHERS: Duration = Duration::from_micros(50);

/// Does something to the function of `guest` little by little, with others in between.
fn by_and_by(
    guest: &Context<PassedShare>,
    act: impl Fn(&mut PassedFunction, u64) -> Result<Option<u64>, PassedError>,
) -> Result<(), String> {
    let (mut next, mut begun) = (Some(0), Instant::now());
    while let Some(from) = next {
        let done = act(&mut lock(&guest.share.function), from);
        next = done.map_err(|error| error.to_string())?;
        if next.is_some() && begun.elapsed() > WAIT {
            std::thread::sleep(LET_OTHERS);
            begun = Instant::now();
        }
    }
    Ok(())
}

impl<'a> PassedSwitch<'a> {
    /// Nothing is held.
    pub fn new(shelf: &'a mut Option<Box<dyn Hardware>>) -> Self {
        Self {
            shelf,
            held: Held::new(),
        }
    }

    /// The function of `guest`, which is held from now on. Whoever has it has it for an access, or
    /// for as long as it takes to map memory.
    fn of(&mut self, guest: &'a Context<PassedShare>) -> &mut PassedFunction {
        self.held.of(guest, &guest.share.function)
    }
}

impl<'a> Switchable for PassedSwitch<'a> {
    type Guest = &'a Context<PassedShare>;

    fn prepare(&mut self, guest: &Self::Guest) -> Result<(), String> {
        // Nobody is held yet: its guest goes on in between.
        by_and_by(guest, PassedFunction::prepare)
    }

    /// The device of a VM that has gone is reset if it does not stand still: nobody waits for its
    /// state.
    fn quiesce(&mut self, guest: &Self::Guest) -> Result<(), String> {
        let function = self.of(guest);
        let quiet = function.quiesce();
        let quiet = match quiet {
            Err(error) if !guest.is_connected() => {
                tracing::warn!(%error, vm = %guest.vm, "the device is reset");
                function.abandon()
            }
            quiet => quiet,
        };
        quiet.map_err(|error| error.to_string())
    }

    fn save(&mut self, guest: &Self::Guest) -> Result<(), String> {
        let saved = self.of(guest).save();
        saved.map_err(|error| error.to_string())
    }

    fn unmap(&mut self, guest: &Self::Guest) -> Result<(), String> {
        let function = self.of(guest);
        function.unmap().map_err(|error| error.to_string())?;
        if let Some(hardware) = function.take() {
            *self.shelf = Some(hardware);
        }
        guest.share.set_turn(false);
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
        function.map().map_err(|error| error.to_string())
    }

    fn load(&mut self, guest: &Self::Guest) -> Result<(), String> {
        self.of(guest).load().map_err(|error| error.to_string())
    }

    fn resume(&mut self, guest: &Self::Guest) -> Result<(), String> {
        self.of(guest).resume().map_err(|error| error.to_string())?;
        guest.share.set_turn(true);
        Ok(())
    }

    fn complete(&mut self, guest: &Self::Guest) -> Result<(), String> {
        self.held.let_go();
        let done = by_and_by(guest, PassedFunction::complete);
        if done.is_err() {
            // Whoever silences the device then finds it.
            self.of(guest);
        }
        done
    }

    fn silence(&mut self) {
        for (guest, function) in self.held.all() {
            if let Some(hardware) = function.silence() {
                *self.shelf = Some(hardware);
            }
            guest.share.set_turn(false);
        }
        if let Some(hardware) = self.shelf {
            silence(hardware.as_mut());
        }
    }
}
