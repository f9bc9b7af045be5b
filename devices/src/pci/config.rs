//! Type 0 configuration space of one conventional PCI function: 256 bytes, each bit of them
//! read-only, writable, or cleared by writing one (PCI Local Bus 3.0, chapter 6).
//!
//! A device builds its space once, then forwards [`super::PciFunction::config_read`] and
//! `config_write` to it and looks at the result. Offsets above 255 are not there: reads give all
//! ones, writes are lost, as on a function that has no extended configuration space.

use serde::{Deserialize, Serialize};

use super::{BarIndex, BarRange, BarSize, BarSpace};

/// Bytes of a conventional function's configuration space.
pub const CONFIG_SPACE_BYTES: usize = 256;
/// Number of base address registers of a type 0 header.
pub const BAR_COUNT: usize = 6;

/// Offsets of the registers of a type 0 header (section 6.1, figure 6-1).
pub mod offset {
    /// Vendor ID, 16 bits.
    pub const VENDOR_ID: u16 = 0x00;
    /// Device ID, 16 bits.
    pub const DEVICE_ID: u16 = 0x02;
    /// Command register, 16 bits.
    pub const COMMAND: u16 = 0x04;
    /// Status register, 16 bits.
    pub const STATUS: u16 = 0x06;
    /// Revision ID, 8 bits; the class code follows in the next three bytes.
    pub const REVISION_ID: u16 = 0x08;
    /// Cache line size, 8 bits.
    pub const CACHE_LINE_SIZE: u16 = 0x0c;
    /// Latency timer, 8 bits.
    pub const LATENCY_TIMER: u16 = 0x0d;
    /// Header type, 8 bits.
    pub const HEADER_TYPE: u16 = 0x0e;
    /// First base address register; six of 32 bits follow each other.
    pub const BAR0: u16 = 0x10;
    /// Subsystem vendor ID, 16 bits.
    pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
    /// Subsystem ID, 16 bits.
    pub const SUBSYSTEM_ID: u16 = 0x2e;
    /// Expansion ROM base address, 32 bits.
    pub const EXPANSION_ROM: u16 = 0x30;
    /// Offset of the first capability, 8 bits.
    pub const CAPABILITIES_POINTER: u16 = 0x34;
    /// Interrupt line, 8 bits.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Interrupt pin, 8 bits.
    pub const INTERRUPT_PIN: u16 = 0x3d;
}

bitflags::bitflags! {
    /// Command register (section 6.2.2).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Command: u16 {
        /// Responds to I/O space accesses.
        const IO_SPACE = 1 << 0;
        /// Responds to memory space accesses.
        const MEMORY_SPACE = 1 << 1;
        /// May master the bus, that is use DMA and send message-signalled interrupts.
        const BUS_MASTER = 1 << 2;
        /// May use Memory Write and Invalidate.
        const MEMORY_WRITE_INVALIDATE = 1 << 4;
        /// Responds to parity errors.
        const PARITY_ERROR_RESPONSE = 1 << 6;
        /// May drive SERR#.
        const SERR_ENABLE = 1 << 8;
        /// May not assert INTx#.
        const INTERRUPT_DISABLE = 1 << 10;
    }

    /// Status register (section 6.2.3).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Status: u16 {
        /// The function has an INTx interrupt pending, whether or not it may signal it.
        const INTERRUPT_STATUS = 1 << 3;
        /// There is a capability list.
        const CAPABILITIES_LIST = 1 << 4;
        /// Can run at 66 MHz.
        const MHZ_66 = 1 << 5;
        /// Accepts fast back-to-back transactions.
        const FAST_BACK_TO_BACK = 1 << 7;
        /// Medium DEVSEL timing.
        const DEVSEL_MEDIUM = 1 << 9;
    }
}

/// Bits 8 and 11 to 15 of the status register are cleared by writing one.
const STATUS_WRITE_ONE_TO_CLEAR: u16 = 0xf900;

/// What a function is, as its header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciIdentity {
    /// Vendor ID.
    pub vendor_id: u16,
    /// Device ID.
    pub device_id: u16,
    /// Revision ID.
    pub revision_id: u8,
    /// Class code: base class, sub-class and programming interface in bits 23:16, 15:8 and 7:0.
    pub class_code: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor_id: u16,
    /// Subsystem ID.
    pub subsystem_id: u16,
}

