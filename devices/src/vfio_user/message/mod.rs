//! The protocol's messages as checked values. Any bytes give a value or an error.

mod access;
mod device;
mod dma;
mod feature;
mod irq;
mod registers;
mod version;

pub use access::{DmaAccess, MAX_WRITES, RegionAccess, RegionWrites};
pub use device::{
    Area, DEVICE_FLAGS_PCI, DEVICE_FLAGS_RESET, DeviceInfo, REGION_MMAP, REGION_READ, REGION_WRITE,
    RegionInfo, RegionIoFds,
};
pub use dma::{DmaMap, DmaUnmap, MAP_READ, MAP_WRITE, UNMAP_ALL};
pub use feature::{
    DeviceState, FEATURE_GET, FEATURE_MIG_STATE, FEATURE_MIGRATION, FEATURE_PROBE, FEATURE_SET,
    Feature, MIGRATION_STOP_COPY, MigData, MigState,
};
pub use irq::{IRQ_AUTOMASKED, IRQ_EVENTFD, IRQ_MASKABLE, IrqAction, IrqData, IrqInfo, SetIrqs};
pub use registers::FEATURE_REGISTERS;
pub use version::{Capabilities, Version};

/// Bytes of the header that every message begins with.
pub const HEADER_BYTES: usize = 16;
/// Bytes of the longest message: 1 MiB of data, with its headers.
pub const MAX_MESSAGE_BYTES: usize = (1 << 20) + 4096;
/// Most data bytes in one message, as the specification has it where nobody says otherwise.
pub const MAX_DATA_BYTES: u32 = 1 << 20;

/// Regions of a PCI device: six base address registers, expansion ROM, configuration space, VGA.
pub const PCI_REGIONS: u32 = vfio_bindings::bindings::vfio::VFIO_PCI_NUM_REGIONS;
/// Index of configuration space.
pub const CONFIG_REGION: u32 = vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;
/// Kinds of interrupts of a PCI device: INTx, MSI, MSI-X, errors, requests.
pub const PCI_IRQS: u32 = vfio_bindings::bindings::vfio::VFIO_PCI_NUM_IRQS;
/// Index of INTx.
pub const INTX: u32 = vfio_bindings::bindings::vfio::VFIO_PCI_INTX_IRQ_INDEX;
/// Index of MSI-X.
pub const MSIX: u32 = vfio_bindings::bindings::vfio::VFIO_PCI_MSIX_IRQ_INDEX;

/// Why bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// They end too early.
    #[error("a message that is too short")]
    Short,
    /// There are more than belong to it.
    #[error("a message that is too long")]
    Long,
    /// A field has a value that it cannot have.
    #[error("a message with a bad {0}")]
    Field(&'static str),
}

/// What a message is about (specification, "Commands").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub enum Command {
    Version = 1,
    DmaMap = 2,
    DmaUnmap = 3,
    DeviceGetInfo = 4,
    GetRegionInfo = 5,
    GetRegionIoFds = 6,
    GetIrqInfo = 7,
    SetIrqs = 8,
    RegionRead = 9,
    RegionWrite = 10,
    DmaRead = 11,
    DmaWrite = 12,
    DeviceReset = 13,
    RegionWriteMulti = 15,
    DeviceFeature = 16,
    MigDataRead = 17,
    MigDataWrite = 18,
}

impl Command {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::Version,
        Self::DmaMap,
        Self::DmaUnmap,
        Self::DeviceGetInfo,
        Self::GetRegionInfo,
        Self::GetRegionIoFds,
        Self::GetIrqInfo,
        Self::SetIrqs,
        Self::RegionRead,
        Self::RegionWrite,
        Self::DmaRead,
        Self::DmaWrite,
        Self::DeviceReset,
        Self::RegionWriteMulti,
        Self::DeviceFeature,
        Self::MigDataRead,
        Self::MigDataWrite,
    ];

    /// The command of this number.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|one| *one as u16 == number)
    }
}

