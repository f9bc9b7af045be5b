//! Whatever a guest stores in configuration space, by both mechanisms, while functions come, go and
//! are reset: what a function decodes is answered for, and nothing else is but configuration space.

use std::sync::{Arc, Mutex};

use arbitrary::{Arbitrary, Unstructured};
use devices::bus::Bus;
use devices::pci::bus::{
    CONFIG_PORTS, CONFIG_PORTS_LEN, ConfigPorts, ECAM_BUS_BYTES, Ecam, PciBus, Windows,
};
use devices::pci::config::{ConfigSpace, InterruptPin, PciIdentity};
use devices::pci::{BarIndex, BarRange, BarSpace, PciFunction};

const WINDOWS: Windows = Windows {
    io: (0x1000, 0x1_0000),
    memory32: (0xc000_0000, 0xc100_0000),
    memory64: (1 << 36, 1 << 37),
};
const ECAM: u64 = 0xf000_0000;
/// Most that an input does.
const STEPS: usize = 200;
/// Slots that functions are in, the bridge's not counted.
const SLOTS: u8 = 4;

#[derive(Arbitrary)]
enum Step {
    /// CONFIG_ADDRESS and CONFIG_DATA, or whatever is in these ports.
    Port {
        offset: u8,
        bytes: u8,
        value: u32,
    },
    Ecam {
        slot: u8,
        register: u16,
        bytes: u8,
        value: u32,
    },
    /// The command register or a base address register of a function.
    Place {
        slot: u8,
        register: u8,
        value: u32,
    },
    Memory {
        address: u64,
        write: bool,
    },
    Io {
        port: u16,
        write: bool,
    },
    Assign,
    Remove {
        slot: u8,
    },
    Insert {
        slot: u8,
        kind: u8,
    },
    Reset,
}

/// A function with base address registers, which answers with their numbers.
struct Card(ConfigSpace);

impl Card {
    fn new(kind: u8) -> Self {
        let mut config = ConfigSpace::new(PciIdentity {
            vendor_id: 0x1234,
            device_id: 0x5678,
            revision_id: 0,
            class_code: 0xff_0000,
            subsystem_vendor_id: 0,
            subsystem_id: 0,
        });
        config.set_interrupt_pin(InterruptPin::A);
        let bars: &[(BarIndex, BarSpace, u64)] = match kind % 4 {
            0 => &[(0, BarSpace::Memory32, 0x1000), (1, BarSpace::Io, 0x20)],
            1 => &[(0, BarSpace::Memory64, 1 << 20), (2, BarSpace::Io, 0x100)],
            2 => &[(4, BarSpace::Memory64, 1 << 33)],
            _ => &[],
        };
        for (bar, space, size) in bars {
            config.add_bar(*bar, *space, *size).expect("it has room");
        }
        Self(config)
    }
}

impl PciFunction for Card {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.0.write(offset, data);
    }
    fn decoded(&self) -> Vec<BarRange> {
        self.0.decoded()
    }
    fn bar_read(&mut self, bar: BarIndex, _offset: u64, data: &mut [u8]) {
        data.fill(bar);
    }
    fn bar_write(&mut self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}
    fn reset(&mut self) {
        self.0.reset();
    }
}

struct Machine {
    io: Arc<Bus>,
    memory: Arc<Bus>,
    pci: Arc<PciBus>,
    /// What was inserted where.
    cards: [Option<Arc<Mutex<Card>>>; SLOTS as usize],
}

impl Machine {
    fn new() -> Self {
        let (io, memory) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let pci = Arc::new(PciBus::new(io.clone(), memory.clone()));
        let ports = Arc::new(ConfigPorts(pci.clone()));
        io.map(CONFIG_PORTS, CONFIG_PORTS_LEN, ports)
            .expect("they are free");
        let ecam = Arc::new(Ecam(pci.clone()));
        memory.map(ECAM, ECAM_BUS_BYTES, ecam).expect("it is free");
        Self {
            io,
            memory,
            pci,
            cards: [const { None }; SLOTS as usize],
        }
    }

    fn step(&mut self, step: Step) {
        let size = |bytes: u8| [1, 2, 4][usize::from(bytes % 3)];
        match step {
            Step::Port {
                offset,
                bytes,
                value,
            } => {
                let (port, bytes) = (CONFIG_PORTS + u64::from(offset % 8), size(bytes));
                self.io.write(port, &value.to_le_bytes()[..bytes]);
                self.io.read(port, &mut [0; 4][..bytes]);
            }
            Step::Ecam {
                slot,
                register,
                bytes,
                value,
            } => {
                let at = ECAM + (u64::from(slot % 32) << 15) + u64::from(register);
                self.memory.write(at, &value.to_le_bytes()[..size(bytes)]);
                self.memory.read(at, &mut [0; 4][..size(bytes)]);
            }
            Step::Place {
                slot,
                register,
                value,
            } => {
                let register = [4, 0x10, 0x14, 0x18, 0x20, 0x24][usize::from(register % 6)];
                self.pci
                    .config_write(1 + slot % SLOTS, register, &value.to_le_bytes());
            }
            Step::Memory {
                address,
                write: true,
            } => drop(self.memory.write(address, &[0; 4])),
            Step::Memory { address, .. } => drop(self.memory.read(address, &mut [0; 4])),
            Step::Io { port, write: true } => drop(self.io.write(port.into(), &[0; 4])),
            Step::Io { port, .. } => drop(self.io.read(port.into(), &mut [0; 4])),
            Step::Assign => self.pci.assign_resources(&WINDOWS, |slot, _| slot),
            Step::Remove { slot } => {
                let slot = slot % SLOTS;
                let there = self.cards[usize::from(slot)].take().is_some();
                assert_eq!(self.pci.remove(1 + slot).is_some(), there);
            }
            Step::Insert { slot, kind } => {
                let slot = slot % SLOTS;
                let card = Arc::new(Mutex::new(Card::new(kind)));
                let place = &mut self.cards[usize::from(slot)];
                assert_eq!(
                    self.pci.insert(1 + slot, card.clone()).is_ok(),
                    place.is_none()
                );
                place.get_or_insert(card);
            }
            Step::Reset => self.pci.reset(),
        }
    }

    fn decoded(&self) -> Vec<BarRange> {
        let cards = self.cards.iter().flatten();
        cards
            .flat_map(|card| card.lock().expect("nobody panicked with it").decoded())
            .collect()
    }

    /// The last byte of what is decoded is answered for: by this function, or by who was there
    /// before it.
    fn check(&self) {
        for range in self.decoded() {
            let last = range.address + (range.size_bytes - 1);
            let bus = match range.space {
                BarSpace::Io => &self.io,
                BarSpace::Memory32 | BarSpace::Memory64 => &self.memory,
            };
            assert!(bus.read(last, &mut [0]), "nobody answers at {last:#x}");
        }
    }
}

/// One input.
pub fn run(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let mut machine = Machine::new();
    for slot in 0..SLOTS {
        machine.step(Step::Insert { slot, kind: slot });
    }
    machine.step(Step::Assign);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(&mut input) else {
            break;
        };
        machine.step(step);
        machine.check();
    }
    for slot in 0..SLOTS {
        machine.step(Step::Remove { slot });
    }
    assert_eq!(machine.pci.occupied(), [0], "the bridge alone is left");
    for at in [WINDOWS.memory32.0, WINDOWS.memory64.0] {
        assert!(
            !machine.memory.read(at, &mut [0]),
            "somebody answers at {at:#x}"
        );
    }
}
