//! A function of the host that this process has got by VFIO: its regions, interrupts and DMA map.
//!
//! While this value is there nobody else may have the function, unless it is given back before; when
//! it goes the kernel ends DMA and resets the function, if it can.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError, RwLock};

use vfio_bindings::bindings::vfio as api;
use vmm_sys_util::eventfd::EventFd;

use super::address::PciAddress;
use super::binding::{DRIVER, Sysfs};
use super::dma::{Container, DmaMap, DmaMemory};
use super::error::VfioError;
use super::sys;
use crate::pci::areas::BarMemory;
use crate::pci::config::{BAR_COUNT, CONFIG_SPACE_BYTES, Command, offset};
use crate::pci::registers::RegisterAccess;
use crate::vfio_user::message::{Payload, RegionInfo};

/// Kinds of interrupts of a PCI function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum InterruptKind {
    /// The pin.
    Intx = api::VFIO_PCI_INTX_IRQ_INDEX,
    /// Messages of MSI-X.
    Msix = api::VFIO_PCI_MSIX_IRQ_INDEX,
    /// Something went wrong on the bus.
    Error = api::VFIO_PCI_ERR_IRQ_INDEX,
    /// The host wants the function back.
    Request = api::VFIO_PCI_REQ_IRQ_INDEX,
}

/// The region of configuration space; those before it are of base address registers.
pub const CONFIG_REGION: usize = api::VFIO_PCI_CONFIG_REGION_INDEX as usize;
const REGIONS: usize = CONFIG_REGION + 1;

/// Where a region of the function is in its descriptor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Region {
    /// Offset in the descriptor.
    pub offset: u64,
    /// Bytes; 0 if the function has no such region.
    pub bytes: u64,
    /// Some of it can be mapped.
    pub mappable: bool,
}

/// A function that this process has.
#[derive(Debug)]
struct Opened {
    file: File,
    _group: File,
}

/// See the module's text.
#[derive(Debug)]
pub struct VfioDevice {
    address: PciAddress,
    // Closed in this order: the device, then its group, then the container with its map.
    /// `None` once it was given back.
    open: RwLock<Option<Opened>>,
    container: Arc<dyn Container>,
    regions: [Region; REGIONS],
    can_reset: bool,
}

