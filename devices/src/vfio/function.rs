//! A function of the host as a guest's: what the guest configures, and what of it reaches the
//! function.
//!
//! ```text
//!   guest ─► configuration space (ours) ─► bus mastering ─────────► the function's command register
//!                                       └► which interrupts ──────► VFIO ─► KVM
//!         ─► base address registers ─► MSI-X table (ours); the rest is mapped into the guest as far as
//!                                       it can be, and read and written for it where an access exits
//! ```
//!
//! The function decodes its registers all the time, whatever the guest says: where they are in
//! guest memory only the guest's bus knows. It masters the host's bus only while the guest lets it,
//! and only with guest memory in the IOMMU's map, from which a reset takes it: memory is made anew
//! then.

use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::address::PciAddress;
use super::areas;
use super::device::{CONFIG_REGION, InterruptKind, VfioDevice};
use super::dma::{DmaMap, DmaMemory};
use super::error::VfioError;
use super::interrupts::{Interrupts, Mode, OutsideLine, PassedVectors};
use super::layout::{GuestView, HostView};
use super::notices::{Notice, Notices};
use super::side::{UserSide, reaches};
use crate::dma::DmaSpace;
use crate::irq::{IrqLine, MsiVectors};
use crate::pci::areas::BarArea;
use crate::pci::config::{Status, offset};
use crate::pci::msix::Msix;
use crate::pci::registers::{Description, DescriptionError};
use crate::pci::{BarIndex, BarRange, PciFunction};

/// What a passed-on function is given of the guest.
pub struct PassthroughParts<'a> {
    /// The memory that it reaches: all of it, at guest physical addresses.
    pub dma: DmaSpace,
    /// Its slot's pin INTA#.
    pub intx: Arc<dyn IrqLine>,
    /// Gives so many message-signalled vectors.
    pub vectors: &'a mut dyn FnMut(u16) -> Result<Arc<dyn MsiVectors>, String>,
}

/// Most failed calls in a row after which a driver is interrupted anew.
const MOST_TOLD_AGAIN: u8 = 4;

#[derive(Default)]
struct Refused {
    mode: Option<Mode>,
    mastering: bool,
}

/// See the module's text.
pub struct VfioFunction {
    // Dropped in this order: registers that the guest has, interrupts, then DMA, then the device.
    areas: Vec<Arc<BarArea>>,
    interrupts: Interrupts,
    map: Option<DmaMap>,
    device: Arc<VfioDevice>,
    dma: DmaSpace,
    side: UserSide,
    vectors: Option<Arc<PassedVectors>>,
    /// The function may master the bus.
    masters: bool,
    /// What the guest asked for last and did not get: it is not tried again before it asks for
    /// something else.
    refused: Refused,
    /// It is not to interrupt.
    withheld: bool,
    /// Failed calls in a row after which the driver was interrupted anew.
    told_again: u8,
    notices: Notices,
    /// It was given back to the host: what is left is a card that does not answer.
    gone: bool,
}

impl VfioFunction {
    /// The function at `address`, which `vfio-pci` has, for a guest.
    ///
    /// # Errors
    /// It cannot be had, or the guest's memory cannot be locked.
    pub fn open(address: PciAddress, parts: PassthroughParts<'_>) -> Result<Self, VfioError> {
        let device = Arc::new(VfioDevice::open(address)?);
        let (bytes, bars) = device.space()?;
        let bytes = &bytes;
        let GuestView {
            config,
            msix,
            pmcsr,
            has_pin,
        } = HostView { bytes, bars }.for_guest(address)?;
        let mut passed = None;
        let areas = areas::of(&device, &config.bars(), msix);
        let msix = match msix {
            Some(found) => {
                let guest = (parts.vectors)(found.vectors).map_err(VfioError::Interrupts)?;
                let vectors = Arc::new(PassedVectors::new(device.clone(), guest)?);
                passed = Some(vectors.clone());
                Some(Msix::at(vectors, found.layout, found.capability))
            }
            None => None,
        };
        let has_pin = has_pin && device.interrupt_count(InterruptKind::Intx) > 0;
        let line = match has_pin {
            true => Some(OutsideLine::new(parts.intx)?),
            false => None,
        };
        let mut function = Self {
            areas,
            interrupts: Interrupts::new(device.clone(), line, passed.clone()),
            map: None,
            device,
            dma: parts.dma,
            side: UserSide::new(config, msix, pmcsr, has_pin),
            vectors: passed,
            masters: false,
            refused: Refused::default(),
            withheld: false,
            told_again: 0,
            notices: Notices::new()?,
            gone: false,
        };
        function.set_command(false)?;
        // Now, where somebody reads why it cannot be.
        function.map_memory()?;
        function.notices.have_told(&function.device);
        Ok(function)
    }

