//! A bus: which device answers at which address. One for I/O ports, one for memory.
//!
//! Look-ups happen on every exit of every vCPU, changes when a guest moves a base address register.
//! No lock is held while a device is called, so a device may change the bus from inside an access.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// What answers accesses to a range of addresses.
///
/// Offset and length come from the guest; the bus guarantees only that the first byte is inside the
/// range and that the access does not reach over its end.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the start of the range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// As [`BusDevice`], for a device that needs exclusive access to itself: share it in a [`Mutex`].
pub trait MutBusDevice: Send {
    /// Reads `data.len()` bytes at `offset` from the start of the range.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` from the start of the range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

impl<T: MutBusDevice> BusDevice for Mutex<T> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data);
    }
}

/// Why a range cannot be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a bus range of {len:#x} at {start:#x} is empty or wraps around")]
pub struct BusError {
    start: u64,
    len: u64,
}

/// Names one mapping of a bus, to take it away again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappingId(u64);

struct Mapping {
    id: MappingId,
    start: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// The devices of one address space. Where ranges overlap, the one mapped first answers.
#[derive(Default)]
pub struct Bus {
    /// In order of insertion. A bus has some tens of ranges at most, which are found faster by
    /// looking through them than in a tree.
    mappings: RwLock<Vec<Mapping>>,
    next_id: AtomicU64,
}

impl Bus {
    /// A bus on which nothing answers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer for `len` addresses from `start`.
    pub fn map(
        &self,
        start: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<MappingId, BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|span| start.checked_add(span))
            .ok_or(BusError { start, len })?;
        let id = MappingId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let mut mappings = self
            .mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        mappings.push(Mapping {
            id,
            start,
            last,
            device,
        });
        Ok(id)
    }

    /// Takes a mapping away. An access that is under way on another thread may still reach the
    /// device.
    pub fn unmap(&self, id: MappingId) {
        let mut mappings = self
            .mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        mappings.retain(|mapping| mapping.id != id);
    }

    /// Whether a mapping answers for all of its range: none of those before it has a part of it.
    pub fn answers_alone(&self, id: MappingId) -> bool {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = mappings.iter().position(|mapping| mapping.id == id) else {
            return false;
        };
        let (before, own) = (&mappings[..place], &mappings[place]);
        let mut before = before.iter();
        before.all(|other| other.last < own.start || own.last < other.start)
    }

    /// Whether somebody answers for one of the `len` addresses from `start`.
    pub fn answers(&self, start: u64, len: u64) -> bool {
        let last = start.saturating_add(len.saturating_sub(1));
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let mut mappings = mappings.iter();
        mappings.any(|mapping| mapping.start <= last && start <= mapping.last)
    }

    /// Reads at `address`. What nobody answers for reads as all ones. Says whether anybody did.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((device, offset, room)) = self.find(address) else {
            return false;
        };
        let len = data.len().min(room);
        device.read(offset, &mut data[..len]);
        true
    }

    /// Writes at `address`. What nobody answers for is lost. Says whether anybody did.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((device, offset, room)) = self.find(address) else {
            return false;
        };
        device.write(offset, &data[..data.len().min(room)]);
        true
    }

    /// The device at `address`, the offset in its range, and the bytes from there to its end.
    fn find(&self, address: u64) -> Option<(Arc<dyn BusDevice>, u64, usize)> {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let found = mappings
            .iter()
            .find(|m| (m.start..=m.last).contains(&address))?;
        let room = usize::try_from(found.last - address)
            .unwrap_or(usize::MAX)
            .saturating_add(1);
        Some((found.device.clone(), address - found.start, room))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers writes; reads give the low byte of each byte's offset.
    #[derive(Default)]
    struct Recorder(Vec<(u64, Vec<u8>)>);

    impl MutBusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = offset as u8 + i as u8;
            }
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn nothing_reads_as_all_ones() {
        let mut data = [0; 4];
        assert!(!Bus::new().read(0x1000, &mut data));
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn access_over_the_end_of_a_range_is_cut() {
        let bus = Bus::new();
        let device = Arc::new(Mutex::new(Recorder::default()));
        bus.map(0x10, 4, device.clone()).unwrap();
        let mut data = [0; 4];
        assert!(bus.read(0x12, &mut data));
        assert_eq!(data, [2, 3, 0xff, 0xff]);
        assert!(bus.write(0x13, &[7, 8]));
        assert_eq!(device.lock().unwrap().0, [(3, vec![7])]);
        for (start, len, answers) in [
            (0xe, 2, false),
            (0xe, 3, true),
            (0x13, 4, true),
            (0x14, u64::MAX, false),
        ] {
            assert_eq!(bus.answers(start, len), answers, "{start:#x}, {len}");
        }
    }

    #[test]
    fn the_first_of_overlapping_ranges_answers_until_it_is_unmapped() {
        let bus = Bus::new();
        let (first, second) = (
            Arc::new(Mutex::new(Recorder::default())),
            Arc::new(Mutex::new(Recorder::default())),
        );
        let id = bus.map(0x20, 8, first.clone()).unwrap();
        bus.map(0x18, 16, second.clone()).unwrap();
        bus.write(0x20, &[1]);
        bus.unmap(id);
        bus.write(0x20, &[2]);
        assert_eq!(first.lock().unwrap().0, [(0, vec![1])]);
        assert_eq!(second.lock().unwrap().0, [(8, vec![2])]);
    }

    #[test]
    fn ranges_that_are_empty_or_wrap_are_refused() {
        let bus = Bus::new();
        let device = Arc::new(Mutex::new(Recorder::default()));
        assert!(bus.map(5, 0, device.clone()).is_err());
        assert!(bus.map(u64::MAX, 2, device.clone()).is_err());
        bus.map(u64::MAX, 1, device.clone()).unwrap();
        bus.map(0, u64::MAX, device).unwrap();
        assert!(bus.write(u64::MAX, &[1, 2]), "the last address is mapped");
    }
}
