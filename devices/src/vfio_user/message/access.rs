//! Accesses: `VFIO_USER_REGION_READ`, `_REGION_WRITE`, `_REGION_WRITE_MULTI`, `_DMA_READ` and
//! `_DMA_WRITE`.
//!
//! A command to read and the reply to one that writes have no data; the others have as many bytes
//! as `count` says.

use super::{MAX_DATA_BYTES, MessageError, Payload, Reader, put, put64};

/// Most writes in one message.
pub const MAX_WRITES: usize = 256;

/// An access to a region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionAccess {
    /// From the region's beginning.
    pub offset: u64,
    /// Which region.
    pub region: u32,
    /// Number of bytes, at most [`MAX_DATA_BYTES`].
    pub count: u32,
    /// The bytes, or nothing.
    pub data: Vec<u8>,
}

impl RegionAccess {
    /// Its length without data.
    pub const BYTES: usize = 16;

    /// Whether the data are there.
    ///
    /// # Errors
    /// They are not.
    pub fn with_data(self) -> Result<Self, MessageError> {
        match self.data.len() == self.count as usize {
            true => Ok(self),
            false => Err(MessageError::Short),
        }
    }

    /// Whether there are no data.
    ///
    /// # Errors
    /// There are.
    pub fn without_data(self) -> Result<Self, MessageError> {
        match self.data.is_empty() {
            true => Ok(self),
            false => Err(MessageError::Long),
        }
    }
}

impl Payload for RegionAccess {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        let offset = reader.u64()?;
        let (region, count) = (reader.u32()?, reader.u32()?);
        if count > MAX_DATA_BYTES {
            return Err(MessageError::Field("count"));
        }
        let data = match reader.0 {
            [] => &[],
            _ => reader.data(count.into())?,
        };
        Ok(Self {
            offset,
            region,
            count,
            data: data.to_vec(),
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        put64(out, [self.offset]);
        put(out, [self.region, self.count]);
        out.extend(&self.data);
    }
}

/// Several writes of at most eight bytes each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionWrites(pub Vec<RegionAccess>);

impl Payload for RegionWrites {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        let count = reader.u64()?;
        if count > MAX_WRITES as u64 {
            return Err(MessageError::Field("number of writes"));
        }
        let mut writes = Vec::new();
        for _ in 0..count {
            let offset = reader.u64()?;
            let (region, count) = (reader.u32()?, reader.u32()?);
            let data: [u8; 8] = reader.take()?;
            let data = data.get(..count as usize);
            writes.push(RegionAccess {
                offset,
                region,
                count,
                data: data.ok_or(MessageError::Field("count"))?.to_vec(),
            });
        }
        reader.end()?;
        Ok(Self(writes))
    }

    fn write(&self, out: &mut Vec<u8>) {
        put64(out, [self.0.len() as u64]);
        for access in &self.0 {
            put64(out, [access.offset]);
            put(out, [access.region, access.count]);
            let mut data = [0; 8];
            for (to, from) in data.iter_mut().zip(&access.data) {
                *to = *from;
            }
            out.extend(data);
        }
    }
}

/// An access of the server to memory of the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DmaAccess {
    /// Address for DMA.
    pub address: u64,
    /// Number of bytes, at most [`MAX_DATA_BYTES`].
    pub count: u64,
    /// The bytes, or nothing.
    pub data: Vec<u8>,
}

impl Payload for DmaAccess {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        let (address, count) = (reader.u64()?, reader.u64()?);
        if count > MAX_DATA_BYTES.into() {
            return Err(MessageError::Field("count"));
        }
        let data = match reader.0 {
            [] => &[],
            _ => reader.data(count)?,
        };
        Ok(Self {
            address,
            count,
            data: data.to_vec(),
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        put64(out, [self.address, self.count]);
        out.extend(&self.data);
    }
}
