//! Sequences of everything that can happen to a controller: accesses, descriptors in memory,
//! frames, carrier, time, checkpoints. For fuzzing and for tests with random histories.

use arbitrary::Arbitrary;

use super::bench::{Bench, MAC};
use super::regs::{self, ITR};
use super::ring::Ring;
use super::{BAR_IO, BAR_MEMORY, E1000Config, Error};
use crate::pci::PciFunction;
use crate::pci::config::{Command, offset};
use crate::wire::MAX_FRAME_BYTES;

/// Memory of a controller under exercise, in bytes. Rings and buffers are pointed into it mostly.
pub const MEMORY_BYTES: usize = 0x4_0000;
const TX_RING: u32 = 0x1000;
const RX_RING: u32 = 0x2000;
const BUFFERS: u64 = 0x8000;

/// Registers that do something, to be hit more often than by chance.
const REGISTERS: [u32; 38] = [
    regs::CTRL,
    regs::CTRL_EXT,
    regs::STATUS,
    regs::EECD,
    regs::EERD,
    regs::MDIC,
    regs::VET,
    regs::ICR,
    regs::ITR,
    regs::ICS,
    regs::IMS,
    regs::IMC,
    regs::RCTL,
    regs::TCTL,
    regs::PBA,
    regs::RDBAL,
    regs::RDBAH,
    regs::RDLEN,
    regs::RDH,
    regs::RDT,
    regs::RDTR,
    regs::RADV,
    regs::RSRPD,
    regs::TDBAL,
    regs::TDBAH,
    regs::TDLEN,
    regs::TDH,
    regs::TDT,
    regs::TIDV,
    regs::TADV,
    regs::TXDCTL,
    regs::RXCSUM,
    regs::MTA,
    regs::RA,
    regs::RA + 4,
    regs::VFTA,
    0x4074,
    0x408c,
];

/// One thing that happens.
#[derive(Debug, Clone, PartialEq, Eq, Arbitrary)]
pub enum Op {
    /// Sets rings up in memory, enables all units, brings the link up.
    Open {
        tx_count: u8,
        rx_count: u8,
        receive: u32,
        vlan_mode: bool,
    },
    /// Reads a register of those that do something.
    Read { register: u8 },
    /// Writes a register of those that do something.
    Write { register: u8, value: u32 },
    /// Writes a small value to one.
    WriteSmall { register: u8, value: u8 },
    /// Any access of register or I/O space.
    Access {
        io: bool,
        write: bool,
        offset: u32,
        data: [u8; 8],
        length: u8,
    },
    /// Writes configuration space.
    Config {
        offset: u8,
        data: [u8; 4],
        length: u8,
    },
    /// Reads a PHY register.
    ReadPhy { number: u8 },
    /// Writes a PHY register.
    WritePhy { number: u8, value: u16 },
    /// Puts any bytes behind the transmit tail, or at the receive tail.
    RawDescriptor { transmit: bool, bytes: [u8; 16] },
    /// Puts a data or legacy descriptor behind the transmit tail.
    Data {
        buffer: u16,
        length: u16,
        command: u8,
        popts: u8,
        special: u16,
        legacy: bool,
    },
    /// Puts a context descriptor behind the transmit tail.
    Context {
        fields: [u8; 8],
        paylen: u16,
        command: u8,
        header: u8,
        mss: u16,
    },
    /// Puts a buffer in the receive descriptor at the tail.
    Buffer { buffer: u16 },
    /// Gives the controller the descriptors that were put behind the transmit tail.
    Send,
    /// Gives the controller receive descriptors: so many from the head on.
    Refill { count: u8 },
    /// A frame comes over the wire.
    Deliver {
        destination: u8,
        ethertype: u8,
        length: u16,
        fill: u8,
    },
    /// The wire takes so many more frames; all if absent.
    Room { frames: Option<u8> },
    /// The cable is pulled or plugged in.
    Carrier { up: bool },
    /// Time passes.
    Advance { ns: u32 },
    /// The event loop comes by.
    Serve,
    /// The state is saved and taken back.
    Checkpoint,
    /// The bus is reset.
    Reset,
}

/// A controller under exercise with what it showed so far.
pub struct Exercise {
    bench: Bench,
    /// Descriptors behind the transmit tail.
    queued: u32,
    /// Everything that could be observed: values read, interrupt levels, frames sent.
    pub(super) seen: Vec<u8>,
}

impl Exercise {
    /// The controller.
    #[cfg(test)]
    pub(super) fn nic(&mut self) -> &mut dyn PciFunction {
        &mut self.bench.nic
    }

    /// A controller that was just powered on.
    pub fn new() -> Result<Self, Error> {
        let bench = Bench::new(MEMORY_BYTES, E1000Config::new(MAC))?;
        Ok(Self {
            bench,
            queued: 0,
            seen: Vec::new(),
        })
    }

