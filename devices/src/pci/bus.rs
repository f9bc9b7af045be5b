//! The PCI host bridge and bus 0: how the guest configures functions and where their base address
//! registers put them.
//!
//! Configuration space is reached by configuration mechanism #1 (ports 0xCF8 and 0xCFC, PCI Local
//! Bus 3.0, section 3.2.2.3.2) and by ECAM (PCI Express 3.0, section 7.2.2). The bus also does what
//! firmware would: it gives each base address register a place before the guest starts.
//!
//! What the guest does passes the function's edge ([`Edge`]); what the host does with the same
//! registers does not.
//!
//! Lock order: a function, then its list of mappings, then its areas, then a [`Bus`]. A [`Bus`]
//! holds no lock while it calls a function.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use vm_allocator::{AddressAllocator, AllocPolicy};

use super::areas::GuestSlots;
use super::config::{BAR_COUNT, Command, offset};
use super::{BarIndex, BarRange, BarSpace, PciFunction};
use crate::bus::{Bus, BusDevice, MappingId};
use crate::edge::Edge;
use bridge::HostBridge;
use windows::AreaPort;

/// A function as the bus and the event loop share it.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// Device numbers of a bus.
pub const SLOT_COUNT: u8 = 32;
/// Bytes of ECAM for one bus: 32 devices of 8 functions of 4 KiB.
pub const ECAM_BUS_BYTES: u64 = 1 << 20;
/// First of the eight ports of [`ConfigPorts`].
pub const CONFIG_PORTS: u64 = 0xcf8;
/// Number of ports of [`ConfigPorts`].
pub const CONFIG_PORTS_LEN: u64 = 8;

/// Bits of CONFIG_ADDRESS that can be set.
const CONFIG_ADDRESS_BITS: u32 = 0x80ff_fffc;

/// Why a function cannot be put on the bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("PCI slot {0} does not exist or is taken")]
pub struct SlotError(pub u8);

/// Address ranges `[start, end)` that base address registers are placed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// I/O ports.
    pub io: (u64, u64),
    /// Memory below 4 GiB.
    pub memory32: (u64, u64),
    /// Memory above 4 GiB, for 64-bit registers that do not fit below.
    pub memory64: (u64, u64),
}

struct Slot {
    /// Which function of all that the bus has had.
    serial: u64,
    function: SharedFunction,
    edge: Arc<Edge>,
    mapped: Mutex<Vec<(BarRange, MappingId)>>,
    /// It was taken out; an access that was under way maps nothing any more. Changes with the
    /// function locked.
    gone: AtomicBool,
}

