//! The function as one of its users sees it.
//!
//! Configuration space and the table of MSI-X are the user's own, and say what the function may do
//! while it is here: master the bus, and interrupt. Its registers are the function's, or the
//! image's.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::PassedError;
use super::hardware::Hardware;
use super::kind::Kind;
use super::user_interrupts::UserInterrupts;
use crate::dma::DmaSpace;
use crate::pci::config::offset;
use crate::pci::registers::RegisterCheckpoint;
use crate::pci::registers::parked::{Parked, ParkedLink, Shown, Survey};
use crate::pci::registers::switch::Running;
use crate::pci::{BarIndex, BarRange, BarSize, PciFunction};
use crate::state::{Part, StateError};
use crate::vfio::dma::{Batch, DmaMemory};
use crate::vfio::error::VfioError;
use crate::vfio::interrupts::Mode;
use crate::vfio::layout::GuestView;
use crate::vfio::side::{UserSide, reaches};
use crate::vfio_user::server::ClientInterrupts;

/// What was done with a function for one of its users.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Accesses to registers that went to the device.
    pub accesses: u64,
    /// Accesses that the image answered.
    pub parked_accesses: u64,
    /// Interrupts of the image.
    pub parked_interrupts: u64,
    /// Resets by the guest's driver, with the device.
    pub resets: u64,
    /// How often the user got the device.
    pub turns: u64,
    /// Frames that the device says to have lost in the user's turns, because it had no room for
    /// them. Its driver was told of those that it read itself, and of no others.
    #[serde(default)]
    pub missed: u64,
}

/// Stores to registers during a turn before each of which is looked at what the device reaches
/// then. Each has the rings read, while whoever switches waits.
pub(super) const MOST_TOLD_IN_PART: u32 = 1000;

/// How far the device that is here has come.
#[derive(Debug)]
pub(super) enum Stage {
    /// It runs.
    Running,
    /// It stands still.
    Still {
        /// How it ran, where it was made to stand still here.
        running: Option<Running>,
        /// Its user's state, once that is known.
        saved: Option<Box<(RegisterCheckpoint, Shown)>>,
        /// It has other registers than that state.
        foreign: bool,
    },
}

/// Who answers the driver.
pub(super) enum Seat {
    /// The device.
    Here {
        hardware: Box<dyn Hardware>,
        stage: Stage,
    },
    /// An image.
    Parked {
        image: Box<Parked>,
        shown: Box<Shown>,
    },
}

/// See the module.
pub struct PassedFunction {
    pub(super) kind: Arc<Kind>,
    /// With this user's address.
    pub(super) survey: Arc<Survey>,
    pub(super) address: [u8; 6],
    pub(super) link: ParkedLink,
    /// The image shows the link that there was.
    shows_link: bool,
    pub(super) seat: Option<Seat>,
    pub(super) dma: DmaSpace,
    /// The user's memory in this process.
    pub(super) memory: Option<Arc<DmaMemory>>,
    interrupts: UserInterrupts,
    pub(super) side: UserSide,
    /// The device reaches, or is about to reach, a part of that only: a switch is under way.
    pub(super) in_part: bool,
    /// Stores of the user in this turn while that was so.
    pub(super) told_in_part: u32,
    /// What the device reaches may be somebody else's memory, or some of this user's: the host may
    /// have failed to take it away.
    pub(super) reaches_other: bool,
    /// The function may master the bus.
    pub(super) masters: bool,
    /// Its user's state is being taken: it does not run, in whoever's turn.
    pub(super) held: bool,
    pub(super) counters: Counters,
}

impl PassedFunction {
    /// The function for a user whose NIC has the address `address`, parked. It reaches what `dma`
    /// reaches.
    ///
    /// # Errors
    /// There are no descriptors.
    pub fn new(
        kind: Arc<Kind>,
        address: [u8; 6],
        link: ParkedLink,
        dma: DmaSpace,
    ) -> Result<(Self, ClientInterrupts), PassedError> {
        let GuestView {
            config,
            msix,
            pmcsr,
            has_pin,
        } = kind.view()?;
        let (interrupts, msix) = UserInterrupts::new(msix).map_err(PassedError::Events)?;
        let client = interrupts.client();
        let mut function = Self {
            survey: Arc::new(kind.survey.clone().with_address(&kind.description, address)),
            kind,
            address,
            link,
            shows_link: false,
            seat: None,
            dma,
            memory: None,
            interrupts,
            side: UserSide::new(config, msix, pmcsr, has_pin),
            in_part: false,
            told_in_part: 0,
            reaches_other: false,
            masters: false,
            held: false,
            counters: Counters::default(),
        };
        function.begin_anew()?;
        Ok((function, client))
    }

    /// Parks the user with the state after a reset, and without a link: there was none that could
    /// stay.
    pub(super) fn begin_anew(&mut self) -> Result<(), PassedError> {
        let (fresh, shown) = (self.survey.fresh().clone(), self.survey.shown().clone());
        self.park(fresh, shown, ParkedLink::Down)
    }

