//! Virtio block device (section 5.2) over a raw file.
//!
//! Requests are served when the driver notifies about them, on the vCPU thread that does, until the
//! turn is over ([`Queues::spend`]); the event loop goes on with what is left, turn by turn. One
//! request moves at most [`MAX_REQUEST_BYTES`] and is done to its end, so that no turn takes long:
//! a pause and the end of the machine wait for one turn at most.

mod disk;
#[cfg(test)]
mod tests;

use std::io::{Error, ErrorKind};

use event_manager::{EventOps, Events};

pub use self::disk::{Disk, DiskError, SECTOR_BYTES};
use super::{Chain, DeviceError, DeviceKind, Queues, VirtioDevice, read_structure};
use crate::rate_limit::RateLimit;
use crate::state::{Form, Part, StateError};

const F_SEG_MAX: u64 = 1 << 2;
const F_GEOMETRY: u64 = 1 << 4;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Request types (section 5.2.6).
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const FORM: Form = Form {
    kind: "virtio disk",
    version: 1,
};

const REQUEST_QUEUE: u16 = 0;
const QUEUE_SIZE: u16 = 128;
const HEADER_BYTES: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;
const RANGE_UNMAP: u32 = 1;
const ID_BYTES: usize = 20;
/// Most data of one read or write; also most that is zeroed at once.
const MAX_REQUEST_BYTES: u64 = 16 << 20;
const MAX_ZEROED_SECTORS: u32 = (MAX_REQUEST_BYTES / SECTOR_BYTES) as u32;
/// What a flush counts for in a turn: nobody knows how long it takes.
const FLUSH_BYTES: u64 = 2 << 20;
/// Copied at a time.
const SCRATCH_BYTES: usize = 128 * 1024;

/// Why a request did not succeed.
enum Failure {
    /// The ring is broken: no answer is possible.
    Queue(DeviceError),
    /// Not a request of this device.
    Unsupported,
    /// The host's fault, worth a log line.
    Io(Error),
    /// The driver's fault.
    Refused(&'static str),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Io(error)
    }
}

impl From<super::QueueError> for Failure {
    fn from(error: super::QueueError) -> Self {
        Self::Queue(error.into())
    }
}

/// A disk.
pub struct Block {
    disk: Disk,
    id: [u8; ID_BYTES],
    /// The driver asks for flushes; otherwise each write is made durable at once (section 5.2.6.2).
    driver_flushes: bool,
    scratch: Box<[u8]>,
    log: RateLimit,
}

impl Block {
    /// Presents `disk` under the serial number `id`, of which 20 bytes count.
    pub fn new(disk: Disk, id: &str) -> Self {
        let mut bytes = [0; ID_BYTES];
        for (to, from) in bytes.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self {
            disk,
            id: bytes,
            driver_flushes: false,
            scratch: vec![0; SCRATCH_BYTES].into_boxed_slice(),
            log: RateLimit::default(),
        }
    }

    fn serve(&mut self, chain: &Chain, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        let memory = queues.memory();
        // The last writable byte takes the status.
        let Some(data_bytes) = chain.writable_bytes().checked_sub(1) else {
            return Err(DeviceError::Request(
                "a block request has no room for its status",
            ));
        };
        let status = match self.execute(chain, data_bytes, queues) {
            Ok(()) => S_OK,
            Err(Failure::Queue(error)) => return Err(error),
            Err(Failure::Unsupported) => S_UNSUPP,
            Err(Failure::Io(error)) => {
                self.complain(&error);
                S_IOERR
            }
            Err(Failure::Refused(why)) => {
                self.complain(&why);
                S_IOERR
            }
        };
        chain.write(memory, data_bytes, &[status])?;
        queues.push(REQUEST_QUEUE, chain, data_bytes + 1)?;
        Ok(())
    }

    fn complain(&mut self, what: &dyn std::fmt::Display) {
        if let Some(held_back) = self.log.permit() {
            tracing::warn!(held_back, "virtio disk: a request failed: {what}");
        }
    }

    fn execute(
        &mut self,
        chain: &Chain,
        writable: usize,
        queues: &mut Queues<'_>,
    ) -> Result<(), Failure> {
        let memory = queues.memory();
        let mut header = [0; HEADER_BYTES];
        if chain.read(memory, 0, &mut header)? < HEADER_BYTES {
            return Err(Failure::Refused("its header is cut short"));
        }
        let (kind, sector) = header.split_at(8);
        let kind = u32::from_le_bytes([kind[0], kind[1], kind[2], kind[3]]);
        // Eight bytes each, by the length of the header.
        let sector = u64::from_le_bytes(sector.try_into().unwrap_or_default());
        let readable = chain.readable_bytes() - HEADER_BYTES;
        match kind {
            T_IN => self.read(chain, sector, writable, queues),
            T_OUT => self.write(chain, sector, readable, queues),
            T_FLUSH => {
                queues.spend(FLUSH_BYTES);
                Ok(self.disk.flush()?)
            }
            T_GET_ID => {
                let length = writable.min(ID_BYTES);
                chain.write(memory, 0, &self.id[..length])?;
                Ok(())
            }
            T_DISCARD | T_WRITE_ZEROES => {
                self.check_writable()?;
                let mut range = [0; RANGE_BYTES];
                if readable != RANGE_BYTES {
                    return Err(Failure::Unsupported);
                }
                chain.read(memory, HEADER_BYTES, &mut range)?;
                self.clear(kind == T_DISCARD, range, queues)
            }
            _ => Err(Failure::Unsupported),
        }
    }

