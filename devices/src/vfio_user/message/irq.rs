//! Interrupts: `VFIO_USER_DEVICE_GET_IRQ_INFO` and `_SET_IRQS`.

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
};

use super::{MessageError, Payload, Reader, check_argsz, put};

/// Interrupts of the kind are signalled by eventfds.
pub const IRQ_EVENTFD: u32 = VFIO_IRQ_INFO_EVENTFD;
/// They can be masked.
pub const IRQ_MASKABLE: u32 = VFIO_IRQ_INFO_MASKABLE;
/// They mask themselves when they are signalled.
pub const IRQ_AUTOMASKED: u32 = VFIO_IRQ_INFO_AUTOMASKED;

/// Most interrupts of a kind: the vectors of MSI-X.
const MAX_IRQS: u32 = 2048;

/// One kind of interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqInfo {
    /// Room for the reply, or its length.
    pub argsz: u32,
    /// `IRQ_` constants.
    pub flags: u32,
    /// Which kind.
    pub index: u32,
    /// How many there are of it.
    pub count: u32,
}

impl IrqInfo {
    /// Its length.
    pub const BYTES: u32 = 16;
}

impl Payload for IrqInfo {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        let info = Self {
            argsz: reader.u32()?,
            flags: reader.u32()?,
            index: reader.u32()?,
            count: reader.u32()?,
        };
        reader.end()?;
        check_argsz(info.argsz, Self::BYTES)?;
        Ok(info)
    }

    fn write(&self, out: &mut Vec<u8>) {
        put(out, [self.argsz, self.flags, self.index, self.count]);
    }
}

/// What is to happen to interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqAction {
    /// They are masked.
    Mask,
    /// They are unmasked.
    Unmask,
    /// They are signalled.
    Trigger,
}

/// Which of them it happens to, and how it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IrqData {
    /// To all of them, now. With [`IrqAction::Trigger`] and none of them: the whole kind is turned
    /// off.
    None,
    /// To those that are `true`, now.
    Bools(Vec<bool>),
    /// Whenever the descriptors that come with the message say so; from now on by nobody if there
    /// are none.
    Events,
}

/// Sets interrupts up, or acts on them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetIrqs {
    /// What is to happen.
    pub action: IrqAction,
    /// To which, how.
    pub data: IrqData,
    /// Which kind.
    pub index: u32,
    /// First of the interrupts.
    pub start: u32,
    /// Number of them.
    pub count: u32,
}

impl SetIrqs {
    const BYTES: u32 = 20;
}

impl Payload for SetIrqs {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        check_argsz(reader.u32()?, Self::BYTES)?;
        let flags = reader.u32()?;
        let (index, start, count) = (reader.u32()?, reader.u32()?, reader.u32()?);
        if count > MAX_IRQS || start > MAX_IRQS {
            return Err(MessageError::Field("number of interrupts"));
        }
        let data_bits = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL | VFIO_IRQ_SET_DATA_EVENTFD;
        let data = match flags & data_bits {
            VFIO_IRQ_SET_DATA_NONE => IrqData::None,
            VFIO_IRQ_SET_DATA_EVENTFD => IrqData::Events,
            VFIO_IRQ_SET_DATA_BOOL => {
                let bools = Reader(reader.0).data(count.into())?;
                reader.0 = &[];
                IrqData::Bools(bools.iter().map(|one| *one != 0).collect())
            }
            _ => return Err(MessageError::Field("kind of data")),
        };
        reader.end()?;
        let action = match flags & !data_bits {
            VFIO_IRQ_SET_ACTION_MASK => IrqAction::Mask,
            VFIO_IRQ_SET_ACTION_UNMASK => IrqAction::Unmask,
            VFIO_IRQ_SET_ACTION_TRIGGER => IrqAction::Trigger,
            _ => return Err(MessageError::Field("action")),
        };
        Ok(Self {
            action,
            data,
            index,
            start,
            count,
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        let action = match self.action {
            IrqAction::Mask => VFIO_IRQ_SET_ACTION_MASK,
            IrqAction::Unmask => VFIO_IRQ_SET_ACTION_UNMASK,
            IrqAction::Trigger => VFIO_IRQ_SET_ACTION_TRIGGER,
        };
        let (kind, bools): (u32, &[bool]) = match &self.data {
            IrqData::None => (VFIO_IRQ_SET_DATA_NONE, &[]),
            IrqData::Bools(bools) => (VFIO_IRQ_SET_DATA_BOOL, bools),
            IrqData::Events => (VFIO_IRQ_SET_DATA_EVENTFD, &[]),
        };
        let length = Self::BYTES + bools.len() as u32;
        put(
            out,
            [length, action | kind, self.index, self.start, self.count],
        );
        out.extend(bools.iter().map(|one| u8::from(*one)));
    }
}
