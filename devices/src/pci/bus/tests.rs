use proptest::prelude::*;

use super::*;
use crate::pci::config::{ConfigSpace, InterruptPin, PciIdentity};

const WINDOWS: Windows = Windows {
    io: (0x1000, 0x1_0000),
    memory32: (0xc000_0000, 0xc100_0000),
    memory64: (1 << 36, 1 << 37),
};

/// Reads give the index of the register; writes are remembered.
struct Card {
    config: ConfigSpace,
    writes: Vec<(BarIndex, u64, Vec<u8>)>,
}

impl Card {
    fn new(bars: &[(BarIndex, BarSpace, u64)]) -> Arc<Mutex<Self>> {
        let mut config = ConfigSpace::new(PciIdentity {
            vendor_id: 0x1234,
            device_id: 0x5678,
            revision_id: 0,
            class_code: 0xff_0000,
            subsystem_vendor_id: 0,
            subsystem_id: 0,
        });
        config.set_interrupt_pin(InterruptPin::A);
        for &(bar, space, size) in bars {
            config.add_bar(bar, space, size).unwrap();
        }
        Arc::new(Mutex::new(Self {
            config,
            writes: Vec::new(),
        }))
    }
}

impl PciFunction for Card {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }
    fn decoded(&self) -> Vec<BarRange> {
        self.config.decoded()
    }
    fn bar_read(&mut self, bar: BarIndex, _offset: u64, data: &mut [u8]) {
        data.fill(bar);
    }
    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        self.writes.push((bar, offset, data.to_vec()));
    }
    fn reset(&mut self) {
        self.config.reset();
    }
}

struct Machine {
    io: Arc<Bus>,
    memory: Arc<Bus>,
    pci: Arc<PciBus>,
}

fn machine() -> Machine {
    let (io, memory) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let pci = Arc::new(PciBus::new(io.clone(), memory.clone()));
    io.map(
        CONFIG_PORTS,
        CONFIG_PORTS_LEN,
        Arc::new(ConfigPorts(pci.clone())),
    )
    .unwrap();
    memory
        .map(0xf000_0000, ECAM_BUS_BYTES, Arc::new(Ecam(pci.clone())))
        .unwrap();
    Machine { io, memory, pci }
}

