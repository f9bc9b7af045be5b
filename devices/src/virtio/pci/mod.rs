//! Virtio over PCI (section 4.1): one function with one memory register.
//!
//! ```text
//!   BAR 0   0x0000  common configuration     0x3000  notifications, 4 bytes a queue
//!           0x1000  ISR status               0x4000  MSI-X vector table
//!           0x2000  device configuration     0x5000  MSI-X pending bits
//! ```
//!
//! Lock order: the function's own lock, then what its device takes (a wire's). The function is
//! called by vCPU threads and by the event loop, always under its lock.

mod common;
mod state;
#[cfg(test)]
mod tests;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::common::{Action, COMMON_BYTES, Common, DeviceStatus, Surroundings};
use super::queues::{NO_VECTOR, Virtqueue};
use super::{DeviceError, Queues, VirtioDevice};
use crate::dma::DmaSpace;
use crate::irq::{IrqLine, MsiVectors};
use crate::pci::config::{Command, ConfigError, ConfigSpace, InterruptPin, PciIdentity};
use crate::pci::msix::{Msix, MsixLayout};
use crate::pci::{BarIndex, BarRange, BarSize, BarSpace, PciFunction};
use crate::rate_limit::RateLimit;
use crate::state::{Part, StateError};

const VENDOR_ID: u16 = 0x1af4;
/// Device ID of a modern device is this plus the virtio device ID (section 4.1.2).
const DEVICE_ID_BASE: u16 = 0x1040;
const VENDOR_CAPABILITY_ID: u8 = 0x09;

const BAR: BarIndex = 0;
const BAR_BYTES: u64 = 0x8000;
const PAGE_BYTES: u64 = 0x1000;
const COMMON_OFFSET: u64 = 0x0000;
const ISR_OFFSET: u64 = 0x1000;
const DEVICE_OFFSET: u64 = 0x2000;
const NOTIFY_OFFSET: u64 = 0x3000;
const MSIX_LAYOUT: MsixLayout = MsixLayout {
    bar: BAR,
    table_offset: 0x4000,
    pba_bar: BAR,
    pba_offset: 0x5000,
};
const NOTIFY_OFF_MULTIPLIER: u32 = 4;

