//! A device of registers with the behaviour that matters of an 82574L, in place of a function of
//! the host.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use devices::pci::BarIndex;
use devices::pci::config::CONFIG_SPACE_BYTES;
use devices::pci::registers::{Description, RegisterAccess};
use devices::vfio::dma::{Batch, DmaMemory};
use devices::vfio::error::VfioError;
use devices::vfio::passed::hardware::{Hardware, Interrupts};
use devices::vfio::passed::kind::Kind;
use devices::vfio::passed::opened::Shape;
use recovery::switch::Step;
use vmm_sys_util::eventfd::EventFd;

pub const CTRL: u32 = 0;
pub const STATUS: u32 = 8;
pub const EEC: u32 = 0x10;
pub const EERD: u32 = 0x14;
pub const MDIC: u32 = 0x20;
pub const ICR: u32 = 0xc0;
pub const ICS: u32 = 0xc8;
pub const IMS: u32 = 0xd0;
pub const IMC: u32 = 0xd8;
pub const EIAC: u32 = 0xdc;
pub const IVAR: u32 = 0xe4;
pub const RCTL: u32 = 0x100;
pub const TCTL: u32 = 0x400;
pub const RDBAL: u32 = 0x2800;
pub const RDLEN: u32 = 0x2808;
pub const RDH: u32 = 0x2810;
pub const RDT: u32 = 0x2818;
pub const TDT: u32 = 0x3818;
pub const MPC: u32 = 0x4010;
pub const GPTC: u32 = 0x4080;
pub const RAL: u32 = 0x5400;
pub const RAH: u32 = 0x5404;
pub const RESET: u32 = 1 << 26;
const MASTER_DISABLE: u32 = 1 << 2;
const MASTER_STATUS: u32 = 1 << 19;
const VECTORS: u8 = 5;
/// The first cause that has a vector, RxQ0, and the one for what was sent, TxQ0.
const FIRST_CAUSE: u32 = 20;
pub const TXQ0: u32 = 1 << 22;
const ENABLE: u32 = 2;

/// Where interrupts go.
#[derive(Debug, Default, PartialEq, Eq, Clone, Copy)]
pub enum Goes {
    #[default]
    Nowhere,
    Line,
    Messages(usize),
}

#[derive(Default)]
pub struct State {
    pub registers: BTreeMap<u32, u32>,
    phy: [u16; 32],
    pub masters: bool,
    pub mapped: u64,
    /// Bytes of all memory of whoever it was given memory of last, by which that one is told.
    pub user: u64,
    /// How often it was given a part of its user's memory before it went on.
    pub mapped_in_part: usize,
    pub goes: Goes,
    events: Vec<EventFd>,
    /// What makes this step fail: it does not stand still, its PHY does not answer, memory is not
    /// taken away or not given, a register holds nothing, interrupts cannot be set.
    pub fails: Option<Step>,
    /// The host takes no memory away from it.
    pub keeps_memory: bool,
    /// Whoever gives it memory has reset it before.
    pub is_blank_when_mapped: bool,
    /// The host cannot reset it.
    pub cannot_be_reset: bool,
    /// Its resets by the host fail.
    pub fails_to_reset: bool,
    /// Each move of the transmit tail while it could be followed.
    pub sent: Vec<u32>,
    pub resets: usize,
    /// How often it was told to master the bus no more.
    pub stood_still: usize,
    /// A reset brings back its address, and nothing else, as in QEMU's device.
    pub resets_in_part: bool,
    /// Done once, when it is given memory: in the middle of a switch, in which nobody has the turn.
    pub amid: Option<Box<dyn FnOnce() + Send>>,
}

impl State {
    pub fn get(&self, offset: u32) -> u32 {
        self.registers.get(&offset).copied().unwrap_or(0)
    }

    /// The station address that it has.
    pub fn address(&self) -> [u8; 6] {
        let [a, b, c, d] = self.get(RAL).to_le_bytes();
        let [e, f, ..] = self.get(RAH).to_le_bytes();
        [a, b, c, d, e, f]
    }

    /// It can neither reach memory nor interrupt.
    pub fn is_silent(&self) -> bool {
        !self.masters && self.mapped == 0 && self.goes == Goes::Nowhere
    }

    fn reset(&mut self) {
        self.resets += 1;
        if !self.resets_in_part {
            self.registers.clear();
        }
        // The address that it was made with.
        self.registers.insert(RAL, 0x4433_2211);
        self.registers.insert(RAH, 0x8000_6655);
    }

