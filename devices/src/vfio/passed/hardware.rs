//! The function that guests have by turns, as whoever has the turn reaches it.
//!
//! It is opened once and stays open: closing it resets it. It has at most one map of memory and one
//! user of its interrupts.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use vmm_sys_util::eventfd::EventFd;

use crate::dma::DmaRegion;
use crate::irq::LineEvents;
use crate::pci::BarIndex;
use crate::pci::config::{BAR_COUNT, CONFIG_SPACE_BYTES};
use crate::pci::registers::RegisterAccess;
use crate::vfio::address::PciAddress;
use crate::vfio::device::{InterruptKind, VfioDevice, VfioRegisters};
use crate::vfio::dma::{Batch, DmaMap, DmaMemory, Wanted};
use crate::vfio::error::VfioError;
use crate::vfio::notices::Notices;

/// Where the function's interrupts go.
#[derive(Debug)]
pub enum Interrupts {
    /// Nowhere.
    Off,
    /// The pin, to a line.
    Line(LineEvents),
    /// Each message, to its eventfd.
    Messages(Vec<EventFd>),
}

/// See the module.
pub trait Hardware: RegisterAccess + Send {
    /// Reads from a base address register.
    ///
    /// # Errors
    /// That is outside of it, or the function does not answer.
    fn read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes to a base address register.
    ///
    /// # Errors
    /// That is outside of it, or the function does not answer.
    fn write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Lets the function master the bus, or not.
    ///
    /// # Errors
    /// The host does not write its command register.
    fn set_master(&mut self, masters: bool) -> Result<(), VfioError>;
    /// Lets it reach `memory`, and no other: of it at least `near`, ranges of guest physical
    /// addresses, or all where that is not said.
    ///
    /// # Errors
    /// The host does not; it reaches nothing then, or what the host does not take away again.
    fn map(&mut self, memory: &DmaMemory, near: Option<&[Range<u64>]>) -> Result<(), VfioError>;
    /// Lets it reach more of `memory`, of which it reaches a part: `near`, or all, or as much as
    /// the batch says. Gives where the next batch begins, if there is more. It may run meanwhile.
    ///
    /// # Errors
    /// The host does not; it reaches a part still.
    fn map_more(
        &mut self,
        memory: &DmaMemory,
        near: Option<&[Range<u64>]>,
        batch: Batch,
    ) -> Result<Option<u64>, VfioError>;
    /// Takes what it reaches but `near` from it, as much as the batch says. Gives where the next
    /// batch begins, if there is more. It may run meanwhile.
    ///
    /// # Errors
    /// The host does not take it away; it may reach some of it still.
    fn unmap_far(&mut self, near: &[Range<u64>], batch: Batch) -> Result<Option<u64>, VfioError>;
    /// Lets it reach nothing.
    ///
    /// # Errors
    /// The host does not take it away.
    fn unmap(&mut self) -> Result<(), VfioError>;
    /// Bytes that it reaches.
    fn mapped_bytes(&self) -> u64;
    /// Has its interrupts go there, and nowhere else.
    ///
    /// # Errors
    /// The host refuses it. They go nowhere then, or, if it does not end them, where they went: the
    /// next call tries that again.
    fn set_interrupts(&mut self, to: Interrupts) -> io::Result<()>;
    /// Whether the host can reset it, and it alone.
    fn can_reset(&self) -> bool;
    /// Resets it as the host can, if it can.
    ///
    /// # Errors
    /// The host cannot.
    fn reset(&mut self) -> io::Result<()>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InUse {
    Nothing,
    Line,
    Messages(usize),
}

/// A function that this process has got by VFIO.
pub struct VfioHardware {
    // Dropped in this order.
    map: Option<DmaMap>,
    device: VfioDevice,
    /// With the registers.
    bar: u8,
    in_use: InUse,
}

impl VfioHardware {
    /// The function at `address`, which `vfio-pci` has. It does not master the bus.
    ///
    /// # Errors
    /// It cannot be had; the error says why.
    pub fn open(address: PciAddress) -> Result<Self, VfioError> {
        let mut hardware = Self {
            map: None,
            device: VfioDevice::open(address)?,
            bar: 0,
            in_use: InUse::Nothing,
        };
        hardware.set_master(false)?;
        Ok(hardware)
    }

