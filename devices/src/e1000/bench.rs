//! A controller on a bench: its own memory, a wire whose other end the caller holds, an interrupt
//! line that counts, and a clock that the caller moves. For tests and fuzzing.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::dma::GuestMemory;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{BAR_MEMORY, E1000, E1000Config, Error};
use crate::dma::DmaSpace;
use crate::irq::IrqLine;
use crate::pci::PciFunction;
use crate::pci::config::offset;
use crate::wire::{SendOutcome, Wire, WritableFd, WritableSignal};

/// Address in the EEPROM of a controller on the bench.
pub const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0xc0, 0xff, 0xee];

/// The far end of the wire.
#[derive(Debug, Default)]
pub struct FarEnd {
    /// Frames on their way to the controller.
    pub to_nic: VecDeque<Vec<u8>>,
    /// Frames that the controller sent.
    pub from_nic: Vec<Vec<u8>>,
    /// Frames that the wire takes before it is full; unlimited if absent.
    pub room: Option<usize>,
    /// Whether the cable is plugged in.
    pub plugged_in: bool,
    /// What the wire knows of that: it looks when it finds no frame, as a TAP does.
    pub carrier: bool,
    /// Every change of the controller's own link that was to be seen.
    pub nic_link: Vec<bool>,
}

struct BenchWire {
    far_end: Arc<Mutex<FarEnd>>,
    /// Never signals: the bench calls the controller itself.
    fd: EventFd,
}

fn lock(far_end: &Mutex<FarEnd>) -> MutexGuard<'_, FarEnd> {
    far_end.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wire for BenchWire {
    fn send(&mut self, frame: &[u8]) -> SendOutcome {
        let mut far_end = lock(&self.far_end);
        if !far_end.plugged_in {
            far_end.carrier = false;
            return SendOutcome::Dropped;
        }
        match &mut far_end.room {
            Some(0) => return SendOutcome::Full,
            Some(room) => *room -= 1,
            None => {}
        }
        far_end.from_nic.push(frame.to_vec());
        SendOutcome::Sent
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let mut far_end = lock(&self.far_end);
        let Some(frame) = far_end.to_nic.pop_front() else {
            far_end.carrier = far_end.plugged_in;
            return None;
        };
        buffer.get_mut(..frame.len())?.copy_from_slice(&frame);
        Some(frame.len())
    }

    fn carrier(&self) -> bool {
        lock(&self.far_end).carrier
    }

    fn nic_link(&mut self, up: bool) {
        lock(&self.far_end).nic_link.push(up);
    }

    fn readable_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn writable_fd(&self) -> Option<WritableFd> {
        Some(WritableFd {
            fd: self.fd.as_raw_fd(),
            signal: WritableSignal::Out,
        })
    }
}

/// An interrupt line that remembers.
#[derive(Debug, Default)]
pub struct BenchLine {
    asserted: AtomicBool,
    changes: AtomicU32,
}

impl BenchLine {
    /// Level of the line.
    pub fn asserted(&self) -> bool {
        self.asserted.load(Ordering::Relaxed)
    }

    /// How often it was driven.
    pub fn changes(&self) -> u32 {
        self.changes.load(Ordering::Relaxed)
    }
}

impl IrqLine for BenchLine {
    fn set_level(&self, asserted: bool) {
        self.asserted.store(asserted, Ordering::Relaxed);
        self.changes.fetch_add(1, Ordering::Relaxed);
    }
}

/// The bench.
pub struct Bench {
    /// The controller.
    pub nic: E1000,
    /// Its memory.
    pub dma: DmaSpace,
    /// Other end of its wire.
    pub far_end: Arc<Mutex<FarEnd>>,
    line: Arc<BenchLine>,
}

impl Bench {
    /// A controller with `memory_bytes` of memory at address 0, bus mastering and both spaces
    /// enabled, the cable plugged in.
    pub fn new(memory_bytes: usize, config: E1000Config) -> Result<Self, Error> {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), memory_bytes)])
            .map_err(|error| Error::Descriptor(std::io::Error::other(error)))?;
        let dma = DmaSpace::new(Arc::new(memory));
        let far_end = Arc::new(Mutex::new(FarEnd {
            plugged_in: true,
            carrier: true,
            ..FarEnd::default()
        }));
        let line = Arc::new(BenchLine::default());
        let wire = BenchWire {
            far_end: far_end.clone(),
            fd: EventFd::new(0)?,
        };
        let mut nic = E1000::with_clock(config, dma.clone(), line.clone(), Box::new(wire), true)?;
        nic.config_write(offset::COMMAND, &[0x07, 0x00]);
        Ok(Self {
            nic,
            dma,
            far_end,
            line,
        })
    }

    /// A bench with a controller in the same state, the same memory (copied through `memory`, which
    /// has its size) and the same frames under way.
    pub fn twin(&self, memory: &mut [u8]) -> Result<Self, Error> {
        let mut twin = Self::new(memory.len(), E1000Config::new(MAC))?;
        let copied = self.dma.read(0, memory);
        copied
            .and_then(|()| twin.dma.write(0, memory))
            .map_err(std::io::Error::other)?;
        {
            let (ours, mut theirs) = (self.far_end(), twin.far_end());
            theirs.to_nic = ours.to_nic.clone();
            theirs.room = ours.room;
            theirs.plugged_in = ours.plugged_in;
            theirs.carrier = ours.carrier;
        }
        twin.nic.restore(self.nic.save())?;
        Ok(twin)
    }

    /// Reads a register.
    pub fn read(&mut self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.nic
            .bar_read(BAR_MEMORY, u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn write(&mut self, register: u32, value: u32) {
        self.nic
            .bar_write(BAR_MEMORY, u64::from(register), &value.to_le_bytes());
    }

    /// Sets bits of a register.
    pub fn set_bits(&mut self, register: u32, bits: u32) {
        let value = self.read(register);
        self.write(register, value | bits);
    }

    /// Reads a PHY register through MDIC.
    pub fn read_phy(&mut self, number: u32) -> u16 {
        self.write(0x20, 1 << 21 | 2 << 26 | number << 16);
        self.read(0x20) as u16
    }

    /// Writes a PHY register through MDIC.
    pub fn write_phy(&mut self, number: u32, value: u16) {
        self.write(0x20, 1 << 21 | 1 << 26 | number << 16 | u32::from(value));
    }

    /// Level of the interrupt line.
    pub fn interrupt(&self) -> bool {
        self.line.asserted()
    }

    /// How often the line was driven.
    pub fn line_changes(&self) -> u32 {
        self.line.changes()
    }

    /// The far end of the wire, locked.
    pub fn far_end(&self) -> MutexGuard<'_, FarEnd> {
        lock(&self.far_end)
    }

    /// Puts a frame on the wire towards the controller.
    pub fn deliver(&mut self, frame: &[u8]) {
        self.far_end().to_nic.push_back(frame.to_vec());
        self.serve();
    }

    /// Lets the controller do what the event loop would have it do, until it has nothing to do.
    pub fn serve(&mut self) {
        self.nic.serve();
        for _ in 0..64 {
            if !self.nic.kicked {
                break;
            }
            self.nic.serve();
        }
    }

    /// Moves the clock, then as [`Bench::serve`].
    pub fn advance_ns(&mut self, ns: u64) {
        self.nic.timers.advance(ns);
        self.serve();
    }
}