/// Configuration structure types (section 4.1.4).
const CAP_COMMON_CFG: u8 = 1;
const CAP_NOTIFY_CFG: u8 = 2;
const CAP_ISR_CFG: u8 = 3;
const CAP_DEVICE_CFG: u8 = 4;
const CAP_PCI_CFG: u8 = 5;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Why a function could not be made or restored.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// Configuration space.
    #[error("virtio: {0}")]
    Config(#[from] ConfigError),
    /// A queue's size, or a stored queue.
    #[error("virtio queue: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// No descriptor to be had.
    #[error("virtio: cannot make an eventfd (raise the limit of open files?): {0}")]
    EventFd(#[source] std::io::Error),
    /// More vectors than the table has room for.
    #[error("virtio: a function has room for at most {limit} MSI-X vectors")]
    Vectors {
        /// How many there is room for.
        limit: u64,
    },
}

/// A virtio device as a PCI function.
pub struct VirtioPciFunction<D> {
    device: D,
    dma: DmaSpace,
    intx: Arc<dyn IrqLine>,
    config: ConfigSpace,
    /// Offset of the capability for access through configuration space.
    pci_cfg: u16,
    msix: Msix,
    common: Common,
    queues: Vec<Virtqueue>,
    /// Signalled to go on with queues that were left for later.
    resume: EventFd,
    log: RateLimit,
}

impl<D: VirtioDevice> VirtioPciFunction<D> {
    /// Presents `device`. It uses `msi` (best one vector more than it has queues), or `intx` while
    /// the driver has not enabled MSI-X.
    pub fn new(
        device: D,
        dma: DmaSpace,
        intx: Arc<dyn IrqLine>,
        msi: Arc<dyn MsiVectors>,
    ) -> Result<Self, VirtioError> {
        let limit = PAGE_BYTES / 16;
        if u64::from(msi.count()) > limit {
            return Err(VirtioError::Vectors { limit });
        }
        let kind = device.kind();
        let mut config = ConfigSpace::new(PciIdentity {
            vendor_id: VENDOR_ID,
            device_id: DEVICE_ID_BASE + kind.id,
            revision_id: 1,
            class_code: kind.pci_class,
            subsystem_vendor_id: VENDOR_ID,
            subsystem_id: DEVICE_ID_BASE + kind.id,
        });
        config.add_bar(BAR, BarSpace::Memory32, BAR_BYTES)?;
        config.set_interrupt_pin(InterruptPin::A);
        let page = PAGE_BYTES as u32;
        add_structure(
            &mut config,
            CAP_COMMON_CFG,
            COMMON_OFFSET as u32,
            COMMON_BYTES as u32,
        )?;
        add_structure(&mut config, CAP_ISR_CFG, ISR_OFFSET as u32, 1)?;
        add_structure(&mut config, CAP_DEVICE_CFG, DEVICE_OFFSET as u32, page)?;
        let mut notify = structure(CAP_NOTIFY_CFG, NOTIFY_OFFSET as u32, page, 20).to_vec();
        notify.extend(NOTIFY_OFF_MULTIPLIER.to_le_bytes());
        config.add_capability(VENDOR_CAPABILITY_ID, &notify, &[])?;
        let mut window = structure(CAP_PCI_CFG, 0, 0, 20).to_vec();
        window.extend([0; 4]);
        // The driver chooses register, offset and length, and reads and writes the data.
        let mut writable = [0; 18];
        writable[2] = 0xff;
        writable[6..].fill(0xff);
        let pci_cfg = config.add_capability(VENDOR_CAPABILITY_ID, &window, &writable)?;
        let msix = Msix::new(msi, MSIX_LAYOUT, &mut config)?;
        let queues = device
            .queue_sizes()
            .into_iter()
            .map(Virtqueue::new)
            .collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            dma,
            intx,
            config,
            pci_cfg,
            msix,
            common: Common::default(),
            queues,
            resume: EventFd::new(EFD_NONBLOCK).map_err(VirtioError::EventFd)?,
            log: RateLimit::default(),
        })
    }

    /// The device behind the transport.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The same, to be changed by the host while nobody uses it.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    fn offered_features(&self) -> u64 {
        self.device.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn reset_device(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(Virtqueue::reset);
        self.common.reset();
        self.update_intx();
    }

    /// Whether there is a working driver, and the function may reach its rings: that is DMA.
    fn may_use_queues(&self) -> bool {
        let status = self.common.status();
        let stopped = DeviceStatus::DEVICE_NEEDS_RESET | DeviceStatus::FAILED;
        status.contains(DeviceStatus::DRIVER_OK)
            && !status.intersects(stopped)
            && self.config.command().contains(Command::BUS_MASTER)
    }

    /// Lets the device work on its queues, then tells the driver what it has to know.
    pub(crate) fn with_queues(
        &mut self,
        work: impl FnOnce(&mut D, &mut Queues<'_>) -> Result<(), DeviceError>,
    ) {
        let active = self.may_use_queues();
        let memory = self.dma.memory();
        let mut queues = Queues::new(&memory, &mut self.queues, active);
        let result = work(&mut self.device, &mut queues);
        let (again, config_changed) = (queues.again, queues.config_changed);
        if again && let Err(error) = self.resume.write(1) {
            tracing::error!(%error, "virtio: cannot signal the event loop");
        }
        let mut vectors = Vec::new();
        let mut error = result.err();
        for (index, virtqueue) in self.queues.iter_mut().enumerate() {
            match virtqueue.take_interrupt(&memory) {
                Ok(true) => vectors.push(virtqueue.vector),
                Ok(false) => {}
                Err(source) => {
                    let queue = index as u16;
                    error.get_or_insert(super::QueueError::Ring { queue, source }.into());
                }
            }
        }
        for vector in vectors {
            self.interrupt(vector, ISR_QUEUE);
        }
        if let Some(error) = error {
            self.fail(&error);
        } else if config_changed {
            self.signal_config_change();
        }
    }

    /// Stands still until the driver resets the device.
    fn fail(&mut self, error: &DeviceError) {
        if let Some(held_back) = self.log.permit() {
            let device = self.device.kind().name;
            tracing::warn!(
                device,
                held_back,
                "virtio device needs a reset by its driver: {error}"
            );
        }
        self.common.add_status(DeviceStatus::DEVICE_NEEDS_RESET);
        if self.common.status().contains(DeviceStatus::DRIVER_OK) {
            self.signal_config_change();
        }
    }

    fn signal_config_change(&mut self) {
        self.common.config_generation = self.common.config_generation.wrapping_add(1);
        self.interrupt(self.common.config_vector, ISR_CONFIG);
    }

    fn interrupt(&mut self, vector: u16, isr: u8) {
        if self.msix.enabled() {
            if vector != NO_VECTOR {
                self.msix.trigger(vector);
            }
        } else {
            self.common.isr |= isr;
            self.update_intx();
        }
    }

    fn update_intx(&mut self) {
        let pending = self.common.isr != 0 && !self.msix.enabled();
        self.config.set_interrupt_status(pending);
        let disabled = self.config.command().contains(Command::INTERRUPT_DISABLE);
        self.intx.set_level(pending && !disabled);
    }

    fn write_common(&mut self, offset: usize, data: &[u8]) {
        let mut around = Surroundings {
            offered_features: self.offered_features(),
            queues: &mut self.queues,
            vectors: self.msix.count(),
        };
        match self.common.write(offset, data, &mut around) {
            Action::None => {}
            Action::Reset => self.reset_device(),
            Action::Enable(queue) => self.enable(queue),
            Action::Activate => self.activate(),
        }
    }

    fn enable(&mut self, index: u16) {
        let Some(virtqueue) = self.queues.get_mut(usize::from(index)) else {
            return;
        };
        virtqueue.queue.set_ready(true);
        if !virtqueue.queue.is_valid(&*self.dma.memory()) {
            virtqueue.queue.set_ready(false);
            self.fail(&DeviceError::Request(
                "a queue does not lie in guest memory",
            ));
        }
    }

    fn activate(&mut self) {
        let features = self.common.driver_features;
        for virtqueue in &mut self.queues {
            virtqueue
                .queue
                .set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        }
        self.with_queues(|device, queues| device.activate(features, queues));
        self.notify_all();
    }

    /// Lets the device look at each queue, as if the driver had notified about it.
    fn notify_all(&mut self) {
        for queue in 0..self.queues.len() as u16 {
            self.with_queues(|device, queues| device.notify(queue, queues));
        }
    }

    /// Where the window in configuration space points: register offset, and length if valid.
    fn window(&self) -> Option<(u64, usize)> {
        let bar = self.config.u32_at(self.pci_cfg + 4) as u8;
        let offset = self.config.u32_at(self.pci_cfg + 8);
        let length = self.config.u32_at(self.pci_cfg + 12);
        let valid = bar == BAR && matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length);
        valid.then_some((u64::from(offset), length as usize))
    }

    fn touches_window(&self, offset: u16, length: usize) -> bool {
        let data = self.pci_cfg + 16;
        offset < data + 4 && usize::from(offset) + length > usize::from(data)
    }
}