    fn read(
        &mut self,
        chain: &Chain,
        sector: u64,
        length: usize,
        queues: &mut Queues<'_>,
    ) -> Result<(), Failure> {
        let start = self.byte_range(sector, length as u64)?;
        queues.spend(length as u64);
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(SCRATCH_BYTES);
            let scratch = &mut self.scratch[..piece];
            self.disk.read(start + done as u64, scratch)?;
            chain.write(queues.memory(), done, scratch)?;
            done += piece;
        }
        Ok(())
    }

    fn write(
        &mut self,
        chain: &Chain,
        sector: u64,
        length: usize,
        queues: &mut Queues<'_>,
    ) -> Result<(), Failure> {
        self.check_writable()?;
        let start = self.byte_range(sector, length as u64)?;
        queues.spend(length as u64);
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(SCRATCH_BYTES);
            let scratch = &mut self.scratch[..piece];
            chain.read(queues.memory(), HEADER_BYTES + done, scratch)?;
            self.disk.write(start + done as u64, scratch)?;
            done += piece;
        }
        self.settle(queues)
    }

    /// Discards or zeroes a range of sectors (section 5.2.6).
    fn clear(
        &mut self,
        discard: bool,
        range: [u8; RANGE_BYTES],
        queues: &mut Queues<'_>,
    ) -> Result<(), Failure> {
        let [
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            n0,
            n1,
            n2,
            n3,
            f0,
            f1,
            f2,
            f3,
        ] = range;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !RANGE_UNMAP != 0 || discard && flags != 0 {
            return Err(Failure::Unsupported);
        }
        if sectors > MAX_ZEROED_SECTORS {
            return Err(Failure::Refused(
                "it clears more sectors than the device takes at once",
            ));
        }
        let bytes = u64::from(sectors) * SECTOR_BYTES;
        let start = self.byte_range(sector, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        queues.spend(bytes);
        if discard {
            self.disk.discard(start, bytes)?;
        } else {
            self.disk
                .write_zeroes(start, bytes, flags & RANGE_UNMAP != 0)?;
        }
        self.settle(queues)
    }

    /// Makes a change durable for a driver that will not ask for it.
    fn settle(&self, queues: &mut Queues<'_>) -> Result<(), Failure> {
        if self.driver_flushes {
            Ok(())
        } else {
            queues.spend(FLUSH_BYTES);
            Ok(self.disk.flush()?)
        }
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.disk.read_only() {
            return Err(Failure::Refused("it would change a read-only disk"));
        }
        Ok(())
    }

    /// First byte of `length` bytes from `sector` on, all of which are on the disk.
    fn byte_range(&self, sector: u64, length: u64) -> Result<u64, Failure> {
        if length > MAX_REQUEST_BYTES {
            return Err(Failure::Refused("it moves more than 16 MiB"));
        }
        if !length.is_multiple_of(SECTOR_BYTES) {
            return Err(Failure::Refused("its length is no multiple of 512"));
        }
        let end = sector.checked_add(length / SECTOR_BYTES);
        if end.is_none_or(|end| end > self.disk.sectors()) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "it goes over the end of the disk",
            ))?;
        }
        Ok(sector * SECTOR_BYTES)
    }

    /// `struct virtio_blk_config` (section 5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.sectors().to_le_bytes());
        // Buffers of one request: the queue's descriptors but those for header and status.
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        // 16 heads of 63 sectors, as disks without geometry claim to have.
        let cylinders = (self.disk.sectors() / (16 * 63)).min(u64::from(u16::MAX)) as u16;
        put(16, &cylinders.to_le_bytes());
        put(18, &[16, 63]);
        put(20, &(SECTOR_BYTES as u32).to_le_bytes());
        // max_discard_sectors, max_discard_seg, discard_sector_alignment.
        put(36, &MAX_ZEROED_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &1u32.to_le_bytes());
        // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap.
        put(48, &MAX_ZEROED_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 2,
            pci_class: 0x01_8000,
            name: "block",
        }
    }

    fn features(&self) -> u64 {
        let common = F_SEG_MAX | F_GEOMETRY | F_BLK_SIZE | F_FLUSH;
        common
            | if self.disk.read_only() {
                F_RO
            } else {
                F_DISCARD | F_WRITE_ZEROES
            }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_structure(&self.config(), offset, data);
    }

    fn activate(&mut self, features: u64, _: &mut Queues<'_>) -> Result<(), DeviceError> {
        self.driver_flushes = features & F_FLUSH != 0;
        Ok(())
    }

    fn reset(&mut self) {
        self.driver_flushes = false;
    }

    fn save(&self) -> Result<Part, StateError> {
        let disk = (self.disk.sectors(), self.disk.read_only());
        Part::new(FORM, &(disk, self.id, self.driver_flushes))
    }

    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        let (disk, id, driver_flushes): ((u64, bool), [u8; ID_BYTES], bool) = state.open(FORM)?;
        if disk != (self.disk.sectors(), self.disk.read_only()) || id != self.id {
            return Err(FORM.does_not_fit("its disk has another size, number or access"));
        }
        self.driver_flushes = driver_flushes;
        Ok(())
    }

    fn notify(&mut self, _: u16, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = queues.pop(REQUEST_QUEUE)? {
            self.serve(&chain, queues)?;
        }
        Ok(())
    }

    fn watch(&mut self, _: &mut EventOps<'_>) {}

    fn event(
        &mut self,
        _: Events,
        _: &mut EventOps<'_>,
        _: &mut Queues<'_>,
    ) -> Result<(), DeviceError> {
        // It watches nothing.
        Ok(())
    }
}