    /// Sends what the tail says, if it may, and says so by an interrupt.
    fn transmit(&mut self, tail: u32) {
        if self.masters && self.mapped > 0 && self.get(TCTL) & ENABLE != 0 {
            self.sent.push(tail);
            *self.registers.entry(ICR).or_default() |= TXQ0;
            self.interrupt();
        }
    }

    /// Each message that is due goes, and its cause masks itself.
    fn interrupt(&mut self) {
        let due = self.get(ICR) & self.get(IMS) & self.get(EIAC);
        for (number, event) in self.events.iter().enumerate() {
            if due >> FIRST_CAUSE >> number & 1 != 0 {
                event.write(1).unwrap();
            }
        }
        *self.registers.entry(ICR).or_default() &= !due;
        *self.registers.entry(IMS).or_default() &= !due;
    }

    fn refuse(&self, fails: Step, what: &'static str) -> Result<(), VfioError> {
        match self.fails == Some(fails) {
            true => Err(VfioError::Host {
                what,
                source: io::Error::other("injected"),
            }),
            false => Ok(()),
        }
    }
}

/// The device; clones are the same one.
#[derive(Clone, Default)]
pub struct Device(Arc<Mutex<State>>);

impl Device {
    /// It, and what is known of it.
    pub fn new() -> (Self, Kind, Box<dyn Hardware>) {
        let (device, shape) = Self::with_shape();
        let description = Description::intel_82574l().unwrap();
        let hardware = Box::new(device.clone());
        let (kind, hardware) = Kind::of(hardware, description, shape).unwrap();
        (device, kind, hardware)
    }