impl Slot {
    fn new(serial: u64, function: SharedFunction, edge: Arc<Edge>) -> Self {
        Self {
            serial,
            function,
            edge,
            mapped: Mutex::new(Vec::new()),
            gone: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, dyn PciFunction + 'static> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bus 0 with its host bridge in slot 0.
pub struct PciBus {
    slots: RwLock<[Option<Arc<Slot>>; SLOT_COUNT as usize]>,
    /// How many functions were put here, the host bridge not counted.
    inserted: AtomicU64,
    io: Arc<Bus>,
    memory: Arc<Bus>,
    /// Where areas of base address registers that are memory are put.
    areas: Arc<AreaPort>,
    /// CONFIG_ADDRESS, the register at port 0xCF8.
    config_address: AtomicU32,
}

impl PciBus {
    /// A bus with a host bridge only. Base address registers are mapped into `io` and `memory`.
    pub fn new(io: Arc<Bus>, memory: Arc<Bus>) -> Self {
        let bus = Self {
            slots: RwLock::new([const { None }; SLOT_COUNT as usize]),
            inserted: AtomicU64::new(0),
            areas: Arc::new(AreaPort::new(&memory)),
            io,
            memory,
            config_address: AtomicU32::new(0),
        };
        let bridge = Slot::new(0, Arc::new(Mutex::new(HostBridge::new())), Arc::default());
        bus.slots.write().unwrap_or_else(PoisonError::into_inner)[0] = Some(Arc::new(bridge));
        bus
    }

    /// Has areas of base address registers that are memory put into `slots`; without, each access
    /// to them exits. The first one counts.
    pub fn put_areas_into(&self, slots: Arc<dyn GuestSlots>) {
        self.areas.set(slots);
    }

    /// Puts `function` into `slot` (1 to 31) as function 0 of that device.
    pub fn insert(&self, slot: u8, function: SharedFunction) -> Result<(), SlotError> {
        self.insert_at_edge(slot, function, Arc::default())
    }

    /// The same for a function whose edge, and so its interrupts, was there first.
    pub fn insert_at_edge(
        &self,
        slot: u8,
        function: SharedFunction,
        edge: Arc<Edge>,
    ) -> Result<(), SlotError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        match slots.get_mut(usize::from(slot)) {
            Some(entry @ None) => {
                let serial = self.inserted.fetch_add(1, Ordering::Relaxed) + 1;
                *entry = Some(Arc::new(Slot::new(serial, function, edge)));
                Ok(())
            }
            _ => Err(SlotError(slot)),
        }
    }

    /// Takes the function out of `slot`, with everything that it decodes.
    pub fn remove(&self, slot: u8) -> Option<SharedFunction> {
        let taken = {
            let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
            match slot {
                0 => None, // The host bridge stays.
                _ => slots.get_mut(usize::from(slot))?.take(),
            }
        }?;
        let function = taken.lock();
        taken.gone.store(true, Ordering::Relaxed);
        for area in function.areas() {
            area.take_out();
        }
        let mut mapped = taken.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        for (range, id) in mapped.drain(..) {
            self.bus_of(range.space).unmap(id);
        }
        Some(taken.function.clone())
    }

    /// CONFIG_ADDRESS, the register of configuration mechanism #1.
    pub fn config_address(&self) -> u32 {
        self.config_address.load(Ordering::Relaxed)
    }

    /// Sets CONFIG_ADDRESS.
    pub fn set_config_address(&self, address: u32) {
        self.config_address
            .store(address & CONFIG_ADDRESS_BITS, Ordering::Relaxed);
    }

    /// The functions in all slots but `slots`, in the order of slots.
    pub fn functions_except(&self, slots: &[u8]) -> Vec<SharedFunction> {
        (0..SLOT_COUNT)
            .filter(|other| !slots.contains(other))
            .filter_map(|other| self.slot(other))
            .map(|other| other.function.clone())
            .collect()
    }

    /// Numbers of the slots that are in use, the host bridge's included.
    pub fn occupied(&self) -> Vec<u8> {
        (0..SLOT_COUNT)
            .filter(|&slot| self.slot(slot).is_some())
            .collect()
    }

    /// The slots that are in use, each with the number of the function in it. No two functions of a
    /// bus have the same number, not even one after the other in the same slot.
    pub fn serials(&self) -> Vec<(u8, u64)> {
        (0..SLOT_COUNT)
            .filter_map(|slot| Some((slot, self.slot(slot)?.serial)))
            .collect()
    }

    /// Reads configuration space of function 0 in `slot`; all ones where there is none.
    pub fn config_read(&self, slot: u8, register: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(slot) = self.slot(slot) {
            slot.lock().config_read(register, data);
        }
    }

    /// Writes configuration space of function 0 in `slot` and moves what it decodes.
    pub fn config_write(&self, slot: u8, register: u16, data: &[u8]) {
        if let Some(slot) = self.slot(slot) {
            let mut function = slot.lock();
            function.config_write(register, data);
            self.remap(&slot, &*function);
        }
    }

    /// Reads configuration space as the guest does.
    fn guest_config_read(&self, slot: u8, register: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(slot) = self.slot(slot) {
            let mut function = slot.lock();
            let mut seen = slot.edge.around(&mut *function);
            seen.config_read(register, data);
        }
    }

    /// Writes configuration space as the guest does, and moves what it decodes.
    fn guest_config_write(&self, slot: u8, register: u16, data: &[u8]) {
        if let Some(slot) = self.slot(slot) {
            let mut function = slot.lock();
            let mut seen = slot.edge.around(&mut *function);
            seen.config_write(register, data);
            self.remap(&slot, &*function);
        }
    }

    /// Resets every function, as RST# does.
    pub fn reset(&self) {
        self.config_address.store(0, Ordering::Relaxed);
        for slot in (0..SLOT_COUNT).filter_map(|slot| self.slot(slot)) {
            let mut function = slot.lock();
            slot.edge.around(&mut *function).reset();
            self.remap(&slot, &*function);
        }
    }

    /// Gives every base address register a place in `windows` and leaves decoding off, as firmware
    /// does before it starts an operating system. `interrupt_line` says what to write into the
    /// interrupt line register of a slot whose function has the given pin (1 to 4).
    pub fn assign_resources(&self, windows: &Windows, interrupt_line: impl Fn(u8, u8) -> u8) {
        let mut places = Places::new(windows);
        for slot in self.occupied() {
            let command = self.read_u32(slot, offset::COMMAND) as u16;
            let decode = (Command::IO_SPACE | Command::MEMORY_SPACE).bits();
            self.config_write(slot, offset::COMMAND, &(command & !decode).to_le_bytes());
            let mut bar = 0;
            while usize::from(bar) < BAR_COUNT {
                bar += self.assign_bar(slot, bar, &mut places);
            }
            let mut pin = [0];
            self.config_read(slot, offset::INTERRUPT_PIN, &mut pin);
            if (1..=4).contains(&pin[0]) {
                let line = interrupt_line(slot, pin[0]);
                self.config_write(slot, offset::INTERRUPT_LINE, &[line]);
            }
        }
    }

    /// Places one base address register; gives how many registers it takes.
    fn assign_bar(&self, slot: u8, bar: BarIndex, places: &mut Places) -> u8 {
        let at = offset::BAR0 + 4 * u16::from(bar);
        self.config_write(slot, at, &[0xff; 4]);
        let low = self.read_u32(slot, at);
        if low == 0 {
            return 1;
        }
        if low & 1 == 1 {
            let size = u64::from(!((low | 0xffff_0000) & !0x3)) + 1;
            let place = places.take(BarSpace::Io, size);
            self.config_write(slot, at, &(place as u32).to_le_bytes());
            return 1;
        }
        if low & 0b110 != 0b100 {
            let size = u64::from(!(low & !0xf)) + 1;
            let place = places.take(BarSpace::Memory32, size);
            self.config_write(slot, at, &(place as u32).to_le_bytes());
            return 1;
        }
        self.config_write(slot, at + 4, &[0xff; 4]);
        let mask = u64::from(self.read_u32(slot, at + 4)) << 32 | u64::from(low & !0xf);
        let place = places.take(BarSpace::Memory64, (!mask).wrapping_add(1));
        self.config_write(slot, at, &(place as u32).to_le_bytes());
        self.config_write(slot, at + 4, &((place >> 32) as u32).to_le_bytes());
        2
    }

    fn read_u32(&self, slot: u8, register: u16) -> u32 {
        let mut data = [0; 4];
        self.config_read(slot, register, &mut data);
        u32::from_le_bytes(data)
    }

    fn slot(&self, slot: u8) -> Option<Arc<Slot>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(usize::from(slot))?.clone()
    }

    fn bus_of(&self, space: BarSpace) -> &Bus {
        match space {
            BarSpace::Io => &self.io,
            BarSpace::Memory32 | BarSpace::Memory64 => &self.memory,
        }
    }
}

/// Free room in the windows, while resources are assigned.
struct Places {
    io: Option<AddressAllocator>,
    memory32: Option<AddressAllocator>,
    memory64: Option<AddressAllocator>,
}

impl Places {
    fn new(windows: &Windows) -> Self {
        let allocator =
            |(start, end): (u64, u64)| AddressAllocator::new(start, end.checked_sub(start)?).ok();
        Self {
            io: allocator(windows.io),
            memory32: allocator(windows.memory32),
            memory64: allocator(windows.memory64),
        }
    }

