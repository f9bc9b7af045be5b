//! `VFIO_USER_DEVICE_FEATURE` and the migration data: how a device's state is taken and put back.

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_MASK, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
    VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_PROBE, VFIO_DEVICE_FEATURE_SET,
    VFIO_MIGRATION_STOP_COPY,
};

use super::{MAX_DATA_BYTES, MessageError, Payload, Reader, check_argsz, put};

/// Says which states there are.
pub const FEATURE_MIGRATION: u32 = VFIO_DEVICE_FEATURE_MIGRATION;
/// The state that the device is in.
pub const FEATURE_MIG_STATE: u32 = VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
/// The feature is asked for.
pub const FEATURE_GET: u32 = VFIO_DEVICE_FEATURE_GET;
/// The feature is changed.
pub const FEATURE_SET: u32 = VFIO_DEVICE_FEATURE_SET;
/// It is asked whether the feature can be asked for or changed.
pub const FEATURE_PROBE: u32 = VFIO_DEVICE_FEATURE_PROBE;
/// [`FEATURE_MIGRATION`]: a device that is stopped gives its state.
pub const MIGRATION_STOP_COPY: u64 = VFIO_MIGRATION_STOP_COPY as u64;

/// A feature with its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feature {
    /// Room for the reply, or its length.
    pub argsz: u32,
    /// The feature's number and what is done with it.
    pub flags: u32,
    /// What belongs to the feature.
    pub data: Vec<u8>,
}

impl Feature {
    /// Its length without data.
    pub const BYTES: u32 = 8;
    /// Most data that a feature here has.
    const MAX_DATA: usize = 4096;

    /// Which feature it is.
    pub fn number(&self) -> u32 {
        self.flags & VFIO_DEVICE_FEATURE_MASK
    }

    /// What is done with it.
    pub fn action(&self) -> u32 {
        self.flags & !VFIO_DEVICE_FEATURE_MASK
    }
}

impl Payload for Feature {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        let (argsz, flags) = (reader.u32()?, reader.u32()?);
        check_argsz(argsz, Self::BYTES)?;
        match reader.0.len() > Self::MAX_DATA {
            true => Err(MessageError::Long),
            false => Ok(Self {
                argsz,
                flags,
                data: reader.0.to_vec(),
            }),
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        put(out, [self.argsz, self.flags]);
        out.extend(&self.data);
    }
}

/// What a device does (`enum vfio_device_mig_state` in `<linux/vfio.h>`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceState {
    /// It failed, and has to be reset.
    Error = 0,
    /// It changes nothing, of its own or of others.
    Stop = 1,
    /// It works.
    Running = 2,
    /// As [`DeviceState::Stop`], and its state can be read.
    StopCopy = 3,
    /// As [`DeviceState::Stop`], and its state can be written.
    Resuming = 4,
}

/// Data of [`FEATURE_MIG_STATE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MigState(pub DeviceState);

impl Payload for MigState {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        let (state, _data_fd) = (reader.u32()?, reader.u32()?);
        reader.end()?;
        let state = match state {
            0 => DeviceState::Error,
            1 => DeviceState::Stop,
            2 => DeviceState::Running,
            3 => DeviceState::StopCopy,
            4 => DeviceState::Resuming,
            _ => return Err(MessageError::Field("device state")),
        };
        Ok(Self(state))
    }

    fn write(&self, out: &mut Vec<u8>) {
        put(out, [self.0 as u32, 0]);
    }
}

/// `VFIO_USER_MIG_DATA_READ` and `_WRITE`: a piece of a device's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigData {
    /// Room for the reply, or its length.
    pub argsz: u32,
    /// Bytes wanted, or those of `data`.
    pub size: u32,
    /// The bytes, or nothing.
    pub data: Vec<u8>,
}

impl MigData {
    /// Its length without data.
    pub const BYTES: u32 = 8;

    /// The message with these bytes.
    pub fn new(data: Vec<u8>) -> Self {
        Self {
            argsz: Self::BYTES + data.len() as u32,
            size: data.len() as u32,
            data,
        }
    }
}

impl Payload for MigData {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        let (argsz, size) = (reader.u32()?, reader.u32()?);
        check_argsz(argsz, Self::BYTES)?;
        if size > MAX_DATA_BYTES {
            return Err(MessageError::Field("size"));
        }
        let data = match reader.0 {
            [] => &[],
            // libvfio-user sends as many bytes as there was room for, whatever it says.
            rest => rest.get(..size as usize).ok_or(MessageError::Short)?,
        };
        Ok(Self {
            argsz,
            size,
            data: data.to_vec(),
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        put(out, [self.argsz, self.size]);
        out.extend(&self.data);
    }
}