/// INTx pin of a function (section 6.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum InterruptPin {
    /// INTA#.
    A = 1,
    /// INTB#.
    B = 2,
    /// INTC#.
    C = 3,
    /// INTD#.
    D = 4,
}

/// Why a configuration space cannot be laid out or restored so.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The index is above 5, taken, or a 64-bit register has no second half.
    #[error("base address register {0} does not exist or is taken")]
    BarIndex(BarIndex),
    /// The size is no power of two or outside what the space allows.
    #[error("a base address register cannot have a size of {0:#x} bytes")]
    BarSize(u64),
    /// A capability does not fit where it should be.
    #[error(
        "a capability of {len} bytes does not fit at offset {offset:#x} of configuration space"
    )]
    Capability {
        /// Where it would start.
        offset: u16,
        /// Its length with the two header bytes.
        len: usize,
    },
    /// A saved state is of another function.
    #[error("the saved PCI configuration is of another device")]
    ForeignState,
}

/// Configuration space's content as a value that can be stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigSpaceState {
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    space: BarSpace,
    size_bytes: u64,
}

/// Configuration space of one function. See the module's text.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SPACE_BYTES],
    /// Bits that the guest can set and clear.
    writable: [u8; CONFIG_SPACE_BYTES],
    /// Bits that the guest clears by writing one.
    write_one_to_clear: [u8; CONFIG_SPACE_BYTES],
    /// Content after a power-on reset.
    power_on: [u8; CONFIG_SPACE_BYTES],
    bars: [Option<Bar>; BAR_COUNT],
    /// Offset of the byte that will point to the next capability.
    capability_link: u16,
    /// First byte not yet used by a capability.
    capability_end: u16,
}