impl VfioDevice {
    /// Opens the function at `address`, which `vfio-pci` has.
    ///
    /// # Errors
    /// It cannot be had; the error says why.
    pub fn open(address: PciAddress) -> Result<Self, VfioError> {
        let sysfs = Sysfs::default();
        let driver = sysfs.driver(address)?;
        let group_number = sysfs.group(address)?;
        if driver.as_deref() != Some(DRIVER) {
            let driver = driver.map_or("no driver".into(), |name| format!("the driver {name}"));
            return Err(VfioError::WrongDriver { address, driver });
        }
        let container = open_container()?;
        let group = open_group(address, group_number)?;
        let flags = sys::group_flags(&group).map_err(VfioError::host("look at an IOMMU group"))?;
        if flags & api::VFIO_GROUP_FLAGS_VIABLE == 0 {
            let others = sysfs.others_of_group(group_number, address);
            return Err(VfioError::not_viable(address, group_number, &others));
        }
        sys::set_container(&group, &container)
            .map_err(VfioError::host("put an IOMMU group into a container"))?;
        sys::set_iommu(&container, api::VFIO_TYPE1v2_IOMMU)
            .map_err(VfioError::host("use the IOMMU"))?;
        let file = sys::open_device(&group, &address.to_string())
            .map_err(VfioError::host("open the device"))?;
        let info = sys::device_info(&file).map_err(VfioError::host("look at the device"))?;
        if info.flags & api::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(VfioError::Unfit(address, "it is no PCI function"));
        }
        let mut regions = [Region::default(); REGIONS];
        for (index, region) in (0..info.num_regions).zip(&mut regions) {
            let info = sys::region_info(&file, index)
                .map_err(VfioError::host("look at the device's regions"))?;
            *region = Region {
                offset: info.offset,
                bytes: info.size,
                mappable: info.flags & api::VFIO_REGION_INFO_FLAG_MMAP != 0,
            };
        }
        Ok(Self {
            address,
            open: RwLock::new(Some(Opened {
                file,
                _group: group,
            })),
            container: Arc::new(container),
            regions,
            can_reset: info.flags & api::VFIO_DEVICE_FLAGS_RESET != 0,
        })
    }

    /// One without regions, whose host refuses whatever it is asked.
    #[cfg(test)]
    pub(super) fn refuses() -> Self {
        Self::refuses_but(Arc::new(File::open("/dev/null").unwrap()))
    }

    /// The same, with this to put memory into the map of.
    #[cfg(test)]
    pub(super) fn refuses_but(container: Arc<dyn Container>) -> Self {
        let nothing = || File::open("/dev/null").unwrap();
        Self {
            address: "0000:00:02.0".parse().unwrap(),
            open: RwLock::new(Some(Opened {
                file: nothing(),
                _group: nothing(),
            })),
            container,
            regions: [Region::default(); REGIONS],
            can_reset: false,
        }
    }

    /// Where it is on the host.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// Gives the function back to the host: whatever is asked of it from now on fails. Nothing of it
    /// is mapped any more, and what was put into the IOMMU's map has been taken out.
    pub fn give_back(&self) {
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Asks something of its descriptor.
    ///
    /// # Errors
    /// It was given back, or the host refuses.
    fn ask<T>(&self, act: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        match &*open {
            Some(open) => act(&open.file),
            None => Err(io::Error::from_raw_os_error(libc::ENODEV)),
        }
    }

    /// Base address register `index`, or [`CONFIG_REGION`].
    pub fn region(&self, index: usize) -> Region {
        self.regions.get(index).copied().unwrap_or_default()
    }

    /// The parts of a region that can be mapped.
    pub(super) fn mappable(&self, index: usize) -> Vec<Range<u64>> {
        let region = self.region(index);
        if !region.mappable {
            return Vec::new();
        }
        let told = self.ask(|file| sys::region_with_capabilities(file, index as u32));
        let told = told.map_err(|error| error.to_string());
        // The protocol's message is this very structure.
        let parts = told.and_then(|bytes| {
            let info = RegionInfo::parse(&bytes).and_then(|info| info.mappable());
            info.map_err(|error| error.to_string())
        });
        parts.unwrap_or_else(|error| {
            tracing::warn!(error, index, device = %self.address, "registers are not mapped");
            Vec::new()
        })
    }

    /// Maps a part of a region that can be mapped.
    ///
    /// # Errors
    /// The kernel does not.
    pub(super) fn map_part(&self, index: usize, part: &Range<u64>) -> io::Result<BarMemory> {
        let bytes = part.end.saturating_sub(part.start);
        let len = usize::try_from(bytes).map_err(|_| ErrorKind::InvalidInput)?;
        let at = self.place(index, part.start, len)?;
        self.ask(|file| BarMemory::of_device(file, at, len))
    }

    /// Reads a region.
    ///
    /// # Errors
    /// That is outside of it, or the function does not answer.
    pub fn read(&self, region: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = self.place(region, offset, data.len())?;
        self.ask(|file| file.read_exact_at(data, at))
    }

    /// Writes a region.
    ///
    /// # Errors
    /// That is outside of it, or the function does not answer.
    pub fn write(&self, region: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = self.place(region, offset, data.len())?;
        self.ask(|file| file.write_all_at(data, at))
    }

    fn place(&self, region: usize, offset: u64, len: usize) -> io::Result<u64> {
        let region = self.region(region);
        let end = offset.checked_add(len as u64);
        match end {
            Some(end) if end <= region.bytes => region
                .offset
                .checked_add(offset)
                .ok_or(ErrorKind::InvalidInput.into()),
            _ => Err(ErrorKind::InvalidInput.into()),
        }
    }

    /// Its configuration space, and the bytes of each of its base address registers.
    ///
    /// # Errors
    /// It does not answer.
    pub fn space(&self) -> Result<([u8; CONFIG_SPACE_BYTES], [u64; BAR_COUNT]), VfioError> {
        let mut bytes = [0; CONFIG_SPACE_BYTES];
        self.read(CONFIG_REGION, 0, &mut bytes)
            .map_err(VfioError::host("read the device's configuration space"))?;
        let mut bars = [0; BAR_COUNT];
        for (index, bar) in bars.iter_mut().enumerate() {
            *bar = self.region(index).bytes;
        }
        Ok((bytes, bars))
    }

    /// Writes its command register: it decodes its registers, and masters the bus or not.
    ///
    /// # Errors
    /// The host does not.
    pub fn set_master(&self, masters: bool) -> Result<(), VfioError> {
        let mut command = Command::IO_SPACE | Command::MEMORY_SPACE;
        command.set(Command::BUS_MASTER, masters);
        let bytes = command.bits().to_le_bytes();
        self.write(CONFIG_REGION, offset::COMMAND.into(), &bytes)
            .map_err(VfioError::host("write the device's command register"))
    }

    /// How many interrupts of a kind it has.
    pub fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        self.ask(|file| sys::irq_count(file, kind as u32))
            .unwrap_or(0)
    }

    /// Has the function's interrupts of a kind, from `start` on, write `events`.
    ///
    /// # Errors
    /// It has no such interrupts, or the host has no more.
    pub fn set_interrupts(
        &self,
        kind: InterruptKind,
        start: u32,
        events: &[&EventFd],
    ) -> io::Result<()> {
        let flags = api::VFIO_IRQ_SET_DATA_EVENTFD | api::VFIO_IRQ_SET_ACTION_TRIGGER;
        let descriptors: Vec<i32> = events.iter().map(|event| event.as_raw_fd()).collect();
        self.ask(|file| sys::set_irqs(file, kind as u32, flags, start, &descriptors))
    }

    /// Has the pin, which keeps quiet once it has interrupted, interrupt again when `event` is
    /// written.
    ///
    /// # Errors
    /// The pin is not in use.
    pub fn unmask_by(&self, event: &EventFd) -> io::Result<()> {
        let flags = api::VFIO_IRQ_SET_DATA_EVENTFD | api::VFIO_IRQ_SET_ACTION_UNMASK;
        let intx = InterruptKind::Intx as u32;
        self.ask(|file| sys::set_irqs(file, intx, flags, 0, &[event.as_raw_fd()]))
    }

    /// Has no interrupts of a kind.
    ///
    /// # Errors
    /// The host says so.
    pub fn end_interrupts(&self, kind: InterruptKind) -> io::Result<()> {
        let flags = api::VFIO_IRQ_SET_DATA_NONE | api::VFIO_IRQ_SET_ACTION_TRIGGER;
        self.ask(|file| sys::set_irqs(file, kind as u32, flags, 0, &[]))
    }

    /// Whether the host can reset it.
    pub fn can_reset(&self) -> bool {
        self.can_reset
    }

    /// Resets it.
    ///
    /// # Errors
    /// The host cannot.
    pub fn reset(&self) -> io::Result<()> {
        self.ask(sys::reset)
    }

    /// A map of what it reaches, in which there is nothing yet.
    pub fn map(&self) -> DmaMap {
        DmaMap::for_parts(self.container.clone())
    }

    /// A map for pieces of `memory`, in which there are none yet.
    pub(super) fn map_for_pieces(&self, memory: &DmaMemory) -> DmaMap {
        DmaMap::for_pieces(self.container.clone(), memory)
    }
}

