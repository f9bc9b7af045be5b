//! `VFIO_USER_DMA_MAP` and `VFIO_USER_DMA_UNMAP`.

use super::{MessageError, Payload, Reader, check_argsz, put, put64};

/// The mapping may be read.
pub const MAP_READ: u32 = 1;
/// The mapping may be written.
pub const MAP_WRITE: u32 = 1 << 1;
/// All mappings are taken away (`VFIO_DMA_UNMAP_FLAG_ALL` in `<linux/vfio.h>`).
pub const UNMAP_ALL: u32 = 1 << 1;

/// A part of the client's memory that the server may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaMap {
    /// [`MAP_READ`] and [`MAP_WRITE`].
    pub flags: u32,
    /// Where it begins in the file whose descriptor comes with the message.
    pub offset: u64,
    /// Address for DMA.
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
}

impl DmaMap {
    const BYTES: u32 = 32;
}

impl Payload for DmaMap {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        check_argsz(reader.u32()?, Self::BYTES)?;
        let map = Self {
            flags: reader.u32()?,
            offset: reader.u64()?,
            address: reader.u64()?,
            size: reader.u64()?,
        };
        reader.end()?;
        Ok(map)
    }

    fn write(&self, out: &mut Vec<u8>) {
        put(out, [Self::BYTES, self.flags]);
        put64(out, [self.offset, self.address, self.size]);
    }
}

/// Takes a mapping away: exactly the one that was made, or all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaUnmap {
    /// [`UNMAP_ALL`] or nothing.
    pub flags: u32,
    /// Address for DMA.
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
}

impl DmaUnmap {
    const BYTES: u32 = 24;
}

impl Payload for DmaUnmap {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        check_argsz(reader.u32()?, Self::BYTES)?;
        let unmap = Self {
            flags: reader.u32()?,
            address: reader.u64()?,
            size: reader.u64()?,
        };
        reader.end()?;
        Ok(unmap)
    }

    fn write(&self, out: &mut Vec<u8>) {
        put(out, [Self::BYTES, self.flags]);
        put64(out, [self.address, self.size]);
    }
}