/// The header (specification, "Header").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Chosen by who sends the command, and the same in the reply.
    pub id: u16,
    /// Number of the command.
    pub command: u16,
    /// Bytes of the message with this header: at least those of a header, at most
    /// [`MAX_MESSAGE_BYTES`].
    pub size: u32,
    /// A combination of the `FLAG_` constants.
    pub flags: u32,
    /// `errno` of a reply with [`Header::FLAG_ERROR`].
    pub error: u32,
}

impl Header {
    /// The message answers one with the same ID; otherwise it is a command.
    pub const FLAG_REPLY: u32 = 1;
    /// The command wants no reply.
    pub const FLAG_NO_REPLY: u32 = 1 << 4;
    /// The command failed.
    pub const FLAG_ERROR: u32 = 1 << 5;
    const TYPE_BITS: u32 = 0xf;

    /// The header in these bytes.
    ///
    /// # Errors
    /// The size or the type of the message is none that there is: what follows cannot be told.
    pub fn parse(bytes: [u8; HEADER_BYTES]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(&bytes);
        let header = Self {
            id: reader.u16()?,
            command: reader.u16()?,
            size: reader.u32()?,
            flags: reader.u32()?,
            error: reader.u32()?,
        };
        if !(HEADER_BYTES..=MAX_MESSAGE_BYTES).contains(&(header.size as usize)) {
            return Err(MessageError::Field("size"));
        }
        if header.flags & Self::TYPE_BITS > Self::FLAG_REPLY {
            return Err(MessageError::Field("type"));
        }
        Ok(header)
    }

    /// Its bytes.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..2].copy_from_slice(&self.id.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.command.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.size.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.flags.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.error.to_le_bytes());
        bytes
    }

    /// Whether it answers a command.
    pub fn is_reply(&self) -> bool {
        self.flags & Self::FLAG_REPLY != 0
    }

    /// Whether no reply is wanted.
    pub fn wants_no_reply(&self) -> bool {
        self.flags & Self::FLAG_NO_REPLY != 0
    }

    /// `errno` of a reply that says that its command failed.
    pub fn failed(&self) -> Option<u32> {
        (self.flags & Self::FLAG_ERROR != 0).then_some(self.error)
    }

    /// Whether it has flags that no command has.
    pub fn has_strange_flags(&self) -> bool {
        self.flags & !(Self::TYPE_BITS | Self::FLAG_NO_REPLY) != 0
    }
}

/// A message's content without its header.
pub trait Payload: Sized {
    /// The value in these bytes.
    ///
    /// # Errors
    /// They are no such value.
    fn parse(bytes: &[u8]) -> Result<Self, MessageError>;

    /// Appends the value's bytes.
    fn write(&self, out: &mut Vec<u8>);

    /// The value's bytes.
    fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.write(&mut out);
        out
    }
}

/// Takes values from the front of bytes.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let (value, rest) = self.0.split_first_chunk().ok_or(MessageError::Short)?;
        self.0 = rest;
        Ok(*value)
    }

    fn u16(&mut self) -> Result<u16, MessageError> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, MessageError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, MessageError> {
        self.take().map(u64::from_le_bytes)
    }

    /// What is left, which has to be `len` bytes.
    fn data(self, len: u64) -> Result<&'a [u8], MessageError> {
        match (self.0.len() as u64).cmp(&len) {
            std::cmp::Ordering::Less => Err(MessageError::Short),
            std::cmp::Ordering::Equal => Ok(self.0),
            std::cmp::Ordering::Greater => Err(MessageError::Long),
        }
    }

    /// Checks that nothing is left.
    fn end(self) -> Result<(), MessageError> {
        self.data(0).map(|_| ())
    }
}

/// Appends values to bytes.
fn put<const N: usize>(out: &mut Vec<u8>, values: [u32; N]) {
    out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

/// As [`put`], of 64 bits.
fn put64<const N: usize>(out: &mut Vec<u8>, values: [u64; N]) {
    out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

/// Checks `argsz`, the room that the sender has for the reply or the length of what it sent.
fn check_argsz(argsz: u32, least: u32) -> Result<(), MessageError> {
    match argsz < least {
        true => Err(MessageError::Field("argsz")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests;
