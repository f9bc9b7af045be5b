//! What a device has: `VFIO_USER_DEVICE_GET_INFO`, `_GET_REGION_INFO` and `_GET_REGION_IO_FDS`.

use std::ops::Range;

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
};

use super::{MessageError, Payload, Reader, check_argsz, put, put64};

/// The device can be reset.
pub const DEVICE_FLAGS_RESET: u32 = VFIO_DEVICE_FLAGS_RESET;
/// It is a PCI device.
pub const DEVICE_FLAGS_PCI: u32 = VFIO_DEVICE_FLAGS_PCI;
/// The region can be read.
pub const REGION_READ: u32 = VFIO_REGION_INFO_FLAG_READ;
/// The region can be written.
pub const REGION_WRITE: u32 = VFIO_REGION_INFO_FLAG_WRITE;
/// Some of the region can be mapped.
pub const REGION_MMAP: u32 = VFIO_REGION_INFO_FLAG_MMAP;

/// Most areas of a region that can be mapped.
const MAX_AREAS: u32 = 256;
/// Most capabilities of a region that are looked at.
const MAX_CAPABILITIES: usize = 16;

/// The device as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Room for the reply, or its length.
    pub argsz: u32,
    /// [`DEVICE_FLAGS_RESET`] and [`DEVICE_FLAGS_PCI`].
    pub flags: u32,
    /// Number of regions.
    pub regions: u32,
    /// Number of kinds of interrupts.
    pub irqs: u32,
}

impl DeviceInfo {
    /// Its length.
    pub const BYTES: u32 = 16;
}

impl Payload for DeviceInfo {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        let info = Self {
            argsz: reader.u32()?,
            flags: reader.u32()?,
            regions: reader.u32()?,
            irqs: reader.u32()?,
        };
        reader.end()?;
        check_argsz(info.argsz, Self::BYTES)?;
        Ok(info)
    }

    fn write(&self, out: &mut Vec<u8>) {
        put(out, [self.argsz, self.flags, self.regions, self.irqs]);
    }
}

/// A part of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// From the region's beginning.
    pub offset: u64,
    /// Length in bytes.
    pub size: u64,
}

/// One region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionInfo {
    /// Room for the reply, or the length that a whole one has.
    pub argsz: u32,
    /// `VFIO_REGION_INFO_FLAG_` constants of `<linux/vfio.h>`.
    pub flags: u32,
    /// Which region.
    pub index: u32,
    /// Its length; 0 if it is not there.
    pub size: u64,
    /// Where it begins in the file whose descriptor comes with the reply, if it can be mapped.
    pub offset: u64,
    /// Parts that can be mapped, where it says so (`VFIO_REGION_INFO_CAP_SPARSE_MMAP`): if it does
    /// and lists none, nothing can.
    pub areas: Option<Vec<Area>>,
}

impl RegionInfo {
    /// Length of the part that is always there.
    pub const BYTES: u32 = 32;

    /// Length of all of it.
    pub fn whole(&self) -> u32 {
        match &self.areas {
            None => Self::BYTES,
            Some(areas) => Self::BYTES + 16 + 16 * areas.len() as u32,
        }
    }

    /// The parts that can be mapped to be read and written, in the order of their addresses: all of
    /// it where it says nothing of areas.
    ///
    /// # Errors
    /// Some of them are outside of the region, or overlap.
    pub fn mappable(&self) -> Result<Vec<Range<u64>>, MessageError> {
        let both = REGION_READ | REGION_WRITE | REGION_MMAP;
        if self.flags & both != both {
            return Ok(Vec::new());
        }
        let Some(areas) = &self.areas else {
            return Ok(std::iter::once(0..self.size).collect());
        };
        let range = |area: &Area| {
            let end = area.offset.checked_add(area.size);
            let end = end.filter(|end| *end <= self.size);
            let end = end.ok_or(MessageError::Field("area of a region"))?;
            Ok(area.offset..end)
        };
        let parts: Result<Vec<_>, _> = areas.iter().map(range).collect();
        let mut parts = parts?;
        parts.retain(|part| !part.is_empty());
        parts.sort_by_key(|part| part.start);
        match parts.is_sorted_by(|one, next| one.end <= next.start) {
            true => Ok(parts),
            false => Err(MessageError::Field("area of a region")),
        }
    }
}

