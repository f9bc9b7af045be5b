//! A function whose state its users' own drivers keep: each suspends it before somebody else gets
//! it, and resumes it when it is back.
//!
//! ```text
//!   user's driver suspends ─► quiesce ─► unmap ─► take ══ the hardware ═╗
//!   user's driver resumes ◄─ resume ◄─ map ◄─ begin anew: reset ◄─ put ◄╝
//! ```
//!
//! What is kept here of a user without the device is its configuration space and its table of
//! MSI-X; a suspended driver touches no register, and whoever does finds a device that does not
//! answer (all ones). A user that has never had it finds no function at all: its kernel is not to
//! probe what is not there. It finds one as soon as it has had the device.

use std::sync::Arc;

use super::PassedError;
use super::function::Counters;
use super::hardware::Hardware;
use super::opened::{Opened, Shape};
use super::steps::silence;
use super::user_interrupts::UserInterrupts;
use crate::dma::{DmaRegion, DmaSpace};
use crate::pci::config::{Command, offset};
use crate::pci::registers::Description;
use crate::pci::{BarIndex, BarRange, BarSize, PciFunction};
use crate::vfio::address::PciAddress;
use crate::vfio::dma::{Batch, DmaMemory};
use crate::vfio::layout::GuestView;
use crate::vfio::side::{UserSide, reaches};
use crate::vfio_user::server::ClientInterrupts;

/// What is known of such a function before anybody has it.
#[derive(Debug)]
pub struct DrivenKind {
    shape: Shape,
    /// How it is reset besides, and what no driver gets at, if it is described: an emulated one may
    /// do nothing when the host resets it.
    description: Option<Description>,
}

impl DrivenKind {
    /// A function that was opened: it is reset, and masters no bus.
    ///
    /// # Errors
    /// It cannot be reset, or shows what cannot be.
    pub fn open(opened: Opened) -> Result<(Self, Box<dyn Hardware>), PassedError> {
        let Opened {
            mut hardware,
            shape,
            description,
        } = opened;
        if let Some(description) = &description {
            hardware.set_bar(description.device.bar);
        }
        Self::of(Box::new(hardware), shape, description)
    }

    /// The same for a function that is reached in another way.
    ///
    /// # Errors
    /// As those of [`Self::open`].
    pub fn of(
        mut hardware: Box<dyn Hardware>,
        shape: Shape,
        description: Option<Description>,
    ) -> Result<(Self, Box<dyn Hardware>), PassedError> {
        // A driver that has suspended it may have left it addresses of its guest's memory.
        if !hardware.can_reset() {
            return Err(PassedError::NoReset {
                address: shape.address,
            });
        }
        shape.view()?;
        let kind = Self { shape, description };
        kind.begin_anew(hardware.as_mut())?;
        Ok((kind, hardware))
    }

    /// Its vendor and device identifiers, in words.
    pub fn name(&self) -> String {
        let (vendor, device) = self.shape.identity();
        format!("{vendor:04x}:{device:04x}")
    }

    /// Takes from a device what whoever had it left there, and whatever memory it reaches still: a
    /// host that could not take that away before may not be able to now.
    fn begin_anew(&self, hardware: &mut dyn Hardware) -> Result<(), PassedError> {
        hardware.set_master(false)?;
        hardware.unmap()?;
        hardware.reset().map_err(PassedError::Reset)?;
        hardware.set_master(false)?;
        if let Some(description) = &self.description {
            // Each driver sets the address that it knows.
            description.reset(hardware, [0; 6])?;
            description.quiesce(hardware)?;
        }
        Ok(())
    }

    /// Whether this is the device's memory of what it did for others, or a way around what is
    /// looked at.
    fn withholds(&self, bar: BarIndex, offset: u64, bytes: usize) -> bool {
        let description = self.description.as_ref();
        description.is_some_and(|description| description.withholds(bar, offset, bytes))
    }

    /// Where it is on the host.
    pub fn address(&self) -> PciAddress {
        self.shape.address
    }
}