    /// Has an image answer from now on, which has that state.
    pub(super) fn park(
        &mut self,
        saved: RegisterCheckpoint,
        shown: Shown,
        link: ParkedLink,
    ) -> Result<(), PassedError> {
        let description = self.kind.description.clone();
        let image = Parked::new(description, self.survey.clone(), saved, &shown, link)?;
        let image = Box::new(image);
        let shown = Box::new(shown);
        self.seat = Some(Seat::Parked { image, shown });
        self.shows_link = link == ParkedLink::Stays;
        self.interrupt_parked();
        Ok(())
    }

    /// What was done for its user.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes that the device reaches for this user.
    pub fn mapped_bytes(&self) -> u64 {
        match &self.seat {
            Some(Seat::Here { hardware, .. }) => hardware.mapped_bytes(),
            _ => 0,
        }
    }

    /// Whether a user without the device sees the link that it had.
    pub fn link_stays(&self) -> bool {
        self.shows_link && !self.has_device()
    }

    /// Whether the device is here.
    pub fn has_device(&self) -> bool {
        matches!(self.seat, Some(Seat::Here { .. }))
    }

    /// The user's link goes, which stayed until now.
    pub fn lose_link(&mut self) {
        if let Some(Seat::Parked { image, .. }) = &mut self.seat {
            image.lose_link();
            self.shows_link = false;
        }
        self.interrupt_parked();
    }

    /// The eventfds of the user's client are others.
    pub fn interrupts_changed(&mut self) {
        self.interrupts.forget();
        self.follow();
    }

    /// Has the function do what the user lets it, where it is here.
    fn follow(&mut self) {
        if !matches!(self.stage(), Some(Stage::Running)) {
            return;
        }
        if let Err(error) = self.direct_interrupts() {
            tracing::error!(%error, "the device has no interrupts");
        }
        if let Err(error) = self.follow_mastering() {
            tracing::error!(%error, "the device does not reach guest memory");
        }
    }

    pub(super) fn stage(&self) -> Option<&Stage> {
        match &self.seat {
            Some(Seat::Here { stage, .. }) => Some(stage),
            _ => None,
        }
    }

    pub(super) fn hardware(&mut self) -> Result<&mut Box<dyn Hardware>, PassedError> {
        match &mut self.seat {
            Some(Seat::Here { hardware, .. }) => Ok(hardware),
            _ => Err(PassedError::NotHere),
        }
    }

    /// Lets the function master the bus, or not, with the user's memory in its map.
    pub(super) fn follow_mastering(&mut self) -> Result<(), PassedError> {
        let masters = self.side.masters();
        if masters == self.masters {
            return Ok(());
        }
        if masters {
            self.map_memory(None)?;
        }
        self.hardware()?.set_master(masters)?;
        self.masters = masters;
        Ok(())
    }