impl<D: VirtioDevice> PciFunction for VirtioPciFunction<D> {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if self.touches_window(offset, data.len())
            && let Some((at, length)) = self.window()
        {
            let mut value = [0; 4];
            self.bar_read(BAR, at, &mut value[..length]);
            self.config.set(self.pci_cfg + 16, &value);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        let could_use_queues = self.may_use_queues();
        self.config.write(offset, data);
        self.msix.config_written(&self.config);
        self.update_intx();
        if !could_use_queues && self.may_use_queues() {
            self.notify_all();
        }
        if self.touches_window(offset, data.len())
            && let Some((at, length)) = self.window()
        {
            let value = self.config.u32_at(self.pci_cfg + 16).to_le_bytes();
            self.bar_write(BAR, at, &value[..length]);
        }
    }

    fn decoded(&self) -> Vec<BarRange> {
        self.config.decoded()
    }

    fn bars(&self) -> Vec<BarSize> {
        self.config.bars()
    }

    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != BAR || self.msix.bar_read(bar, offset, data) {
            return;
        }
        let relative = offset % PAGE_BYTES;
        match offset - relative {
            COMMON_OFFSET => {
                let around = Surroundings {
                    offered_features: self.offered_features(),
                    queues: &mut self.queues,
                    vectors: self.msix.count(),
                };
                self.common.read(relative as usize, data, &around);
            }
            ISR_OFFSET if relative == 0 => {
                // Reading acknowledges (section 4.1.4.5).
                if let Some(first) = data.first_mut() {
                    *first = std::mem::take(&mut self.common.isr);
                }
                self.update_intx();
            }
            DEVICE_OFFSET => self.device.config_read(relative, data),
            _ => {}
        }
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        if bar != BAR || self.msix.bar_write(bar, offset, data) {
            return;
        }
        let relative = offset % PAGE_BYTES;
        match offset - relative {
            COMMON_OFFSET => self.write_common(relative as usize, data),
            NOTIFY_OFFSET => {
                let queue = relative / u64::from(NOTIFY_OFF_MULTIPLIER);
                if queue < self.queues.len() as u64 {
                    self.with_queues(|device, queues| device.notify(queue as u16, queues));
                }
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.config.reset();
        self.msix.reset(&self.config);
        self.reset_device();
    }

    fn save(&self) -> Result<Part, StateError> {
        self.save_part()
    }

    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        self.restore_part(state)
    }
}

impl<D: VirtioDevice> MutEventSubscriber for VirtioPciFunction<D> {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.resume.as_raw_fd() {
            // Only this drains it: there is something to read.
            let _ = self.resume.read();
            self.notify_all();
        } else {
            self.with_queues(|device, queues| device.event(events, ops, queues));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.resume, EventSet::IN)) {
            tracing::error!(%error, "virtio: cannot watch an eventfd: a busy queue may stall");
        }
        self.device.watch(ops);
    }
}

/// A vendor capability's content behind ID and next pointer (section 4.1.4).
fn structure(cfg_type: u8, offset: u32, length: u32, cap_len: u8) -> [u8; 14] {
    let mut body = [0; 14];
    body[0] = cap_len;
    body[1] = cfg_type;
    body[2] = BAR;
    body[6..10].copy_from_slice(&offset.to_le_bytes());
    body[10..14].copy_from_slice(&length.to_le_bytes());
    body
}

fn add_structure(
    config: &mut ConfigSpace,
    cfg_type: u8,
    offset: u32,
    length: u32,
) -> Result<(), ConfigError> {
    let body = structure(cfg_type, offset, length, 16);
    config.add_capability(VENDOR_CAPABILITY_ID, &body, &[])?;
    Ok(())
}