    /// Has the host tell of the function there.
    pub(super) fn have_told(&self, notices: &Notices) {
        notices.have_told(&self.device);
    }

    /// Has the registers be behind this base address register.
    pub(super) fn set_bar(&mut self, bar: u8) {
        self.bar = bar;
    }

    /// Its configuration space, and the bytes of each of its base address registers.
    ///
    /// # Errors
    /// It does not answer.
    pub fn space(&self) -> Result<([u8; CONFIG_SPACE_BYTES], [u64; BAR_COUNT]), VfioError> {
        self.device.space()
    }

    /// Looks whether it can be given as much memory as every guest has: that needs an IOMMU that
    /// works, and a limit of locked memory.
    ///
    /// # Errors
    /// It cannot, and why.
    pub(super) fn try_memory(&mut self, bytes: u64) -> Result<(), VfioError> {
        let cannot = VfioError::host("make memory to try the device with");
        let file = memfd_create("trial", MemfdFlags::CLOEXEC).map_err(io::Error::from);
        let file = file.map(File::from).and_then(|file| {
            file.set_len(bytes)?;
            Ok(file)
        });
        let region = DmaRegion {
            address: 0,
            len: bytes,
            file: Arc::new(file.map_err(cannot)?),
            offset: 0,
        };
        self.map(&DmaMemory::new(&[region])?, None)?;
        self.unmap()
    }

    /// Has interrupts go there, where none are in use, or messages in the place of as many others.
    fn begin_interrupts(&mut self, to: &Interrupts) -> io::Result<()> {
        match to {
            Interrupts::Off => {}
            Interrupts::Line(line) => {
                let intx = InterruptKind::Intx;
                self.device.set_interrupts(intx, 0, &[&line.trigger])?;
                self.in_use = InUse::Line;
                self.device.unmask_by(&line.unmask)?;
            }
            Interrupts::Messages(events) => {
                let all: Vec<_> = events.iter().collect();
                self.device.set_interrupts(InterruptKind::Msix, 0, &all)?;
                self.in_use = InUse::Messages(events.len());
            }
        }
        Ok(())
    }

    /// Ends those that are in use. What could not be ended stays known.
    fn end_interrupts(&mut self) -> io::Result<()> {
        match self.in_use {
            InUse::Nothing => {}
            InUse::Line => self.device.end_interrupts(InterruptKind::Intx)?,
            InUse::Messages(_) => self.device.end_interrupts(InterruptKind::Msix)?,
        }
        self.in_use = InUse::Nothing;
        Ok(())
    }

    /// Whether it has a pin that the host can watch.
    pub fn has_pin(&self) -> bool {
        self.device.interrupt_count(InterruptKind::Intx) > 0
    }
}

impl RegisterAccess for VfioHardware {
    fn load(&mut self, offset: u32) -> u32 {
        VfioRegisters::new(&self.device, self.bar).load(offset)
    }

    fn store(&mut self, offset: u32, value: u32) {
        VfioRegisters::new(&self.device, self.bar).store(offset, value);
    }

    fn load_config(&mut self, offset: u16, data: &mut [u8]) {
        VfioRegisters::new(&self.device, self.bar).load_config(offset, data);
    }

    fn store_config(&mut self, offset: u16, data: &[u8]) {
        VfioRegisters::new(&self.device, self.bar).store_config(offset, data);
    }
}

impl Hardware for VfioHardware {
    fn read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.device.read(bar.into(), offset, data)
    }