/// See the module.
pub struct DrivenFunction {
    kind: Arc<DrivenKind>,
    hardware: Option<Box<dyn Hardware>>,
    /// What the device reaches is this user's memory, all of it.
    mapped: bool,
    /// The device, if it is here, may do what the user lets it.
    runs: bool,
    /// The user's kernel may know of the function: it has had the device since it began.
    known: bool,
    dma: DmaSpace,
    /// The user's memory in this process.
    memory: Option<Arc<DmaMemory>>,
    interrupts: UserInterrupts,
    side: UserSide,
    /// The function may master the bus.
    masters: bool,
    counters: Counters,
}

impl DrivenFunction {
    /// The function for a user, who has not had it. It reaches what `dma` reaches.
    ///
    /// # Errors
    /// There are no descriptors.
    pub fn new(
        kind: Arc<DrivenKind>,
        dma: DmaSpace,
    ) -> Result<(Self, ClientInterrupts), PassedError> {
        let GuestView {
            config,
            msix,
            pmcsr,
            has_pin,
        } = kind.shape.view()?;
        let (interrupts, msix) = UserInterrupts::new(msix).map_err(PassedError::Events)?;
        let client = interrupts.client();
        let function = Self {
            kind,
            hardware: None,
            mapped: false,
            runs: false,
            known: false,
            dma,
            memory: None,
            interrupts,
            side: UserSide::new(config, msix, pmcsr, has_pin),
            masters: false,
            counters: Counters::default(),
        };
        Ok((function, client))
    }

    /// What was done for its user.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes that the device reaches for this user.
    pub fn mapped_bytes(&self) -> u64 {
        let hardware = self.hardware.as_ref();
        hardware.map_or(0, |hardware| hardware.mapped_bytes())
    }

    /// Whether the device is here.
    pub fn has_device(&self) -> bool {
        self.hardware.is_some()
    }

    /// Whether the user has a machine in which it may look for the function.
    pub fn has_memory(&self) -> bool {
        self.memory.is_some()
    }

    /// The user's kernel does not know of the function any more.
    pub fn forget(&mut self) {
        self.known = false;
    }

    /// The eventfds of the user's client are others.
    pub fn interrupts_changed(&mut self) {
        self.interrupts.forget();
        self.follow();
    }

    fn hardware(&mut self) -> Result<&mut Box<dyn Hardware>, PassedError> {
        self.hardware.as_mut().ok_or(PassedError::NotHere)
    }

    /// Has the device do what the user lets it, where it is here and runs.
    fn follow(&mut self) {
        if self.runs
            && let Err(error) = self.try_to_follow()
        {
            tracing::error!(%error, "the device does not do what its driver wants");
        }
    }

    fn try_to_follow(&mut self) -> Result<(), PassedError> {
        let hardware = self.hardware.as_mut().ok_or(PassedError::NotHere)?;
        if self
            .interrupts
            .direct(hardware.as_mut(), self.side.mode())?
        {
            self.side.trigger(self.interrupts.take_waiting());
        }
        let masters = self.side.masters();
        if masters != self.masters {
            if masters {
                self.map()?;
            }
            self.hardware()?.set_master(masters)?;
            self.masters = masters;
        }
        Ok(())
    }

    /// Keeps the device from reading and writing memory and from interrupting. A second time is as
    /// good as once.
    ///
    /// # Errors
    /// It is not here, or the host does not.
    pub fn quiesce(&mut self) -> Result<(), PassedError> {
        self.runs = false;
        self.hardware()?.set_master(false)?;
        self.masters = false;
        self.end_interrupts()
    }

    fn end_interrupts(&mut self) -> Result<(), PassedError> {
        self.interrupts.forget();
        let hardware = self.hardware()?;
        let ended = hardware.set_interrupts(super::hardware::Interrupts::Off);
        self.interrupts.set_level(false);
        ended.map_err(PassedError::Interrupts)
    }