impl ConfigSpace {
    /// A space with a type 0 header, a command register that can be written, no base address
    /// registers, no interrupt pin and no capabilities.
    pub fn new(identity: PciIdentity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_SPACE_BYTES],
            writable: [0; CONFIG_SPACE_BYTES],
            write_one_to_clear: [0; CONFIG_SPACE_BYTES],
            power_on: [0; CONFIG_SPACE_BYTES],
            bars: [None; BAR_COUNT],
            capability_link: offset::CAPABILITIES_POINTER,
            capability_end: 0x40,
        };
        space.init(offset::VENDOR_ID, &identity.vendor_id.to_le_bytes());
        space.init(offset::DEVICE_ID, &identity.device_id.to_le_bytes());
        let class = (identity.class_code << 8) | u32::from(identity.revision_id);
        space.init(offset::REVISION_ID, &class.to_le_bytes());
        space.init(
            offset::SUBSYSTEM_VENDOR_ID,
            &identity.subsystem_vendor_id.to_le_bytes(),
        );
        space.init(offset::SUBSYSTEM_ID, &identity.subsystem_id.to_le_bytes());
        space.init_writable(offset::COMMAND, &Command::all().bits().to_le_bytes());
        space.init_writable(offset::CACHE_LINE_SIZE, &[0xff]);
        space.init_writable(offset::LATENCY_TIMER, &[0xff]);
        space.init_writable(offset::INTERRUPT_LINE, &[0xff]);
        let status = usize::from(offset::STATUS);
        space.write_one_to_clear[status..status + 2]
            .copy_from_slice(&STATUS_WRITE_ONE_TO_CLEAR.to_le_bytes());
        space
    }

    /// Adds base address register `bar`. A `Memory64` one takes `bar + 1` too.
    ///
    /// `size_bytes` is a power of two: 4 to 256 for I/O, 16 to 2 GiB for `Memory32`, 16 and more
    /// for `Memory64`. Memory registers are not prefetchable.
    pub fn add_bar(
        &mut self,
        bar: BarIndex,
        space: BarSpace,
        size_bytes: u64,
    ) -> Result<(), ConfigError> {
        let index = usize::from(bar);
        let second_half = index > 0
            && matches!(
                self.bars.get(index - 1),
                Some(Some(Bar {
                    space: BarSpace::Memory64,
                    ..
                }))
            );
        if !matches!(self.bars.get(index), Some(None)) || second_half {
            return Err(ConfigError::BarIndex(bar));
        }
        if space == BarSpace::Memory64 && !matches!(self.bars.get(index + 1), Some(None)) {
            return Err(ConfigError::BarIndex(bar));
        }
        let (limits, type_bits) = match space {
            BarSpace::Io => (4..=256, 0b001),
            BarSpace::Memory32 => (16..=1 << 31, 0b000),
            BarSpace::Memory64 => (16..=1 << 62, 0b100),
        };
        if !size_bytes.is_power_of_two() || !limits.contains(&size_bytes) {
            return Err(ConfigError::BarSize(size_bytes));
        }
        let at = offset::BAR0 + 4 * u16::from(bar);
        let mask = (!(size_bytes - 1)).to_le_bytes();
        self.init(at, &[type_bits]);
        let width = if space == BarSpace::Memory64 { 8 } else { 4 };
        self.init_writable(at, &mask[..width]);
        self.bars[index] = Some(Bar { space, size_bytes });
        Ok(())
    }

    /// Says which INTx pin the function uses. Without this it uses none.
    pub fn set_interrupt_pin(&mut self, pin: InterruptPin) {
        self.init(offset::INTERRUPT_PIN, &[pin as u8]);
    }

    /// Sets read-only bits of the status register that are there from power-on.
    pub fn set_power_on_status(&mut self, status: Status) {
        let old = self.u16_at(offset::STATUS);
        self.init(offset::STATUS, &(old | status.bits()).to_le_bytes());
    }

    /// Appends a capability behind the last one; gives its offset.
    ///
    /// `body` is what follows the two header bytes, `writable` has a set bit for each bit of `body`
    /// that the guest may write (missing bytes are read-only).
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, ConfigError> {
        let at = self.capability_end.next_multiple_of(4);
        self.add_capability_at(at, id, body, writable)?;
        Ok(at)
    }

    /// As [`ConfigSpace::add_capability`], at an offset that the hardware's manual fixes. Offsets
    /// must rise from one capability to the next.
    pub fn add_capability_at(
        &mut self,
        at: u16,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<(), ConfigError> {
        let len = body.len() + 2;
        let start = usize::from(at);
        if at < self.capability_end
            || !at.is_multiple_of(4)
            || writable.len() > body.len()
            || len > CONFIG_SPACE_BYTES - start.min(CONFIG_SPACE_BYTES)
        {
            return Err(ConfigError::Capability { offset: at, len });
        }
        self.init(at, &[id, 0]);
        self.init(at + 2, body);
        self.init_writable(at + 2, writable);
        // `start + len` is at most 256 and `at` at most 254, both by the check above.
        self.init(self.capability_link, &[at as u8]);
        self.capability_link = at + 1;
        self.capability_end = (start + len) as u16;
        self.set_power_on_status(Status::CAPABILITIES_LIST);
        Ok(())
    }

    /// Reads configuration space for the guest.
    pub fn read(&self, at: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(at) + i).copied().unwrap_or(0xff);
        }
    }

    /// Writes configuration space for the guest, as far as the bits can be written.
    pub fn write(&mut self, at: u16, data: &[u8]) {
        for (i, &new) in data.iter().enumerate() {
            let at = usize::from(at) + i;
            let Some(byte) = self.bytes.get_mut(at) else {
                return;
            };
            *byte = (*byte & !self.writable[at]) | (new & self.writable[at]);
            *byte &= !(new & self.write_one_to_clear[at]);
        }
    }

    /// Ranges that the base address registers decode now: the enable bit of their space is set, the
    /// address is not 0 (nothing was assigned), and the range does not wrap.
    pub fn decoded(&self) -> Vec<BarRange> {
        let command = self.command();
        let mut ranges = Vec::new();
        for (index, bar) in self.bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let at = offset::BAR0 + 4 * index as u16;
            let low = u64::from(self.u32_at(at));
            let (enabled, address) = match bar.space {
                BarSpace::Io => (command.contains(Command::IO_SPACE), low & 0xffff_fffc),
                BarSpace::Memory32 => (command.contains(Command::MEMORY_SPACE), low & 0xffff_fff0),
                BarSpace::Memory64 => {
                    let high = u64::from(self.u32_at(at + 4));
                    (
                        command.contains(Command::MEMORY_SPACE),
                        high << 32 | low & 0xffff_fff0,
                    )
                }
            };
            if !enabled || address == 0 || address.checked_add(bar.size_bytes - 1).is_none() {
                continue;
            }
            if bar.space == BarSpace::Io && address + bar.size_bytes > 0x1_0000 {
                continue;
            }
            ranges.push(BarRange {
                bar: index as BarIndex,
                space: bar.space,
                address,
                size_bytes: bar.size_bytes,
            });
        }
        ranges
    }

    /// The base address registers.
    pub fn bars(&self) -> Vec<BarSize> {
        let bars = self.bars.iter().enumerate();
        let bars = bars.filter_map(|(index, bar)| {
            bar.map(|bar| BarSize {
                bar: index as BarIndex,
                space: bar.space,
                size_bytes: bar.size_bytes,
            })
        });
        bars.collect()
    }

    /// The command register.
    pub fn command(&self) -> Command {
        Command::from_bits_truncate(self.u16_at(offset::COMMAND))
    }

    /// Shows in the status register whether an INTx interrupt is pending.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let mut status = Status::from_bits_retain(self.u16_at(offset::STATUS));
        status.set(Status::INTERRUPT_STATUS, pending);
        self.set(offset::STATUS, &status.bits().to_le_bytes());
    }

    /// Changes bytes as the device itself does, whether or not the guest may write them. What lies
    /// behind the end is dropped.
    pub fn set(&mut self, at: u16, data: &[u8]) {
        for (byte, &new) in self.bytes.iter_mut().skip(usize::from(at)).zip(data) {
            *byte = new;
        }
    }

    /// The 16 bits at `at`, little-endian; all ones behind the end.
    pub fn u16_at(&self, at: u16) -> u16 {
        let mut data = [0; 2];
        self.read(at, &mut data);
        u16::from_le_bytes(data)
    }

    /// The 32 bits at `at`, little-endian; all ones behind the end.
    pub fn u32_at(&self, at: u16) -> u32 {
        let mut data = [0; 4];
        self.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    /// Goes back to the content after power-on.
    pub fn reset(&mut self) {
        self.bytes = self.power_on;
    }

    /// The whole content, for a checkpoint.
    pub fn save(&self) -> ConfigSpaceState {
        ConfigSpaceState {
            bytes: self.bytes.to_vec(),
        }
    }

    /// Takes over a saved content. It must be of a function with the same identity and layout: in
    /// all that neither the guest nor the function changes. Otherwise nothing changes.
    pub fn restore(&mut self, state: &ConfigSpaceState) -> Result<(), ConfigError> {
        self.bytes = self.check(state)?;
        Ok(())
    }

    /// The content, if it can be one of this function's.
    pub fn check(&self, state: &ConfigSpaceState) -> Result<[u8; CONFIG_SPACE_BYTES], ConfigError> {
        let bytes: [u8; CONFIG_SPACE_BYTES] = state
            .bytes
            .as_slice()
            .try_into()
            .map_err(|_| ConfigError::ForeignState)?;
        let status = usize::from(offset::STATUS)..usize::from(offset::STATUS) + 2;
        let interrupt = Status::INTERRUPT_STATUS.bits().to_le_bytes();
        let differs = bytes.iter().enumerate().any(|(at, byte)| {
            let mut changes = self.writable[at] | self.write_one_to_clear[at];
            if status.contains(&at) {
                changes |= interrupt[at - status.start];
            }
            (byte ^ self.power_on[at]) & !changes != 0
        });
        match differs {
            true => Err(ConfigError::ForeignState),
            false => Ok(bytes),
        }
    }

    fn init(&mut self, at: u16, data: &[u8]) {
        let start = usize::from(at);
        self.bytes[start..start + data.len()].copy_from_slice(data);
        self.power_on[start..start + data.len()].copy_from_slice(data);
    }

    fn init_writable(&mut self, at: u16, mask: &[u8]) {
        let start = usize::from(at);
        self.writable[start..start + mask.len()].copy_from_slice(mask);
    }
}

#[cfg(test)]
mod tests;