fn open(path: &str) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

fn open_container() -> Result<File, VfioError> {
    let path = "/dev/vfio/vfio";
    let container = open(path).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => VfioError::Rights(path.into()),
        _ => VfioError::NoVfio(error),
    })?;
    let version = sys::api_version(&container).map_err(VfioError::NoVfio)?;
    let known = u32::try_from(version).is_ok_and(|version| version == api::VFIO_API_VERSION);
    if !known || !sys::has_iommu(&container, api::VFIO_TYPE1v2_IOMMU) {
        return Err(VfioError::NoType1);
    }
    Ok(container)
}

fn open_group(address: PciAddress, number: u32) -> Result<File, VfioError> {
    let path = format!("/dev/vfio/{number}");
    open(&path).map_err(|source| match source.kind() {
        ErrorKind::ResourceBusy => VfioError::Busy(address, number),
        ErrorKind::PermissionDenied => VfioError::Rights(path),
        _ => VfioError::Host {
            what: "open the IOMMU group's file in /dev/vfio",
            source,
        },
    })
}

/// The registers behind a base address register, for whoever reads them by a description
/// ([`crate::pci::registers`]).
pub struct VfioRegisters<'a> {
    device: &'a VfioDevice,
    bar: usize,
}

impl<'a> VfioRegisters<'a> {
    /// Those of base address register `bar`.
    pub fn new(device: &'a VfioDevice, bar: u8) -> Self {
        Self {
            device,
            bar: bar.into(),
        }
    }
}

impl RegisterAccess for VfioRegisters<'_> {
    fn load(&mut self, offset: u32) -> u32 {
        let mut data = [0; 4];
        let read = self.device.read(self.bar, offset.into(), &mut data);
        read.map_or(u32::MAX, |()| u32::from_le_bytes(data))
    }

    fn store(&mut self, offset: u32, value: u32) {
        let bytes = value.to_le_bytes();
        if let Err(error) = self.device.write(self.bar, offset.into(), &bytes) {
            // Whoever stores by a description looks whether it arrived.
            tracing::debug!(%error, offset, "a register of a passed-on device is not written");
        }
    }

    fn load_config(&mut self, offset: u16, data: &mut [u8]) {
        if self
            .device
            .read(CONFIG_REGION, offset.into(), data)
            .is_err()
        {
            data.fill(0xff);
        }
    }

    fn store_config(&mut self, offset: u16, data: &[u8]) {
        if let Err(error) = self.device.write(CONFIG_REGION, offset.into(), data) {
            tracing::debug!(%error, offset, "configuration of a passed-on device is not written");
        }
    }
}