    /// An address for a register of `size` bytes, or 0 (not decoded) where there is no room.
    fn take(&mut self, space: BarSpace, size: u64) -> u64 {
        let choices = match space {
            BarSpace::Io => [&mut self.io, &mut None],
            BarSpace::Memory32 => [&mut self.memory32, &mut None],
            BarSpace::Memory64 => [&mut self.memory32, &mut self.memory64],
        };
        // Registers smaller than a page get one of their own, so that each can be mapped alone.
        let align = if space == BarSpace::Io {
            size
        } else {
            size.max(0x1000)
        };
        for allocator in choices.into_iter().flatten() {
            if let Ok(range) = allocator.allocate(align, align, AllocPolicy::FirstMatch) {
                return range.start();
            }
        }
        tracing::warn!(?space, size, "no room for a PCI base address register");
        0
    }
}

/// Configuration mechanism #1: map at [`CONFIG_PORTS`].
pub struct ConfigPorts(pub Arc<PciBus>);

impl ConfigPorts {
    /// Slot and register that CONFIG_ADDRESS selects, with the port's own offset, if it is enabled
    /// and selects function 0 of a device on bus 0.
    fn target(&self, port: u64) -> Option<(u8, u16)> {
        let address = self.0.config_address.load(Ordering::Relaxed);
        let selected = address >> 31 == 1 && address & 0x00ff_0700 == 0;
        let register = (address & 0xfc) as u16 + (port & 3) as u16;
        selected.then_some(((address >> 11 & 0x1f) as u8, register))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, port: u64, data: &mut [u8]) {
        data.fill(0xff);
        match (port, data.len()) {
            (0, 4) => {
                let address = self.0.config_address.load(Ordering::Relaxed);
                data.copy_from_slice(&address.to_le_bytes());
            }
            (4..8, _) => {
                if let Some((slot, register)) = self.target(port) {
                    self.0.guest_config_read(slot, register, data);
                }
            }
            // Only a 32-bit access reaches CONFIG_ADDRESS.
            _ => {}
        }
    }

    fn write(&self, port: u64, data: &[u8]) {
        match (port, data) {
            (0, &[a, b, c, d]) => {
                self.0.set_config_address(u32::from_le_bytes([a, b, c, d]));
            }
            (4..8, _) => {
                if let Some((slot, register)) = self.target(port) {
                    self.0.guest_config_write(slot, register, data);
                }
            }
            _ => {}
        }
    }
}

/// ECAM of bus 0: map [`ECAM_BUS_BYTES`] of memory.
pub struct Ecam(pub Arc<PciBus>);

/// Slot and register of an ECAM offset; `None` for functions other than 0.
fn ecam_target(offset: u64) -> Option<(u8, u16)> {
    let function_zero = offset < ECAM_BUS_BYTES && offset >> 12 & 7 == 0;
    function_zero.then_some(((offset >> 15) as u8, (offset & 0xfff) as u16))
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((slot, register)) = ecam_target(offset) {
            self.0.guest_config_read(slot, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = ecam_target(offset) {
            self.0.guest_config_write(slot, register, data);
        }
    }
}

mod bridge;
mod power;
mod state;
#[cfg(test)]
mod tests;
mod windows;

pub use power::PowerState;
pub use state::{BusStateError, FunctionStates};