    /// Takes the user's memory from the device.
    ///
    /// # Errors
    /// The host does not.
    pub fn unmap(&mut self) -> Result<(), PassedError> {
        self.mapped = false;
        match &mut self.hardware {
            Some(hardware) => Ok(hardware.unmap()?),
            None => Ok(()),
        }
    }

    /// Takes the device, which stands still.
    pub fn take(&mut self) -> Option<Box<dyn Hardware>> {
        self.stands_still();
        self.hardware.take()
    }

    /// Gives the user the device, which stands still.
    pub fn put(&mut self, hardware: Box<dyn Hardware>) {
        self.stands_still();
        self.counters.turns += 1;
        self.hardware = Some(hardware);
    }

    /// The device, wherever it is, does nothing, and what it reaches need not be this user's.
    fn stands_still(&mut self) {
        (self.runs, self.masters, self.mapped) = (false, false, false);
        self.interrupts.forget();
    }

    /// Takes from the device, which stands still, what another user left in it.
    ///
    /// # Errors
    /// It is not here, cannot be reset, or keeps memory.
    pub fn begin_anew(&mut self) -> Result<(), PassedError> {
        self.stands_still();
        let kind = self.kind.clone();
        kind.begin_anew(self.hardware()?.as_mut())
    }

    /// Gives the user's memory to the device, unless it has it.
    ///
    /// # Errors
    /// It keeps memory of somebody else, the limit of locked memory is in the way, or the host has
    /// not enough.
    pub fn map(&mut self) -> Result<(), PassedError> {
        let Some(hardware) = self.hardware.as_mut().filter(|_| !self.mapped) else {
            return Ok(());
        };
        hardware.unmap()?;
        if let Some(memory) = &self.memory {
            hardware.map(memory, None)?;
            self.mapped = true;
        }
        Ok(())
    }

    /// Lets the device do what its user lets it.
    ///
    /// # Errors
    /// It is not here, or the host refuses something.
    pub fn resume(&mut self) -> Result<(), PassedError> {
        (self.runs, self.known) = (true, true);
        self.try_to_follow()
    }

    /// Keeps the device from reading and writing memory and from interrupting, whatever state it is
    /// in, and takes it.
    pub fn silence(&mut self) -> Option<Box<dyn Hardware>> {
        let mut hardware = self.take()?;
        silence(hardware.as_mut());
        self.interrupts.set_level(false);
        Some(hardware)
    }

    /// The client has gone: the device reaches no memory any more, and does nothing until somebody
    /// takes it or the client is back.
    pub fn client_gone(&mut self) {
        // As its own reset would leave the command register; whoever comes back writes it anew.
        let without = self.side.config.command() - Command::BUS_MASTER;
        let bits = without.bits().to_le_bytes();
        self.side.config.set(offset::COMMAND, &bits);
        self.memory = None;
        self.stands_still();
        if let Some(hardware) = &mut self.hardware {
            silence(hardware.as_mut());
        }
        self.interrupts.set_level(false);
    }

    /// Regions of the user's memory have gone, and others have come: the device reaches what there
    /// is now, and nothing else. Gives the memory that there is.
    ///
    /// # Errors
    /// It cannot be mapped: the device does nothing then until its driver has it begin anew, and
    /// what has gone is forgotten all the same.
    pub fn memory_changed(
        &mut self,
        removed: &[DmaRegion],
        added: &[DmaRegion],
    ) -> Result<Option<Arc<DmaMemory>>, PassedError> {
        let before = self.memory.take();
        let changed = match &before {
            Some(before) => before.changed(removed, added),
            None => DmaMemory::of_space(&self.dma),
        };
        let changed = changed.map(Arc::new).map_err(PassedError::from);
        // What stays does not depend on what comes.
        self.memory = match (&changed, &before) {
            (Ok(memory), _) => Some(memory.clone()),
            (Err(_), Some(before)) => before.changed(removed, &[]).ok().map(Arc::new),
            (Err(_), None) => None,
        };
        self.memory.take_if(|memory| memory.bytes() == 0);
        let same_pieces = matches!((&before, &self.memory), (Some(before), Some(memory))
            if before.piece_bytes() == memory.piece_bytes());
        let comes_only = removed.is_empty() && same_pieces && self.mapped;
        let followed = changed.and_then(|_| self.follow_memory(comes_only));
        if let Err(error) = followed {
            self.stands_still();
            if let Some(hardware) = &mut self.hardware {
                silence(hardware.as_mut());
            }
            self.interrupts.set_level(false);
            return Err(error);
        }
        Ok(self.memory.clone())
    }