    /// Another controller in the same state, with the same memory and the same frames under way.
    pub fn twin(&self) -> Result<Self, Error> {
        let mut memory = vec![0; MEMORY_BYTES];
        let bench = self.bench.twin(&mut memory)?;
        Ok(Self {
            bench,
            queued: self.queued,
            seen: Vec::new(),
        })
    }

    /// What was observed since this was asked last, and the memory.
    pub fn take_observations(&mut self) -> (Vec<u8>, Vec<u8>) {
        let mut memory = vec![0; MEMORY_BYTES];
        // Reading own memory cannot fail; if it did, the observations would differ.
        let _ = self.bench.dma.read(0, &mut memory);
        (std::mem::take(&mut self.seen), memory)
    }

    /// Reads everything that can be read.
    pub fn read_all(&mut self) {
        for (bar, bytes) in [(BAR_IO, 8), (BAR_MEMORY, 0xa000)] {
            let start = self.seen.len();
            self.seen.resize(start + bytes, 0);
            for (i, word) in self.seen[start..].chunks_mut(4).enumerate() {
                self.bench.nic.bar_read(bar, 4 * i as u64, word);
            }
        }
    }

    /// The bench that the controller is on.
    #[cfg(test)]
    pub(super) fn bench(&mut self) -> &mut Bench {
        &mut self.bench
    }

    /// State of the controller.
    pub fn state(&self) -> super::E1000State {
        self.bench.nic.save()
    }

    /// Lets `op` happen and checks what must always hold.
    ///
    /// # Panics
    ///
    /// When it does not hold.
    pub fn apply(&mut self, op: &Op) {
        self.happen(op);
        self.seen.push(u8::from(self.bench.interrupt()));
        let frames = std::mem::take(&mut self.bench.far_end().from_nic);
        for frame in frames {
            assert!(
                frame.len() <= MAX_FRAME_BYTES,
                "a frame of {} bytes was sent",
                frame.len()
            );
            self.seen
                .extend_from_slice(&(frame.len() as u32).to_le_bytes());
            self.seen.extend_from_slice(&frame);
        }
        self.check_interrupt();
    }

    /// The line is asserted only while there is a cause, and at once unless it is throttled.
    fn check_interrupt(&mut self) {
        let nic = &self.bench.nic;
        let (causes, mask) = nic.causes_and_mask();
        let pending = causes & mask != 0;
        let disabled = nic.config.command().contains(Command::INTERRUPT_DISABLE);
        let asserted = self.bench.interrupt();
        assert!(
            !asserted || pending && !disabled,
            "an interrupt without a cause"
        );
        if pending && !disabled && nic.regs.get(ITR) == 0 && nic.timers.is_idle() {
            assert!(asserted, "a cause without an interrupt");
        }
    }

