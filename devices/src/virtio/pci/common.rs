//! The common configuration structure (section 4.1.4.3): registers by which the driver negotiates
//! features and sets queues up.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use crate::virtio::queues::{NO_VECTOR, Virtqueue};

/// Length of the structure without the fields of features that are not offered.
pub(super) const COMMON_BYTES: usize = 0x38;

bitflags::bitflags! {
    /// Device status field (section 2.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(super) struct DeviceStatus: u8 {
        const ACKNOWLEDGE = 1;
        const DRIVER = 2;
        const DRIVER_OK = 4;
        const FEATURES_OK = 8;
        const DEVICE_NEEDS_RESET = 64;
        const FAILED = 128;
    }
}

/// Registers that are not of one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Common {
    device_feature_select: u32,
    driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) config_vector: u16,
    status: u8,
    pub(super) config_generation: u8,
    queue_select: u16,
    /// ISR status (section 4.1.4.5): bit 0 a queue, bit 1 the configuration.
    pub(super) isr: u8,
}

impl Default for Common {
    fn default() -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            status: 0,
            config_generation: 0,
            queue_select: 0,
            isr: 0,
        }
    }
}

/// What a write asks of the function beyond the registers themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    None,
    Reset,
    /// DRIVER_OK was set.
    Activate,
    /// This queue was enabled.
    Enable(u16),
}

/// What the registers refer to but do not hold.
pub(super) struct Surroundings<'a> {
    pub(super) offered_features: u64,
    pub(super) queues: &'a mut [Virtqueue],
    pub(super) vectors: u16,
}

impl Common {
    /// As after a device reset. The generation goes on, as it only ever tells of changes.
    pub(super) fn reset(&mut self) {
        *self = Self {
            config_generation: self.config_generation,
            ..Self::default()
        };
    }

    /// Whether a driver can have brought it here, of a function that offers these features and has
    /// so many vectors.
    pub(super) fn is_possible(&self, offered_features: u64, vectors: u16) -> bool {
        let status = self.status();
        let negotiated = self.driver_features & !offered_features == 0;
        (negotiated || !status.contains(DeviceStatus::FEATURES_OK))
            && (!status.contains(DeviceStatus::DRIVER_OK)
                || status.contains(DeviceStatus::FEATURES_OK))
            && (self.config_vector < vectors || self.config_vector == NO_VECTOR)
            && self.isr & !3 == 0
    }

    pub(super) fn status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.status)
    }

    pub(super) fn add_status(&mut self, status: DeviceStatus) {
        self.status |= status.bits();
    }

    /// Reads `data.len()` bytes at `offset`; what is behind the end is zero.
    pub(super) fn read(&self, offset: usize, data: &mut [u8], around: &Surroundings<'_>) {
        let mut all = [0; COMMON_BYTES];
        let mut put = |at: usize, bytes: &[u8]| all[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(
            0x04,
            &half(around.offered_features, self.device_feature_select).to_le_bytes(),
        );
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(
            0x0c,
            &half(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(0x10, &self.config_vector.to_le_bytes());
        put(0x12, &(around.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status, self.config_generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        // A queue that is not there has size 0 and is otherwise all zero.
        if let Some(virtqueue) = around.queues.get(usize::from(self.queue_select)) {
            let queue = &virtqueue.queue;
            put(0x18, &queue.size().to_le_bytes());
            put(0x1a, &virtqueue.vector.to_le_bytes());
            put(0x1c, &u16::from(queue.ready()).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.desc_table().to_le_bytes());
            put(0x28, &queue.avail_ring().to_le_bytes());
            put(0x30, &queue.used_ring().to_le_bytes());
        }
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = all.get(offset + n).copied().unwrap_or(0);
        }
    }

    /// Writes a register. Only accesses of a field's own width count (section 4.1.3.1), for 64-bit
    /// fields also those of a half.
    pub(super) fn write(
        &mut self,
        offset: usize,
        data: &[u8],
        around: &mut Surroundings<'_>,
    ) -> Action {
        let mut bytes = [0; 8];
        let Some(low) = bytes.get_mut(..data.len()) else {
            return Action::None;
        };
        low.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = value as u32,
            (0x08, 4) => self.driver_feature_select = value as u32,
            (0x0c, 4) => self.write_driver_features(value as u32),
            (0x10, 2) => self.config_vector = vector(value as u16, around.vectors),
            (0x14, 1) => return self.write_status(value as u8, around.offered_features),
            (0x16, 2) => self.queue_select = value as u16,
            _ => return self.write_queue(offset, data.len(), value, around),
        }
        Action::None
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.status().contains(DeviceStatus::FEATURES_OK) {
            return;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8, offered_features: u64) -> Action {
        if value == 0 {
            return Action::Reset;
        }
        let old = self.status();
        // The driver only ever adds bits, and none of those that the device sets.
        let mut new =
            (DeviceStatus::from_bits_truncate(value) - DeviceStatus::DEVICE_NEEDS_RESET) | old;
        if !old.contains(DeviceStatus::FEATURES_OK) && new.contains(DeviceStatus::FEATURES_OK) {
            let version_1 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
            if self.driver_features & !offered_features != 0
                || self.driver_features & version_1 == 0
            {
                new -= DeviceStatus::FEATURES_OK;
            }
        }
        if !new.contains(DeviceStatus::FEATURES_OK) {
            new -= DeviceStatus::DRIVER_OK;
        }
        self.status = new.bits();
        let activated = (new - old).contains(DeviceStatus::DRIVER_OK);
        if activated {
            Action::Activate
        } else {
            Action::None
        }
    }

    fn write_queue(
        &mut self,
        offset: usize,
        width: usize,
        value: u64,
        around: &mut Surroundings<'_>,
    ) -> Action {
        let Some(virtqueue) = around.queues.get_mut(usize::from(self.queue_select)) else {
            return Action::None;
        };
        if (offset, width) == (0x1a, 2) {
            virtqueue.vector = vector(value as u16, around.vectors);
            return Action::None;
        }
        let queue = &mut virtqueue.queue;
        if queue.ready() {
            return Action::None;
        }
        let (low, high) = match (width, offset % 8) {
            (8, 0) => (Some(value as u32), Some((value >> 32) as u32)),
            (4, 0) => (Some(value as u32), None),
            (4, 4) => (None, Some(value as u32)),
            _ => (None, None),
        };
        match (offset, width) {
            (0x18, 2) => {
                // A size that is no power of two or too large stays as it was.
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max_size() {
                    queue.set_size(size);
                }
            }
            (0x1c, 2) if value == 1 && self.status().contains(DeviceStatus::FEATURES_OK) => {
                return Action::Enable(self.queue_select);
            }
            (0x20..=0x27, 4 | 8) => queue.set_desc_table_address(low, high),
            (0x28..=0x2f, 4 | 8) => queue.set_avail_ring_address(low, high),
            (0x30..=0x37, 4 | 8) => queue.set_used_ring_address(low, high),
            _ => {}
        }
        Action::None
    }
}

/// 32 of 64 feature bits.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// A vector that does not exist reads back as none (section 4.1.5.1.2.1).
fn vector(value: u16, count: u16) -> u16 {
    if value < count { value } else { NO_VECTOR }
}