    /// Has the device reach the memory that there is now, which is what there was and more if that
    /// is said.
    fn follow_memory(&mut self, comes_only: bool) -> Result<(), PassedError> {
        let Some(hardware) = &mut self.hardware else {
            return Ok(());
        };
        if let (true, Some(memory)) = (comes_only, &self.memory) {
            // It works meanwhile.
            hardware.map_more(memory, None, Batch::ALL)?;
            return Ok(());
        }
        (self.masters, self.mapped) = (false, false);
        hardware.set_master(false)?;
        hardware.unmap()?;
        match self.runs && self.memory.is_some() {
            true => self.try_to_follow(),
            false => Ok(()),
        }
    }

    /// Whether the user's kernel is to find nothing here.
    fn is_hidden(&self) -> bool {
        // Who has no memory yet is a machine that is being made, which looks what there will be.
        self.memory.is_some() && !self.known
    }
}

impl PciFunction for DrivenFunction {
    fn config_read(&mut self, at: u16, data: &mut [u8]) {
        if self.is_hidden() {
            data.fill(0xff);
            return;
        }
        if reaches(at, data.len(), offset::STATUS) {
            let mut status = [0xff; 2];
            if let Some(hardware) = &mut self.hardware {
                hardware.load_config(offset::STATUS, &mut status);
            }
            let pending = status != [0xff; 2] && status[0] & 1 << 3 != 0;
            self.side.config.set_interrupt_status(pending);
        }
        self.side.config.read(at, data);
    }

    fn config_write(&mut self, at: u16, data: &[u8]) {
        self.side.config_write(at, data);
        // Whoever comes back to a device that does nothing writes this last.
        if reaches(at, data.len(), offset::COMMAND) && self.has_device() {
            self.runs = true;
        }
        self.follow();
        self.side.trigger(self.interrupts.take_waiting());
    }

    fn decoded(&self) -> Vec<BarRange> {
        self.side.decoded()
    }

    fn bars(&self) -> Vec<BarSize> {
        self.side.config.bars()
    }

    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        let waiting = || self.interrupts.take_waiting();
        if self.side.msix_read(bar, offset, data, waiting) {
            return;
        }
        if self.kind.withholds(bar, offset, data.len()) {
            data.fill(0);
            return;
        }
        data.fill(0xff);
        let Some(hardware) = &mut self.hardware else {
            self.counters.parked_accesses += 1;
            return;
        };
        self.counters.accesses += 1;
        if let Err(error) = hardware.read(bar, offset, data) {
            tracing::debug!(%error, bar, offset, "a register of a passed-on device is not read");
            data.fill(0xff);
        }
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        if self.side.msix_write(bar, offset, data) {
            self.follow();
            self.side.trigger(self.interrupts.take_waiting());
            return;
        }
        if self.kind.withholds(bar, offset, data.len()) {
            return;
        }
        let Some(hardware) = &mut self.hardware else {
            self.counters.parked_accesses += 1;
            return;
        };
        self.counters.accesses += 1;
        if let Err(error) = hardware.write(bar, offset, data) {
            tracing::debug!(%error, bar, offset, "a register of a passed-on device is not written");
        }
    }

    fn reset(&mut self) {
        self.side.reset();
        self.interrupts.forget();
        // A kernel that begins anew finds the function if the device is there.
        self.known = self.has_device();
        let Some(hardware) = &mut self.hardware else {
            return;
        };
        silence(hardware.as_mut());
        if let Err(error) = self.begin_anew() {
            tracing::error!(%error, "the device is not reset");
            return;
        }
        self.runs = true;
        self.follow();
    }
}