impl Payload for RegionInfo {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        let argsz = reader.u32()?;
        check_argsz(argsz, Self::BYTES)?;
        let (flags, index, first) = (reader.u32()?, reader.u32()?, reader.u32()?);
        let (size, offset) = (reader.u64()?, reader.u64()?);
        let mut flags = flags;
        let areas = match flags & VFIO_REGION_INFO_FLAG_CAPS != 0 {
            true if argsz as usize <= bytes.len() => areas(bytes, first)?,
            true => {
                // There was no room for all of it: what of it can be mapped is not known.
                flags &= !REGION_MMAP;
                None
            }
            false => {
                reader.end()?;
                None
            }
        };
        Ok(Self {
            argsz,
            flags,
            index,
            size,
            offset,
            areas,
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        let (mut flags, mut first) = (self.flags & !VFIO_REGION_INFO_FLAG_CAPS, 0);
        if self.areas.is_some() {
            flags |= VFIO_REGION_INFO_FLAG_CAPS;
            first = Self::BYTES;
        }
        put(out, [self.argsz, flags, self.index, first]);
        put64(out, [self.size, self.offset]);
        if let Some(areas) = &self.areas {
            // Version 1 in the upper half of the first word.
            put(out, [VFIO_REGION_INFO_CAP_SPARSE_MMAP | 1 << 16, 0]);
            put(out, [areas.len() as u32, 0]);
            for area in areas {
                put64(out, [area.offset, area.size]);
            }
        }
    }
}

/// The areas in a list of capabilities, if one of them is of areas: each says where the next one is,
/// which has to be behind it.
fn areas(bytes: &[u8], first: u32) -> Result<Option<Vec<Area>>, MessageError> {
    let mut found = None;
    let (mut at, mut last) = (first, RegionInfo::BYTES - 1);
    for _ in 0..MAX_CAPABILITIES {
        if at == 0 {
            return Ok(found);
        }
        if at <= last {
            return Err(MessageError::Field("list of capabilities"));
        }
        last = at;
        let capability = bytes.get(at as usize..).ok_or(MessageError::Short)?;
        let mut reader = Reader::new(capability);
        let id = reader.u16()?;
        let _version = reader.u16()?;
        at = reader.u32()?;
        if u32::from(id) != VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            continue;
        }
        let (count, _reserved) = (reader.u32()?, reader.u32()?);
        if count > MAX_AREAS {
            return Err(MessageError::Field("number of areas"));
        }
        let found: &mut Vec<_> = found.get_or_insert_default();
        for _ in 0..count {
            found.push(Area {
                offset: reader.u64()?,
                size: reader.u64()?,
            });
        }
    }
    Err(MessageError::Field("list of capabilities"))
}

/// Asks for a region's file descriptors for accesses, and the beginning of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionIoFds {
    /// Room for the reply, or the length that a whole one has.
    pub argsz: u32,
    /// Which region.
    pub index: u32,
    /// Number of parts that have descriptors; what each one is follows.
    pub count: u32,
}

impl RegionIoFds {
    /// Length of the part that is always there.
    pub const BYTES: u32 = 16;
}

impl Payload for RegionIoFds {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        let argsz = reader.u32()?;
        let flags = reader.u32()?;
        let fds = Self {
            argsz,
            index: reader.u32()?,
            count: reader.u32()?,
        };
        reader.end()?;
        check_argsz(argsz, Self::BYTES)?;
        match flags {
            0 => Ok(fds),
            _ => Err(MessageError::Field("flags")),
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        put(out, [self.argsz, 0, self.index, self.count]);
    }
}