    /// The function by itself.
    pub fn device(&self) -> &Arc<VfioDevice> {
        &self.device
    }

    /// The memory that it reaches.
    pub(super) fn dma(&self) -> &DmaSpace {
        &self.dma
    }

    /// The description of its registers, if there is one.
    ///
    /// # Errors
    /// One of the descriptions is wrong.
    pub fn description(&self) -> Result<Option<Description>, DescriptionError> {
        let id = |at| self.side.config.u16_at(at);
        Description::of_function(id(offset::VENDOR_ID), id(offset::DEVICE_ID))
    }

    /// Interrupts the guest by these vectors, as the function would.
    pub(super) fn interrupt(&mut self, vectors: Vec<u16>) {
        if self.side.mode() == Mode::Msix && !self.withheld && !self.gone {
            self.side.trigger(vectors);
        }
    }

    /// Keeps the function from interrupting until it is told otherwise. Then the guest is
    /// interrupted by each vector once, as it is not known which have come meanwhile; a pin is
    /// asserted still.
    pub(super) fn withhold(&mut self, withhold: bool) {
        if self.gone {
            return;
        }
        let ends = self.withheld && !withhold;
        self.withheld = withhold;
        self.follow();
        if ends {
            self.interrupt_by_all();
        }
    }

    /// A call of its driver has ended. One that failed may have been called for a message, which
    /// does not come again, and whose cause may have masked itself: the driver gets all of them
    /// once more. A driver that fails each time does not go on for ever.
    pub(super) fn after_call(&mut self, failed: bool) {
        if self.gone {
            return;
        }
        if !failed {
            self.told_again = 0;
        } else if self.told_again < MOST_TOLD_AGAIN {
            self.told_again += 1;
            self.interrupt_by_all();
        }
    }

    fn interrupt_by_all(&mut self) {
        let count = self.vectors.as_ref().map_or(0, |vectors| vectors.count());
        self.interrupt((0..count).collect());
    }

    /// Puts all memory into the map that is not there.
    fn map_memory(&mut self) -> Result<(), VfioError> {
        let all: u64 = self.dma.regions().iter().map(|region| region.len).sum();
        if self.map.as_ref().is_some_and(|map| map.bytes() == all) {
            return Ok(());
        }
        let memory = DmaMemory::of_space(&self.dma)?;
        // What somebody has written already is in small pages.
        memory.populate(|| true);
        let map = self.map.get_or_insert_with(|| self.device.map());
        if let Err(error) = map.add_all(&memory) {
            self.unmap_memory();
            return Err(error);
        }
        tracing::info!(
            device = %self.device.address(),
            mib = map.bytes() >> 20,
            took_us = map.took().as_micros() as u64,
            "guest memory is in the IOMMU's map"
        );
        Ok(())
    }

    /// Takes all memory out of the map. What the host leaves there is known, and taken out the next
    /// time.
    fn unmap_memory(&mut self) {
        let Some(map) = &mut self.map else { return };
        match map.unmap() {
            Ok(took) => {
                self.map = None;
                tracing::info!(
                    device = %self.device.address(),
                    took_us = took.as_micros() as u64,
                    "guest memory is out of the IOMMU's map"
                );
            }
            Err(error) => tracing::error!(%error, device = %self.device.address()),
        }
    }

    /// Writes the function's own command register.
    fn set_command(&mut self, masters: bool) -> Result<(), VfioError> {
        self.device.set_master(masters)?;
        self.masters = masters;
        Ok(())
    }

    /// Brings the function in line with what the guest configured.
    fn follow(&mut self) {
        let mode = match self.withheld {
            true => Mode::Off,
            false => self.side.mode(),
        };
        let address = self.device.address();
        if self.refused.mode != Some(mode) {
            self.refused.mode = None;
            if let Err(error) = self.interrupts.set(mode) {
                tracing::error!(%error, device = %address, ?mode, "the device has no interrupts");
                self.refused.mode = Some(mode);
            }
        }
        let masters = self.side.masters();
        self.refused.mastering &= masters;
        if masters == self.masters || self.refused.mastering {
            return;
        }
        let result = match masters {
            true => self.map_memory(),
            false => Ok(()),
        };
        if let Err(error) = result.and_then(|()| self.set_command(masters)) {
            tracing::error!(%error, device = %address, "the device does not reach guest memory");
            self.refused.mastering = masters;
        }
    }

