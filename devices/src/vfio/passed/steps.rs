//! What a switch does to a function.
//!
//! ```text
//!   prepare ─► quiesce ─► save ─► unmap ─► take ══ the hardware ═╗
//!      Running      Still: running, saved     Parked             ║
//!                       complete ◄─ resume ◄─ load ◄─ map ◄─ put ╝
//!                          Running             Still: saved, foreign
//! ```
//!
//! What the device reaches with what it was last told to do is small: its rings, and what their
//! descriptors point to. The rest of the user's memory, which takes longest, is taken from it
//! before it stands still, and given to it when it runs again, some at a time: the users' accesses
//! come in between. What such an access tells the device is put into the map first. At no time it
//! reaches memory of two users.
//!
//! `go_on` takes a device that stands still back to where it was, whatever of this was done.

use std::sync::Arc;

use super::PassedError;
use super::function::{MOST_TOLD_IN_PART, PassedFunction, Seat, Stage};
use super::hardware::{Hardware, Interrupts};
use crate::dma::DmaRegion;
use crate::vfio::dma::{Batch, DmaMemory};
use crate::vfio::error::VfioError;
use crate::vfio::interrupts::Mode;

impl PassedFunction {
    /// Takes some of the memory from a device that runs: what it does not reach with what it was
    /// told to do, from this guest physical address on. Gives where to go on, if there is more.
    /// Where it is not known what it reaches it keeps all.
    ///
    /// # Errors
    /// The host does not take it away.
    pub fn prepare(&mut self, from: u64) -> Result<Option<u64>, PassedError> {
        let description = self.kind.description.clone();
        if self.told_in_part <= MOST_TOLD_IN_PART
            && let Some(Seat::Here {
                hardware,
                stage: Stage::Running,
            }) = &mut self.seat
            && let Some(near) = description.reached_now(hardware.as_mut(), &self.dma)
        {
            self.in_part = true;
            return Ok(hardware.unmap_far(&near, batch(from))?);
        }
        Ok(None)
    }

    /// Makes the device stand still: it reads and writes no memory and does not interrupt. A second
    /// time is as good as once.
    ///
    /// # Errors
    /// It is not here, or does not stand still.
    pub fn quiesce(&mut self) -> Result<(), PassedError> {
        let description = self.kind.description.clone();
        let Some(Seat::Here { hardware, stage }) = &mut self.seat else {
            return Err(PassedError::NotHere);
        };
        if let Stage::Running = stage {
            let running = Some(description.look(hardware.as_mut())?);
            *stage = Stage::Still {
                running,
                saved: None,
                foreign: false,
            };
        }
        description.quiesce(hardware.as_mut())?;
        hardware.set_master(false)?;
        self.masters = false;
        Ok(())
    }

    /// Takes the state of the device, which stands still.
    ///
    /// # Errors
    /// It does not stand still, or does not answer.
    pub fn save(&mut self) -> Result<(), PassedError> {
        let description = self.kind.description.clone();
        let Some(Seat::Here { hardware, stage }) = &mut self.seat else {
            return Err(PassedError::NotHere);
        };
        match stage {
            Stage::Still {
                running: Some(running),
                saved,
                ..
            } => {
                let shown = description.shown(hardware.as_mut(), self.link)?;
                let state = description.save(hardware.as_mut(), running)?;
                self.counters.missed += description.read_lost(hardware.as_mut());
                *saved = Some(Box::new((state, shown)));
                Ok(())
            }
            // It was never made to run with the state that is there.
            Stage::Still { saved: Some(_), .. } => Ok(()),
            _ => Err(PassedError::NotHere),
        }
    }