    fn write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) -> io::Result<()> {
        self.device.write(bar.into(), offset, data)
    }

    fn set_master(&mut self, masters: bool) -> Result<(), VfioError> {
        self.device.set_master(masters)
    }

    fn map(&mut self, memory: &DmaMemory, near: Option<&[Range<u64>]>) -> Result<(), VfioError> {
        self.unmap()?;
        let map = self.map.insert(self.device.map_for_pieces(memory));
        let added = map.add(memory, &near.map_or(Wanted::All, Wanted::Near), Batch::ALL);
        if added.is_err() {
            // Some of it may be there. What is not taken out again is known to be.
            self.unmap()?;
        }
        added.map(drop)
    }

    fn map_more(
        &mut self,
        memory: &DmaMemory,
        near: Option<&[Range<u64>]>,
        batch: Batch,
    ) -> Result<Option<u64>, VfioError> {
        let device = &self.device;
        let map = self
            .map
            .get_or_insert_with(|| device.map_for_pieces(memory));
        map.add(memory, &near.map_or(Wanted::All, Wanted::Near), batch)
    }

    fn unmap_far(&mut self, near: &[Range<u64>], batch: Batch) -> Result<Option<u64>, VfioError> {
        match &mut self.map {
            Some(map) => map.keep(near, batch),
            None => Ok(None),
        }
    }

    fn unmap(&mut self) -> Result<(), VfioError> {
        if let Some(map) = &mut self.map {
            map.keep(&[], Batch::ALL)?;
        }
        self.map = None;
        Ok(())
    }

    fn mapped_bytes(&self) -> u64 {
        self.map.as_ref().map_or(0, DmaMap::bytes)
    }

    fn set_interrupts(&mut self, to: Interrupts) -> io::Result<()> {
        let keeps = match (&to, self.in_use) {
            // One user's eventfds take the place of the other's.
            (Interrupts::Messages(events), InUse::Messages(count)) => events.len() == count,
            _ => false,
        };
        if !keeps {
            self.end_interrupts()?;
        }
        let begun = self.begin_interrupts(&to);
        if begun.is_err() {
            // Rather nowhere than in part.
            self.end_interrupts()?;
        }
        begun
    }

    fn can_reset(&self) -> bool {
        self.device.can_reset()
    }

    fn reset(&mut self) -> io::Result<()> {
        match self.device.can_reset() {
            true => self.device.reset(),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfio::dma::tests::{Host, memory_of};

    /// What the device reaches is known, whatever the host does not do.
    #[test]
    fn memory_that_is_put_in_in_part_and_not_taken_out_again_is_known() {
        const PIECE: u64 = 2 << 20;
        let host = Arc::new(Host::default());
        let mut hardware = VfioHardware {
            map: None,
            device: VfioDevice::refuses_but(host.clone()),
            bar: 0,
            in_use: InUse::Nothing,
        };
        let (memory, other) = (memory_of(3 * PIECE), memory_of(2 * PIECE));
        host.takes(2);
        hardware.map(&memory, None).unwrap_err();
        assert_eq!((hardware.mapped_bytes(), host.reached()), (0, 0));
        host.takes(2);
        host.keeps(true);
        hardware.map(&memory, None).unwrap_err();
        for _ in 0..2 {
            hardware.unmap().unwrap_err();
            hardware.map(&other, None).unwrap_err();
            assert_eq!(hardware.mapped_bytes(), 2 * PIECE);
            assert_eq!(host.reached(), 2 * PIECE);
        }
        host.keeps(false);
        host.takes(usize::MAX);
        hardware.map(&other, None).unwrap();
        assert_eq!(host.reached(), 2 * PIECE);
        hardware.unmap().unwrap();
        assert_eq!((hardware.mapped_bytes(), host.reached()), (0, 0));
    }

    #[test]
    fn interrupts_that_could_not_be_ended_are_known_to_be_in_use() {
        let mut hardware = VfioHardware {
            map: None,
            device: VfioDevice::refuses(),
            bar: 0,
            in_use: InUse::Nothing,
        };
        let messages = |count| {
            let event = |_| EventFd::new(0).unwrap();
            Interrupts::Messages((0..count).map(event).collect())
        };
        hardware.set_interrupts(messages(2)).unwrap_err();
        assert_eq!(hardware.in_use, InUse::Nothing);
        hardware.set_interrupts(Interrupts::Off).unwrap();
        for in_use in [InUse::Line, InUse::Messages(2)] {
            hardware.in_use = in_use;
            for _ in 0..2 {
                hardware.set_interrupts(Interrupts::Off).unwrap_err();
                hardware.set_interrupts(messages(2)).unwrap_err();
                hardware.set_interrupts(messages(3)).unwrap_err();
                assert_eq!(hardware.in_use, in_use);
            }
        }
    }
}