    /// One arm for each operation: a flat table.
    #[expect(
        clippy::too_many_lines,
        reason = "a flat table: an arm for each operation"
    )]
    fn happen(&mut self, op: &Op) {
        let bench = &mut self.bench;
        let register = |index: &u8| REGISTERS[usize::from(*index) % REGISTERS.len()];
        match op {
            Op::Open {
                tx_count,
                rx_count,
                receive,
                vlan_mode,
            } => {
                let vlan = if *vlan_mode { regs::ctrl::VME } else { 0 };
                bench.nic.config_write(offset::COMMAND, &[0x07, 0x00]);
                for (register, value) in [
                    (regs::CTRL, regs::ctrl::SLU | vlan),
                    (regs::TDBAL, TX_RING),
                    (regs::TDBAH, 0),
                    (regs::TDLEN, (u32::from(tx_count % 8) + 1) * 128),
                    (regs::TDH, 0),
                    (regs::TDT, 0),
                    (regs::TCTL, regs::tctl::EN | regs::tctl::PSP),
                    (regs::RDBAL, RX_RING),
                    (regs::RDBAH, 0),
                    (regs::RDLEN, (u32::from(rx_count % 8) + 1) * 128),
                    (regs::RDH, 0),
                    (regs::RDT, 0),
                    (
                        regs::RCTL,
                        regs::rctl::EN | regs::rctl::BAM | receive & !0xc0,
                    ),
                    (regs::IMS, 0x9d),
                ] {
                    bench.write(register, value);
                }
            }
            Op::Read { register: index } => {
                let value = bench.read(register(index));
                self.seen.extend_from_slice(&value.to_le_bytes());
            }
            Op::Write {
                register: index,
                value,
            } => bench.write(register(index), *value),
            Op::WriteSmall {
                register: index,
                value,
            } => {
                bench.write(register(index), u32::from(*value));
            }
            Op::Access {
                io,
                write,
                offset,
                data,
                length,
            } => {
                let bar = if *io { BAR_IO } else { BAR_MEMORY };
                let offset = u64::from(if *io { offset & 0xf } else { offset & 0x1_ffff });
                let mut data = *data;
                let data = &mut data[..usize::from(length % 8) + 1];
                if *write {
                    bench.nic.bar_write(bar, offset, data);
                } else {
                    bench.nic.bar_read(bar, offset, data);
                    self.seen.extend_from_slice(data);
                }
            }
            Op::Config {
                offset,
                data,
                length,
            } => {
                let data = &data[..usize::from(length % 4) + 1];
                bench.nic.config_write(u16::from(*offset), data);
                let mut back = [0; 4];
                bench.nic.config_read(u16::from(*offset), &mut back);
                self.seen.extend_from_slice(&back);
            }
            Op::ReadPhy { number } => {
                let value = bench.read_phy(u32::from(number & 0x1f));
                self.seen.extend_from_slice(&value.to_le_bytes());
            }
            Op::WritePhy { number, value } => bench.write_phy(u32::from(number & 0x1f), *value),
            Op::RawDescriptor { transmit, bytes } => self.put(*transmit, *bytes),
            Op::Data {
                buffer,
                length,
                command,
                popts,
                special,
                legacy,
            } => {
                let (extended, kind) = if *legacy { (0, 0) } else { (0x20, 1 << 20) };
                let command = command & !0x20 | extended;
                // Mostly lengths that a packet can have.
                let length = if length & 0x8000 != 0 {
                    *length
                } else {
                    length % 1024
                };
                let lower = u32::from(command) << 24 | kind | u32::from(length);
                let upper = u32::from(*special) << 16 | u32::from(*popts) << 8;
                let address = BUFFERS + u64::from(*buffer);
                let bytes = u128::from(address) | u128::from(lower) << 64 | u128::from(upper) << 96;
                self.put(true, bytes.to_le_bytes());
            }
            Op::Context {
                fields,
                paylen,
                command,
                header,
                mss,
            } => {
                let lower = u32::from(command | 0x20) << 24 | u32::from(*paylen);
                let upper = u32::from(*mss) << 16 | u32::from(*header) << 8;
                let first = u128::from(u64::from_le_bytes(*fields));
                let bytes = first | u128::from(lower) << 64 | u128::from(upper) << 96;
                self.put(true, bytes.to_le_bytes());
            }
            Op::Buffer { buffer } => {
                let address = BUFFERS + u64::from(*buffer) * 3;
                self.put(false, u128::from(address).to_le_bytes());
            }
            Op::Send => {
                let ring = Ring::at(&bench.nic.regs, regs::TDBAL);
                let tail = (ring.tail + std::mem::take(&mut self.queued)) % ring.count.max(1);
                bench.write(regs::TDT, tail);
            }
            Op::Refill { count } => {
                let ring = Ring::at(&bench.nic.regs, regs::RDBAL);
                bench.write(
                    regs::RDT,
                    (ring.head + u32::from(*count)) % ring.count.max(1),
                );
            }
            Op::Deliver {
                destination,
                ethertype,
                length,
                fill,
            } => {
                // Mostly lengths that pass without RCTL.LPE.
                let limit = if length & 0x8000 != 0 {
                    MAX_FRAME_BYTES + 100
                } else {
                    1600
                };
                let length = usize::from(*length) % limit;
                let mut frame = vec![*fill; length];
                let address = match destination % 4 {
                    0 => [0xff; 6],
                    1 => MAC,
                    2 => [0x01, 0x80, 0xc2, 0, 0, 1],
                    _ => [*destination; 6],
                };
                let kinds: [[u8; 2]; 6] = [
                    [8, 0],
                    [0x86, 0xdd],
                    [0x81, 0],
                    [0x88, 8],
                    [8, 6],
                    [*ethertype; 2],
                ];
                let kind = kinds[usize::from(ethertype % 6)];
                for (at, byte) in (0..6).zip(address).chain((12..14).zip(kind)) {
                    if let Some(place) = frame.get_mut(at) {
                        *place = byte;
                    }
                }
                bench.deliver(&frame);
            }
            Op::Room { frames } => bench.far_end().room = frames.map(usize::from),
            Op::Carrier { up } => {
                bench.far_end().plugged_in = *up;
                bench.serve();
            }
            Op::Advance { ns } => bench.advance_ns(u64::from(*ns)),
            Op::Serve => bench.serve(),
            Op::Checkpoint => {
                let state = bench.nic.save();
                assert!(
                    bench.nic.restore(state.clone()).is_ok(),
                    "a saved state is refused"
                );
                assert_eq!(bench.nic.save(), state, "taking a state back changes it");
            }
            Op::Reset => bench.nic.reset(),
        }
    }

    /// Puts a descriptor behind the transmit tail or at the receive tail.
    fn put(&mut self, transmit: bool, bytes: [u8; 16]) {
        let (base, register) = if transmit {
            (TX_RING, regs::TDBAL)
        } else {
            (RX_RING, regs::RDBAL)
        };
        let ring = Ring::at(&self.bench.nic.regs, register);
        let mut index = ring.tail;
        if transmit {
            index += self.queued;
            self.queued = (self.queued + 1).min(63);
        }
        // Both rings are in memory; if they were not, the controller would find out.
        let index = index % ring.count.clamp(1, 64);
        let _ = self.bench.dma.write(u64::from(base + 16 * index), &bytes);
    }
}