    /// Takes the user's memory from the device.
    ///
    /// # Errors
    /// The host does not.
    pub fn unmap(&mut self) -> Result<(), PassedError> {
        match &mut self.seat {
            Some(Seat::Here { hardware, .. }) => {
                self.reaches_other = true;
                hardware.unmap()?;
                (self.reaches_other, self.in_part) = (false, false);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Takes the device. An image answers from now on: with the state that was saved, or with the
    /// one after a reset where none was, and then what the user's driver knows of the device is
    /// lost.
    pub fn take(&mut self) -> Option<Box<dyn Hardware>> {
        let (hardware, saved) = match self.seat.take() {
            Some(Seat::Here { hardware, stage }) => match stage {
                Stage::Still { saved, .. } => (hardware, saved),
                Stage::Running => (hardware, None),
            },
            other => {
                self.seat = other;
                return None;
            }
        };
        (self.masters, self.in_part) = (false, false);
        self.forget_interrupts();
        let parked = match saved {
            Some(saved) => self.park(saved.0, saved.1, self.link),
            None => self.begin_anew(),
        };
        if let Err(error) = parked {
            tracing::error!(%error, "a guest has no device");
        }
        Some(hardware)
    }

    /// Gives the user the device, which stands still and has another state.
    pub fn put(&mut self, hardware: Box<dyn Hardware>) {
        let saved = match self.seat.take() {
            Some(Seat::Parked { image, shown }) => {
                Some(Box::new((image.into_checkpoint(), *shown)))
            }
            _ => None,
        };
        self.forget_interrupts();
        (self.masters, self.in_part, self.told_in_part) = (false, false, 0);
        self.reaches_other = true;
        self.counters.turns += 1;
        self.seat = Some(Seat::Here {
            hardware,
            stage: Stage::Still {
                running: None,
                saved,
                foreign: true,
            },
        });
    }

    /// Gives the user's memory to the device, if the user lets it master the bus: as much as it
    /// reaches with the state that it is about to have, where that is known.
    ///
    /// # Errors
    /// The limit of locked memory is in the way, or the host has not enough.
    pub fn map(&mut self) -> Result<(), PassedError> {
        if !self.side.masters() {
            return Ok(());
        }
        let near = match self.stage() {
            Some(Stage::Still {
                saved: Some(saved), ..
            }) => self.kind.description.reached_by(&saved.0, &self.dma),
            _ => None,
        };
        // A device without rings is told of some soon.
        let near = near.filter(|near| !near.is_empty());
        Ok(self.map_memory(near.as_deref())?)
    }

    /// Gives a device that runs some of what it does not have yet of the user's memory, from this
    /// guest physical address on. Gives where to go on, if there is more.
    ///
    /// # Errors
    /// As those of [`Self::map`].
    pub fn complete(&mut self, from: u64) -> Result<Option<u64>, PassedError> {
        let memory = self.memory.clone().filter(|_| self.in_part);
        if let Some(memory) = memory
            && let Some(Seat::Here {
                hardware,
                stage: Stage::Running,
            }) = &mut self.seat
        {
            let mut next = hardware.map_more(&memory, None, batch(from))?;
            if next.is_none() && from > 0 && hardware.mapped_bytes() < memory.bytes() {
                // Memory has come behind this.
                next = Some(0);
            }
            self.in_part = next.is_some();
            return Ok(next);
        }
        Ok(None)
    }

    /// Has the device, which stands still, take over the user's state.
    ///
    /// # Errors
    /// It does not hold it.
    pub fn load(&mut self) -> Result<(), PassedError> {
        let description = self.kind.description.clone();
        let Some(Seat::Here {
            hardware,
            stage:
                Stage::Still {
                    saved: Some(saved),
                    foreign,
                    ..
                },
        }) = &mut self.seat
        else {
            return Err(PassedError::NotHere);
        };
        description.load(hardware.as_mut(), &saved.0)?;
        // What the other one's traffic has counted is not this one's.
        let lost = description.read_away(hardware.as_mut());
        self.kind.add_lost(lost);
        *foreign = false;
        Ok(())
    }

    /// Lets the device go on for the user, with its interrupts. One whose state is being taken
    /// stands still until that is over.
    ///
    /// # Errors
    /// The device does not hold what it is given, or the host refuses something.
    pub fn resume(&mut self) -> Result<(), PassedError> {
        if let Some(Stage::Running) = self.stage() {
            return Ok(());
        }
        self.direct_interrupts()?;
        if self.held {
            return Ok(());
        }
        self.follow_mastering()?;
        let description = self.kind.description.clone();
        let Some(Seat::Here { hardware, stage }) = &mut self.seat else {
            return Err(PassedError::NotHere);
        };
        match stage {
            Stage::Still {
                saved: Some(saved), ..
            } => description.resume(hardware.as_mut(), &saved.0)?,
            Stage::Still {
                running: Some(running),
                ..
            } => description.go_on(hardware.as_mut(), running)?,
            _ => return Err(PassedError::NotHere),
        }
        *stage = Stage::Running;
        self.tell_again()
    }

    /// Interrupts the user once more by each message that the device has taken for sent: should one
    /// not have arrived before the device was made to stand still, its cause has masked itself
    /// (EIAC) and does not come again by being raised anew. No others: a driver that has masked its
    /// interrupts relies on it.
    fn tell_again(&mut self) -> Result<(), PassedError> {
        if self.side.mode() == Mode::Msix {
            let description = self.kind.description.clone();
            let told = description.told(self.hardware()?.as_mut());
            let vectors = (0..u32::BITS as u16).filter(|vector| told >> vector & 1 != 0);
            self.side.trigger(vectors.collect());
        }
        Ok(())
    }

    /// Has a device that stands still run as before, loading the user's state if it has another.
    ///
    /// # Errors
    /// As those of the steps.
    pub(super) fn go_on(&mut self) -> Result<(), PassedError> {
        self.map()?;
        if matches!(self.stage(), Some(Stage::Still { foreign: true, .. })) {
            self.load()?;
        }
        self.resume()?;
        let mut next = Some(0);
        while let Some(from) = next {
            next = self.complete(from)?;
        }
        Ok(())
    }

    /// Keeps the device from reading and writing memory and from interrupting, whatever state it is
    /// in, and takes it.
    pub fn silence(&mut self) -> Option<Box<dyn Hardware>> {
        if !self.has_device() {
            return None;
        }
        // Its state, if it runs, is nowhere else.
        let kept = self.quiesce().and_then(|()| self.save());
        if let Err(error) = kept {
            tracing::warn!(%error, "a device that is to be silenced");
        }
        let mut hardware = self.take()?;
        silence(hardware.as_mut());
        Some(hardware)
    }

    /// Takes a device from a user that has gone, and that does not stand still: it is reset, and
    /// the state is lost.
    ///
    /// # Errors
    /// It does not come out of its reset.
    pub fn abandon(&mut self) -> Result<(), PassedError> {
        let fresh = (self.survey.fresh().clone(), self.survey.shown().clone());
        let saved = Some(Box::new(fresh));
        let (description, address) = (self.kind.description.clone(), self.address);
        let Some(Seat::Here { hardware, stage }) = &mut self.seat else {
            return Err(PassedError::NotHere);
        };
        // A part of it may stay in the map, which is not all of it.
        self.reaches_other = true;
        silence(hardware.as_mut());
        (self.masters, self.in_part) = (false, false);
        description.reset(hardware.as_mut(), address)?;
        description.quiesce(hardware.as_mut())?;
        *stage = Stage::Still {
            running: None,
            saved,
            foreign: true,
        };
        self.masters = false;
        self.forget_interrupts();
        Ok(())
    }

    /// Resets the device, which is here: it has the state after a reset, with the user's address,
    /// and masters no bus.
    ///
    /// # Errors
    /// It does not come back.
    pub(super) fn reset_device(&mut self) -> Result<(), PassedError> {
        self.reaches_other = true;
        let hardware = self.hardware()?;
        silence(hardware.as_mut());
        (self.masters, self.in_part) = (false, false);
        let hardware = self.hardware()?;
        if let Err(error) = hardware.reset() {
            tracing::debug!(%error, "the host does not reset the device");
        }
        hardware.set_master(false)?;
        self.abandon()?;
        self.go_on()
    }

    /// The client has gone: the device reaches no memory any more, and stands still until somebody
    /// takes it or the client is back.
    pub fn client_gone(&mut self) {
        // As its own reset would leave the command register; whoever comes back writes it anew.
        let command = crate::pci::config::offset::COMMAND;
        let without = self.side.config.command() - crate::pci::config::Command::BUS_MASTER;
        self.side.config.set(command, &without.bits().to_le_bytes());
        self.memory = None;
        self.reaches_other = true;
        self.held = false;
        if !self.has_device() {
            return;
        }
        let saved = self.quiesce().and_then(|()| self.save());
        if let Err(error) = saved
            && let Err(worse) = self.abandon()
        {
            tracing::error!(%error, %worse, "the device of a guest that has gone");
        }
        self.silence_here();
    }

    /// Regions of the user's memory have gone, and others have come: the device reaches what there
    /// is now, and nothing else. It stands still while something is taken from it, and while there
    /// is none. What comes is given to it while it works. Gives the memory that there is.
    ///
    /// # Errors
    /// It cannot be mapped, or the host does not take away what has gone: the device neither
    /// masters the bus nor interrupts then, until its driver or a switch has it go on.
    pub fn memory_changed(
        &mut self,
        removed: &[DmaRegion],
        added: &[DmaRegion],
    ) -> Result<Option<Arc<DmaMemory>>, PassedError> {
        let before = self.memory.take();
        let memory = match &before {
            Some(before) => before.changed(removed, added),
            // There was none, or what there was could not be given to the device.
            None => DmaMemory::of_space(&self.dma),
        };
        let memory = memory.map(Arc::new);
        if let (Some(before), Ok(memory), []) = (&before, &memory, removed)
            && before.piece_bytes() == memory.piece_bytes()
        {
            self.memory = Some(memory.clone());
            match self.map_what_came(memory) {
                Ok(()) => return Ok(self.memory.clone()),
                Err(error) => tracing::debug!(%error, "a device stands still while memory comes"),
            }
            self.memory = None;
        }
        if let Some(Stage::Running) = self.stage()
            && let Err(error) = self.quiesce()
        {
            tracing::warn!(%error, "a device whose memory goes");
        }
        let followed = self.let_go_of_memory().and_then(|()| {
            self.memory = Some(memory?).filter(|memory| memory.bytes() > 0);
            match self.has_device() && self.memory.is_some() {
                true => self.go_on(),
                false => Ok(()),
            }
        });
        if let Err(error) = followed {
            self.silence_here();
            return Err(error);
        }
        Ok(self.memory.clone())
    }

    /// Takes all memory from a device that is here and stands still.
    fn let_go_of_memory(&mut self) -> Result<(), PassedError> {
        if let Some(Seat::Here { hardware, .. }) = &mut self.seat {
            self.reaches_other = true;
            hardware.set_master(false)?;
            (self.masters, self.in_part) = (false, false);
            hardware.unmap()?;
            self.reaches_other = false;
        }
        Ok(())
    }

    /// Keeps a device that is here from reading and writing memory and from interrupting.
    pub(super) fn silence_here(&mut self) {
        self.reaches_other = true;
        self.forget_interrupts();
        if let Some(Seat::Here { hardware, .. }) = &mut self.seat {
            silence(hardware.as_mut());
        }
        (self.masters, self.in_part) = (false, false);
    }
}

impl PassedFunction {
    /// Lets the device reach all of `memory`, of which it reached all that there was before. One
    /// that has a part only, or none, gets it as it gets the rest.
    fn map_what_came(&mut self, memory: &DmaMemory) -> Result<(), PassedError> {
        match &mut self.seat {
            Some(Seat::Here { hardware, .. }) if !self.in_part && hardware.mapped_bytes() > 0 => {
                hardware.map_more(memory, None, Batch::ALL)?;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Pieces of memory that are put into the map or taken out of it before somebody else may have the
/// function for an access.
const AT_ONCE: usize = 8;

fn batch(from: u64) -> Batch {
    Batch {
        from,
        most: AT_ONCE,
    }
}

/// Keeps a device from reading and writing memory and from interrupting, and takes all memory from
/// it.
pub fn silence(hardware: &mut dyn Hardware) {
    let mut failed: Vec<VfioError> = Vec::new();
    failed.extend(hardware.set_master(false).err());
    failed.extend(hardware.unmap().err());
    if let Err(error) = hardware.set_interrupts(Interrupts::Off) {
        tracing::error!(%error, "interrupts stay");
    }
    for error in failed {
        tracing::error!(%error, "the device may still reach memory");
    }
}