    /// Puts the user's memory into the function's map, at least `near` where that is said, unless
    /// some is there.
    pub(super) fn map_memory(&mut self, near: Option<&[Range<u64>]>) -> Result<(), VfioError> {
        if let Some(Seat::Here { hardware, .. }) = &mut self.seat
            && self.reaches_other
        {
            hardware.unmap()?;
            self.reaches_other = false;
        }
        let Some(memory) = self.memory.clone() else {
            return Ok(());
        };
        match &mut self.seat {
            Some(Seat::Here { hardware, .. }) if hardware.mapped_bytes() == 0 => {
                // Were it to fail, some of it might be there.
                self.reaches_other = true;
                hardware.map(&memory, near)?;
                (self.reaches_other, self.in_part) = (false, near.is_some());
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The device, which has a part of the user's memory, is about to be told to do something by a
    /// store: gives it what it reaches with that. Descriptors are in their ring before it is told
    /// of them. A user who tells it much has all memory in the map, as without pieces.
    fn map_what_is_told(&mut self, offset: u64, stored: Option<u32>) {
        let description = self.kind.description.clone();
        let (Some(memory), Some(Seat::Here { hardware, .. })) = (&self.memory, &mut self.seat)
        else {
            return;
        };
        self.told_in_part += 1;
        let near = (self.told_in_part <= MOST_TOLD_IN_PART)
            .then(|| description.reached_after(hardware.as_mut(), &self.dma, (offset, stored)))
            .flatten();
        match hardware.map_more(memory, near.as_deref(), Batch::ALL) {
            Ok(_) => self.in_part = near.is_some(),
            Err(error) => {
                tracing::error!(%error, "the device does not reach what its driver gives it");
            }
        }
    }

    /// Has the function's interrupts go where the user wants them.
    pub(super) fn direct_interrupts(&mut self) -> Result<(), PassedError> {
        let mode = self.side.mode();
        let Some(Seat::Here { hardware, .. }) = &mut self.seat else {
            return Err(PassedError::NotHere);
        };
        if self.interrupts.direct(hardware.as_mut(), mode)? {
            self.look_for_waiting();
        }
        Ok(())
    }

    /// What interrupts the user is to be said anew: the device comes or goes.
    pub(super) fn forget_interrupts(&mut self) {
        self.interrupts.forget();
        self.interrupts.set_level(false);
    }

    /// Finds what came for masked vectors: it is delivered or shown as pending.
    pub(super) fn look_for_waiting(&mut self) {
        self.side.trigger(self.interrupts.take_waiting());
    }

    /// Interrupts the user for what the image has to say.
    fn interrupt_parked(&mut self) {
        let mode = self.side.mode();
        let Some(Seat::Parked { image, .. }) = &mut self.seat else {
            return;
        };
        match (mode, &mut self.side.msix) {
            (Mode::Msix, Some(msix)) => {
                let due = image.take_messages();
                for vector in (0..msix.count().min(32)).filter(|vector| due & 1 << vector != 0) {
                    msix.trigger(vector);
                    self.counters.parked_interrupts += 1;
                }
            }
            (Mode::Intx, _) => self.interrupts.set_level(image.interrupt_due()),
            _ => self.interrupts.set_level(false),
        }
    }

    /// The four bytes that an access to the device's registers stores or loads.
    fn word_of(&self, bar: BarIndex, data: &[u8]) -> Option<u32> {
        let bytes = <[u8; 4]>::try_from(data).ok()?;
        (bar == self.kind.description.device.bar).then(|| u32::from_le_bytes(bytes))
    }

    fn device_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        let stored = self.word_of(bar, data);
        if self.in_part {
            self.map_what_is_told(offset, stored);
        }
        let (description, address) = (self.kind.description.clone(), self.address);
        self.counters.accesses += 1;
        let Ok(hardware) = self.hardware() else {
            return;
        };
        if let Err(error) = hardware.write(bar, offset, data) {
            tracing::debug!(%error, bar, offset, "a register of a passed-on device is not written");
        }
        if stored.is_some_and(|value| description.resets(offset, value)) {
            if let Err(error) = description.after_reset(hardware.as_mut(), address) {
                tracing::warn!(%error, "after a reset by its driver");
            }
            self.counters.resets += 1;
        }
    }
}

impl PciFunction for PassedFunction {
    fn config_read(&mut self, at: u16, data: &mut [u8]) {
        if reaches(at, data.len(), offset::STATUS) {
            let pending = match &mut self.seat {
                Some(Seat::Here { hardware, .. }) => {
                    let mut bytes = [0; 2];
                    hardware.load_config(offset::STATUS, &mut bytes);
                    bytes != [0xff; 2] && bytes[0] & 1 << 3 != 0
                }
                Some(Seat::Parked { image, .. }) => image.interrupt_due(),
                None => false,
            };
            self.side.config.set_interrupt_status(pending);
        }
        self.side.config.read(at, data);
    }

    fn config_write(&mut self, at: u16, data: &[u8]) {
        self.side.config_write(at, data);
        // Whoever comes back to a device that was made to stand still writes this last.
        if reaches(at, data.len(), offset::COMMAND)
            && matches!(self.stage(), Some(Stage::Still { .. }))
            && let Err(error) = self.go_on()
        {
            tracing::error!(%error, "the device does not go on");
        }
        self.follow();
        self.look_for_waiting();
        self.interrupt_parked();
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
        if self.kind.description.withholds(bar, offset, data.len()) {
            data.fill(0);
            return;
        }
        data.fill(0xff);
        match &mut self.seat {
            Some(Seat::Here { hardware, .. }) => {
                self.counters.accesses += 1;
                if let Err(error) = hardware.read(bar, offset, data) {
                    tracing::debug!(%error, bar, offset, "a register of a passed-on device is not read");
                    data.fill(0xff);
                } else if let Some(value) = self.word_of(bar, data) {
                    self.counters.missed += self.kind.description.lost_in(offset, value);
                }
            }
            Some(Seat::Parked { image, .. }) => {
                self.counters.parked_accesses += 1;
                // Others, as flash memory, are the device's alone.
                if bar == self.kind.description.device.bar {
                    image.read(offset, data);
                    self.interrupt_parked();
                }
            }
            None => {}
        }
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        if self.side.msix_write(bar, offset, data) {
            self.follow();
            self.look_for_waiting();
            return;
        }
        if self.kind.description.withholds(bar, offset, data.len()) {
            return;
        }
        match &mut self.seat {
            Some(Seat::Here { .. }) => self.device_write(bar, offset, data),
            Some(Seat::Parked { image, .. }) => {
                self.counters.parked_accesses += 1;
                if bar == self.kind.description.device.bar {
                    image.write(offset, data);
                    self.interrupt_parked();
                }
            }
            None => {}
        }
    }

    fn save(&self) -> Result<Part, StateError> {
        self.saved_part()
    }

    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        self.take_over(state)
    }

    fn gives_state(&self) -> bool {
        true
    }

    fn begin_still(&mut self) -> Result<(), StateError> {
        self.hold()
    }

    fn end_still(&mut self) {
        self.let_go();
    }

    fn reset(&mut self) {
        self.held = false;
        self.side.reset();
        let result = match self.has_device() {
            true => self.reset_device(),
            false => self.begin_anew(),
        };
        if let Err(error) = result {
            tracing::error!(%error, "the device is not reset");
        }
    }
}