fn in32(bus: &Bus, address: u64) -> u32 {
    let mut data = [0; 4];
    bus.read(address, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn both_mechanisms_reach_the_same_registers() {
    let m = machine();
    m.pci.insert(3, Card::new(&[])).unwrap();
    for (slot, id) in [(0u64, 0x0008_1b36), (3, 0x5678_1234), (4, 0xffff_ffff)] {
        m.io.write(0xcf8, &(0x8000_0000u32 | (slot as u32) << 11).to_le_bytes());
        assert_eq!(in32(&m.io, 0xcfc), id);
        assert_eq!(in32(&m.memory, 0xf000_0000 + (slot << 15)), id);
    }
    m.io.write(0xcf8, &(0x8000_0000u32 | 3 << 11 | 0x3c).to_le_bytes());
    m.io.write(0xcfc, &[0x2a]);
    assert_eq!(in32(&m.memory, 0xf000_0000 + (3 << 15) + 0x3c) & 0xff, 0x2a);
    let mut pin = [0];
    m.io.read(0xcfd, &mut pin);
    assert_eq!(pin, [1]);
}

#[test]
fn other_functions_buses_and_a_disabled_address_read_all_ones() {
    let m = machine();
    for address in [0x8000_0100u32, 0x8001_0000, 0x0000_0000] {
        m.io.write(0xcf8, &address.to_le_bytes());
        assert_eq!(
            in32(&m.io, 0xcfc),
            0xffff_ffff,
            "CONFIG_ADDRESS {address:#x}"
        );
    }
    assert_eq!(in32(&m.memory, 0xf000_1000), 0xffff_ffff);
    m.io.write(0xcf8, &0x8000_0000u32.to_le_bytes());
    m.io.write(0xcf8, &[0, 0]);
    assert_eq!(
        in32(&m.io, 0xcf8),
        0x8000_0000,
        "a narrow write leaves CONFIG_ADDRESS alone"
    );
}

#[test]
fn assigned_ranges_fit_their_windows_and_do_not_overlap() {
    let m = machine();
    for slot in 1..6 {
        let bars = [
            (0, BarSpace::Memory32, 0x2_0000),
            (1, BarSpace::Io, 0x40),
            (2, BarSpace::Memory64, if slot == 5 { 1 << 32 } else { 16 }),
        ];
        m.pci.insert(slot, Card::new(&bars)).unwrap();
    }
    m.pci
        .assign_resources(&WINDOWS, |slot, pin| 16 + slot + pin);
    let mut ranges = Vec::new();
    for slot in 1..6 {
        assert_eq!(
            in32(&m.memory, 0xf000_0000 + (u64::from(slot) << 15) + 4) & 3,
            0
        );
        m.pci.config_write(slot, offset::COMMAND, &[3, 0]);
        assert_eq!(
            m.pci.read_u32(slot, offset::INTERRUPT_LINE) & 0xff,
            u32::from(17 + slot)
        );
        let decoded = m.pci.slot(slot).unwrap().lock().decoded();
        assert_eq!(decoded.len(), 3, "slot {slot}: {decoded:x?}");
        ranges.extend(decoded);
    }
    for (i, a) in ranges.iter().enumerate() {
        let window = match a.space {
            BarSpace::Io => WINDOWS.io,
            _ if a.address < 1 << 32 => WINDOWS.memory32,
            _ => WINDOWS.memory64,
        };
        assert!(
            window.0 <= a.address && a.address + a.size_bytes <= window.1,
            "{a:?}"
        );
        for b in &ranges[i + 1..] {
            let same_bus = (a.space == BarSpace::Io) == (b.space == BarSpace::Io);
            let apart =
                a.address + a.size_bytes <= b.address || b.address + b.size_bytes <= a.address;
            assert!(!same_bus || apart, "{a:?} {b:?}");
        }
    }
    assert!(
        ranges
            .iter()
            .any(|r| r.size_bytes == 1 << 32 && r.address >= 1 << 36)
    );
}

#[test]
fn a_moved_register_answers_at_its_new_place_only() {
    let m = machine();
    let card = Card::new(&[(0, BarSpace::Memory32, 0x1000), (1, BarSpace::Io, 8)]);
    m.pci.insert(1, card.clone()).unwrap();
    m.pci
        .config_write(1, offset::BAR0, &0xc000_0000u32.to_le_bytes());
    m.pci
        .config_write(1, offset::BAR0 + 4, &0x2000u32.to_le_bytes());
    assert!(!m.memory.write(0xc000_0000, &[1]), "decoding is off");
    m.pci.config_write(1, offset::COMMAND, &[3, 0]);
    assert!(m.memory.write(0xc000_0010, &[1]));
    assert!(m.io.write(0x2004, &[2]));
    m.pci
        .config_write(1, offset::BAR0, &0xc010_0000u32.to_le_bytes());
    assert!(!m.memory.write(0xc000_0010, &[3]));
    assert!(m.memory.write(0xc010_0000, &[4]));
    m.pci.reset();
    assert!(!m.memory.write(0xc010_0000, &[5]));
    let writes = &card.lock().unwrap().writes;
    assert_eq!(
        *writes,
        [(0, 0x10, vec![1]), (1, 4, vec![2]), (0, 0, vec![4])]
    );
}

#[test]
fn taken_and_missing_slots_are_refused() {
    let m = machine();
    assert_eq!(m.pci.insert(0, Card::new(&[])), Err(SlotError(0)));
    assert_eq!(m.pci.insert(32, Card::new(&[])), Err(SlotError(32)));
    m.pci.insert(31, Card::new(&[])).unwrap();
    assert_eq!(m.pci.insert(31, Card::new(&[])), Err(SlotError(31)));
    assert_eq!(m.pci.occupied(), [0, 31]);
}

#[test]
fn no_two_functions_have_the_same_number() {
    let m = machine();
    m.pci.insert(3, Card::new(&[])).unwrap();
    m.pci.insert(5, Card::new(&[])).unwrap();
    assert_eq!(m.pci.serials(), [(0, 0), (3, 1), (5, 2)]);
    // The same one again is another one too: it was not there meanwhile.
    let taken = m.pci.remove(3).unwrap();
    m.pci.insert(3, taken).unwrap();
    assert_eq!(m.pci.serials(), [(0, 0), (3, 3), (5, 2)]);
}

/// A register of the header, and bytes to write there: mostly the command and base address
/// registers.
fn config_write() -> impl Strategy<Value = (u8, u16, Vec<u8>)> {
    let register = prop_oneof![Just(offset::COMMAND), 0x10u16..0x28, any::<u16>()];
    let byte = prop_oneof![Just(0), Just(0xff), Just(7), any::<u8>()];
    (1u8..3, register, prop::collection::vec(byte, 1..5))
}

proptest! {
    #[test]
    fn the_bus_answers_exactly_where_functions_decode(
        writes in prop::collection::vec(config_write(), 1..60),
    ) {
        let (io, memory) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let pci = PciBus::new(io.clone(), memory.clone());
        let bars = [
            (0, BarSpace::Memory32, 0x2_0000),
            (1, BarSpace::Io, 0x40),
            (2, BarSpace::Memory64, 0x4000),
        ];
        for slot in 1..3 {
            pci.insert(slot, Card::new(&bars)).unwrap();
        }
        let mut probes = vec![(true, 0), (false, 0)];
        for (slot, register, data) in writes {
            pci.config_write(slot, register, &data);
            let decoded: Vec<BarRange> =
                (1..3).flat_map(|slot| pci.slot(slot).unwrap().lock().decoded()).collect();
            for range in &decoded {
                let is_io = range.space == BarSpace::Io;
                let last = range.address + (range.size_bytes - 1);
                for address in [range.address, last, range.address - 1, last.saturating_add(1)] {
                    probes.push((is_io, address));
                }
            }
            for &(is_io, address) in &probes {
                let expected = decoded.iter().any(|range| {
                    let offset = address.checked_sub(range.address);
                    let inside = offset.is_some_and(|offset| offset < range.size_bytes);
                    (range.space == BarSpace::Io) == is_io && inside
                });
                let bus = if is_io { &io } else { &memory };
                prop_assert_eq!(bus.read(address, &mut [0]), expected, "{:#x}", address);
            }
        }
    }
}

#[test]
fn a_function_that_was_taken_out_decodes_nothing_and_its_slot_is_free() {
    let machine = machine();
    let card = Card::new(&[(0, BarSpace::Memory32, 0x1000)]);
    machine.pci.insert(3, card.clone()).unwrap();
    machine.pci.assign_resources(&WINDOWS, |_, _| 0);
    let mut address = [0; 4];
    machine.pci.config_read(3, offset::BAR0, &mut address);
    let address = u64::from(u32::from_le_bytes(address) & !0xf);
    machine.pci.config_write(3, offset::COMMAND, &[2, 0]);
    assert!(machine.memory.read(address, &mut [0]));
    // An access that had found the slot before, and is served behind.
    let slot = machine.pci.slot(3).unwrap();
    assert!(machine.pci.remove(3).is_some());
    machine.pci.remap(&slot, &*slot.lock());
    assert!(!machine.memory.read(address, &mut [0]));
    drop(slot);
    assert_eq!(Arc::strong_count(&card), 1);
    let mut identity = [0; 4];
    machine.pci.config_read(3, 0, &mut identity);
    assert_eq!(identity, [0xff; 4]);
    assert!(machine.pci.remove(3).is_none());
    assert!(machine.pci.remove(0).is_none(), "the host bridge stays");
    assert!(machine.pci.remove(200).is_none());
    machine.pci.insert(3, card).unwrap();
}

#[test]
fn power_states_are_set_where_there_are_any_and_nowhere_else() {
    let m = machine();
    let card = Card::new(&[]);
    let body = [2, 0xc8, 0, 0x80, 0, 0];
    let mut config = card.lock().unwrap();
    config.config.add_capability(0x09, &[0; 6], &[]).unwrap();
    let writable = [0, 0, 0x03, 0x81];
    let at = config
        .config
        .add_capability(0x01, &body, &writable)
        .unwrap();
    drop(config);
    m.pci.insert(3, card.clone()).unwrap();
    m.pci.insert(4, Card::new(&[])).unwrap();
    let control = || card.lock().unwrap().config.u16_at(at + 4);
    // Status and what else is there stay as they are, and a 1 is not written to what a 1 clears.
    card.lock().unwrap().config.write(at + 4, &[0, 0x01]);
    assert!(m.pci.set_power_state(3, PowerState::D3Hot));
    assert_eq!(control(), 0x0103);
    assert!(m.pci.set_power_state(3, PowerState::D0));
    assert_eq!(control(), 0x0100);
    assert!(!m.pci.set_power_state(4, PowerState::D3Hot));
    assert!(!m.pci.set_power_state(5, PowerState::D3Hot), "nobody there");
}

/// Every capability of this function leads to itself.
struct Circle;

impl PciFunction for Circle {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = match at {
                0x06 => 1 << 4,
                0x34 | 0x41 => 0x40,
                0x40 => 0x09,
                _ => 0,
            };
        }
    }
    fn config_write(&mut self, _offset: u16, _data: &[u8]) {
        panic!("there is nothing to write");
    }
    fn decoded(&self) -> Vec<BarRange> {
        Vec::new()
    }
    fn bar_read(&mut self, _bar: BarIndex, _offset: u64, _data: &mut [u8]) {}
    fn bar_write(&mut self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}
    fn reset(&mut self) {}
}

#[test]
fn a_list_of_capabilities_that_leads_in_a_circle_ends() {
    let m = machine();
    m.pci.insert(3, Arc::new(Mutex::new(Circle))).unwrap();
    assert!(!m.pci.set_power_state(3, PowerState::D0));
}