    /// It, and how it looks.
    pub fn with_shape() -> (Self, Shape) {
        let device = Self::default();
        device.lock().reset();
        let mut bytes = [0; CONFIG_SPACE_BYTES];
        bytes[..4].copy_from_slice(&[0x86, 0x80, 0xd3, 0x10]);
        // Capabilities; class; pin.
        bytes[6] = 0x10;
        bytes[0xb] = 2;
        bytes[0x34] = 0xa0;
        bytes[0x3d] = 1;
        // MSI-X, in base address register 3.
        bytes[0xa0..0xac].copy_from_slice(&[0x11, 0, VECTORS - 1, 0, 3, 0, 0, 0, 3, 0x20, 0, 0]);
        let shape = Shape {
            address: "0000:00:02.0".parse().unwrap(),
            bytes,
            bars: [0x20000, 0, 0, 0x4000, 0, 0],
            has_pin: true,
        };
        (device, shape)
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl RegisterAccess for Device {
    fn load(&mut self, offset: u32) -> u32 {
        let mut state = self.lock();
        match offset {
            STATUS => {
                let stops = state.get(CTRL) & MASTER_DISABLE != 0;
                let restless = state.fails == Some(Step::Quiesce);
                0x2 | if stops && !restless { 0 } else { MASTER_STATUS }
            }
            EEC => 1 << 9,
            // Reading clears.
            ICR | 0x4000..0x4128 => state.registers.remove(&offset).unwrap_or(0),
            _ => state.get(offset),
        }
    }

    fn store(&mut self, offset: u32, value: u32) {
        let mut state = self.lock();
        match offset {
            CTRL if value & RESET != 0 => state.reset(),
            IMS => {
                *state.registers.entry(IMS).or_default() |= value;
                state.interrupt();
            }
            IMC => *state.registers.entry(IMS).or_default() &= !value,
            ICS => {
                *state.registers.entry(ICR).or_default() |= value;
                state.interrupt();
            }
            ICR => *state.registers.entry(ICR).or_default() &= !value,
            EERD => {
                state.registers.insert(EERD, value & !1 | 2);
            }
            MDIC => {
                let register = (value >> 16 & 31) as usize;
                if value & 1 << 26 != 0 {
                    state.phy[register] = value as u16;
                }
                let failed = state.fails == Some(Step::Save);
                let end = if failed { 1 << 30 } else { 1 << 28 };
                let answer = end | value & 0x03ff_0000 | u32::from(state.phy[register]);
                state.registers.insert(MDIC, answer);
            }
            RDBAL if state.fails == Some(Step::Load) => {}
            _ => {
                let before = state.registers.insert(offset, value).unwrap_or(0);
                let begins = offset == TCTL && !before & value & ENABLE != 0;
                if offset == TDT || begins {
                    let tail = state.get(TDT);
                    state.transmit(tail);
                }
            }
        }
    }

    fn load_config(&mut self, _offset: u16, data: &mut [u8]) {
        let identity = [0x86, 0x80, 0xd3, 0x10];
        data.fill(0);
        let bytes = data.len().min(4);
        data[..bytes].copy_from_slice(&identity[..bytes]);
    }

    fn store_config(&mut self, _offset: u16, _data: &[u8]) {}
}

/// Bytes of ranges.
fn total(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

impl Hardware for Device {
    fn read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match (bar, <&mut [u8; 4]>::try_from(data)) {
            (0, Ok(data)) => {
                *data = self.load(offset as u32).to_le_bytes();
                Ok(())
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) -> io::Result<()> {
        match (bar, <[u8; 4]>::try_from(data)) {
            (0, Ok(data)) => {
                self.store(offset as u32, u32::from_le_bytes(data));
                Ok(())
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn set_master(&mut self, masters: bool) -> Result<(), VfioError> {
        let mut state = self.lock();
        state.stood_still += usize::from(state.masters && !masters);
        state.masters = masters;
        Ok(())
    }

    fn map(&mut self, memory: &DmaMemory, near: Option<&[Range<u64>]>) -> Result<(), VfioError> {
        let amid = self.lock().amid.take();
        if let Some(amid) = amid {
            amid();
        }
        let mut state = self.lock();
        state.refuse(Step::Map, "map")?;
        if state.keeps_memory && state.mapped > 0 {
            return Err(VfioError::Host {
                what: "unmap before a map",
                source: io::Error::other("injected"),
            });
        }
        let blank = state.get(RDBAL) == 0;
        assert!(blank || !state.is_blank_when_mapped, "not reset");
        assert!(!state.masters, "memory is given to a device that runs");
        state.user = memory.bytes();
        state.mapped = near.map_or(memory.bytes(), total);
        state.mapped_in_part += usize::from(near.is_some());
        Ok(())
    }

    fn map_more(
        &mut self,
        memory: &DmaMemory,
        near: Option<&[Range<u64>]>,
        batch: Batch,
    ) -> Result<Option<u64>, VfioError> {
        let mut state = self.lock();
        if near.is_some() {
            return Ok(None);
        }
        state.refuse(Step::Complete, "map the rest")?;
        state.mapped = memory.bytes();
        // There was one piece of it, and another one.
        Ok((batch.from == 0).then_some(1))
    }

    fn unmap_far(&mut self, near: &[Range<u64>], batch: Batch) -> Result<Option<u64>, VfioError> {
        let mut state = self.lock();
        assert!(state.masters, "the device stands still already");
        state.refuse(Step::Prepare, "unmap ahead")?;
        state.mapped = total(near);
        Ok((batch.from == 0).then_some(1))
    }

    fn unmap(&mut self) -> Result<(), VfioError> {
        let mut state = self.lock();
        assert!(!state.masters, "memory is taken from a device that runs");
        // The second time, when it is silenced, it is done.
        let fails = state.fails.take_if(|fails| *fails == Step::Unmap);
        if fails.is_some() || state.keeps_memory && state.mapped > 0 {
            return Err(VfioError::Host {
                what: "unmap",
                source: io::Error::other("injected"),
            });
        }
        state.mapped = 0;
        Ok(())
    }

    fn mapped_bytes(&self) -> u64 {
        self.lock().mapped
    }

    fn set_interrupts(&mut self, to: Interrupts) -> io::Result<()> {
        let mut state = self.lock();
        state.goes = match to {
            Interrupts::Off => Goes::Nowhere,
            _ if state.fails == Some(Step::Resume) => {
                state.goes = Goes::Nowhere;
                return Err(io::Error::other("injected"));
            }
            Interrupts::Line(_) => Goes::Line,
            Interrupts::Messages(events) => {
                state.events = events;
                Goes::Messages(state.events.len())
            }
        };
        if !matches!(state.goes, Goes::Messages(_)) {
            state.events.clear();
        }
        Ok(())
    }

    fn can_reset(&self) -> bool {
        !self.lock().cannot_be_reset
    }

    fn reset(&mut self) -> io::Result<()> {
        let mut state = self.lock();
        if state.fails_to_reset {
            return Err(io::Error::other("injected"));
        }
        state.reset();
        Ok(())
    }
}