    /// Finds what came for masked vectors: it is delivered or shown as pending.
    fn look_for_waiting(&mut self) {
        if let Some(vectors) = &self.vectors {
            self.side.trigger(vectors.take_waiting());
        }
    }

    /// Shows whether the pin would interrupt.
    fn show_interrupt_status(&mut self) {
        let mut status = [0; 2];
        let at = offset::STATUS.into();
        if self.device.read(CONFIG_REGION, at, &mut status).is_ok() {
            let status = Status::from_bits_retain(u16::from_le_bytes(status));
            self.side
                .config
                .set_interrupt_status(status.contains(Status::INTERRUPT_STATUS));
        }
    }

    /// Keeps the function from interrupting and from moving data until its driver configures it
    /// anew.
    pub(super) fn stop(&mut self) {
        if self.gone {
            return;
        }
        if let Err(error) = self.interrupts.set(Mode::Off) {
            tracing::error!(%error, device = %self.device.address(), "interrupts stay");
        }
        if let Err(error) = self.set_command(false) {
            tracing::error!(%error, device = %self.device.address(), "bus mastering stays");
        }
    }

    /// Gives the function back to the host, which waits for it. To the guest it is a card that was
    /// pulled out: loads give all ones, stores vanish, and nothing interrupts. Says whether the host
    /// has it: a part of its registers that is still mapped keeps it here.
    fn give_back(&mut self) -> bool {
        self.stop();
        self.unmap_memory();
        let mut mapped = Vec::new();
        for area in self.areas.drain(..) {
            area.withdraw();
            mapped.push(Arc::downgrade(area.memory()));
        }
        self.device.give_back();
        self.gone = true;
        mapped.iter().all(|memory| memory.strong_count() == 0)
    }
}

impl PciFunction for VfioFunction {
    fn config_read(&mut self, at: u16, data: &mut [u8]) {
        if self.gone {
            data.fill(0xff);
            return;
        }
        if reaches(at, data.len(), offset::STATUS) {
            self.show_interrupt_status();
        }
        self.side.config.read(at, data);
    }

    fn config_write(&mut self, at: u16, data: &[u8]) {
        if self.gone {
            return;
        }
        self.side.config_write(at, data);
        self.follow();
        self.look_for_waiting();
    }

    fn decoded(&self) -> Vec<BarRange> {
        self.side.decoded()
    }

    fn areas(&self) -> &[Arc<BarArea>] {
        &self.areas
    }

    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        if self.gone {
            data.fill(0xff);
            return;
        }
        let vectors = self.vectors.as_ref();
        let waiting = || vectors.map_or_else(Vec::new, |vectors| vectors.take_waiting());
        if self.side.msix_read(bar, offset, data, waiting) {
            return;
        }
        if let Err(error) = self.device.read(bar.into(), offset, data) {
            tracing::debug!(%error, bar, offset, "a register of a passed-on device is not read");
            data.fill(0xff);
        }
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        if self.gone {
            return;
        }
        if self.side.msix_write(bar, offset, data) {
            self.look_for_waiting();
            return;
        }
        if let Err(error) = self.device.write(bar.into(), offset, data) {
            tracing::debug!(%error, bar, offset, "a register of a passed-on device is not written");
        }
    }

    fn reset(&mut self) {
        if self.gone {
            self.side.reset();
            return;
        }
        self.stop();
        if self.device.can_reset()
            && let Err(error) = self.device.reset()
        {
            tracing::warn!(%error, device = %self.device.address(), "the device is not reset");
        }
        // The reset may have let it go.
        self.stop();
        self.unmap_memory();
        self.refused = Refused::default();
        self.withheld = false;
        self.told_again = 0;
        self.side.reset();
    }
}

impl MutEventSubscriber for VfioFunction {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let device = self.device.address();
        match self.notices.take(events.fd()) {
            Some(Notice::WantedBack) if !self.gone => match self.give_back() {
                true => tracing::warn!(
                    %device,
                    "the host took a device back that the guest had: it was removed, or is another driver's; to the guest \
                     it is a card that was pulled out"
                ),
                false => tracing::error!(
                    %device,
                    "the host wants a device back that the guest had, and does not get it: a part of its registers is \
                     still mapped, so the host waits until this process ends; to the guest it is a card that was pulled out"
                ),
            },
            Some(Notice::Failed) => {
                tracing::error!(%device, "a device that the guest has reports an error of its bus");
            }
            Some(Notice::WantedBack) | None => {}
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.notices.watch(ops);
    }
}

impl Drop for VfioFunction {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
