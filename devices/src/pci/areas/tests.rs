#![allow(
    clippy::single_range_in_vec_init,
    reason = "a list of one range is meant"
)]

use std::collections::BTreeMap;

use super::*;
use crate::bus::{Bus, BusDevice};
use crate::edge::{Edge, EdgeKind, EdgeOrder};
use crate::pci::bus::{PciBus, SharedFunction};
use crate::pci::config::{ConfigSpace, PciIdentity, offset};
use crate::pci::{BarRange, BarSpace, PciFunction};

const MEMORY_SPACE: u16 = 2;
const AT: u64 = 0xc000_0000;

/// Slots as a machine has them: where the areas are, by guest physical address.
#[derive(Default)]
struct Slots {
    there: Arc<Mutex<BTreeMap<u64, u64>>>,
    refuses: Mutex<Option<SlotRefused>>,
}

struct Slot(u64, Arc<Mutex<BTreeMap<u64, u64>>>);

impl Drop for Slot {
    fn drop(&mut self) {
        assert!(self.1.lock().unwrap().remove(&self.0).is_some());
    }
}

impl GuestSlots for Slots {
    fn put(&self, area: &Arc<BarArea>, address: u64) -> Result<Box<dyn Send>, SlotRefused> {
        if let Some(refused) = self.refuses.lock().unwrap().clone() {
            return Err(refused);
        }
        let len = area.memory().len();
        let before = self.there.lock().unwrap().insert(address, len);
        assert!(before.is_none(), "two areas at {address:#x}");
        Ok(Box::new(Slot(address, self.there.clone())))
    }
}

/// A card of one register of 16 KiB in memory, whose second page, and the last two, are memory.
struct Card {
    config: ConfigSpace,
    areas: Vec<Arc<BarArea>>,
    accesses: usize,
}

fn file(len: u64) -> Arc<File> {
    let fd = rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    Arc::new(file)
}

fn area(bar: BarIndex, offset: u64, len: usize) -> Arc<BarArea> {
    let memory = BarMemory::of_file(file(len as u64), 0, len).unwrap();
    BarArea::new(bar, offset, memory).unwrap()
}

impl Card {
    fn new() -> Self {
        let mut config = ConfigSpace::new(PciIdentity {
            vendor_id: 1,
            device_id: 2,
            revision_id: 0,
            class_code: 0,
            subsystem_vendor_id: 0,
            subsystem_id: 0,
        });
        config.add_bar(0, BarSpace::Memory32, 0x4000).unwrap();
        let areas = vec![area(0, 0x1000, 0x1000), area(0, 0x2000, 0x2000)];
        Self {
            config,
            areas,
            accesses: 0,
        }
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
    fn areas(&self) -> &[Arc<BarArea>] {
        &self.areas
    }
    fn bar_read(&mut self, _bar: BarIndex, _offset: u64, data: &mut [u8]) {
        self.accesses += 1;
        data.fill(0);
    }
    fn bar_write(&mut self, _bar: BarIndex, _offset: u64, _data: &[u8]) {
        self.accesses += 1;
    }
    fn reset(&mut self) {
        self.config.reset();
    }
}

struct Machine {
    memory: Arc<Bus>,
    pci: PciBus,
    slots: Arc<Slots>,
    card: Arc<Mutex<Card>>,
    edge: Arc<Edge>,
}

impl Machine {
    fn new() -> Self {
        let memory = Arc::new(Bus::new());
        let pci = PciBus::new(Arc::new(Bus::new()), memory.clone());
        let slots = Arc::new(Slots::default());
        pci.put_areas_into(slots.clone());
        let (card, edge) = (Card::new(), Arc::new(Edge::default()));
        let card = Arc::new(Mutex::new(card));
        pci.insert_at_edge(3, card.clone(), edge.clone()).unwrap();
        Self {
            memory,
            pci,
            slots,
            card,
            edge,
        }
    }

    fn decode(&self, on: bool) {
        let command = if on { MEMORY_SPACE } else { 0 };
        self.pci
            .config_write(3, offset::COMMAND, &command.to_le_bytes());
    }

    fn move_to(&self, address: u64) {
        let address = address as u32;
        self.pci
            .config_write(3, offset::BAR0, &address.to_le_bytes());
    }

    fn there(&self) -> Vec<(u64, u64)> {
        let there = self.slots.there.lock().unwrap();
        there
            .iter()
            .map(|(address, len)| (*address, *len))
            .collect()
    }

    fn load(&self, address: u64) {
        assert!(self.memory.read(address, &mut [0; 4]));
    }
}

fn both_at(address: u64) -> [(u64, u64); 2] {
    [(address + 0x1000, 0x1000), (address + 0x2000, 0x2000)]
}

#[test]
fn areas_are_where_their_register_is_decoded_and_nowhere_else() {
    let machine = Machine::new();
    machine.move_to(AT);
    assert_eq!(machine.there(), []);
    machine.decode(true);
    assert_eq!(machine.there(), both_at(AT));
    let areas = machine.card.lock().unwrap().areas.clone();
    assert_eq!(areas[1].address(), Some(AT + 0x2000));
    // By one page only: each comes to where the other one was.
    machine.move_to(AT + 0x4000);
    assert_eq!(machine.there(), both_at(AT + 0x4000));
    machine.decode(false);
    assert_eq!(machine.there(), []);
    machine.move_to(AT);
    assert_eq!(machine.there(), []);
    machine.decode(true);
    assert_eq!(machine.there(), both_at(AT));
    machine.pci.reset();
    assert_eq!(machine.there(), []);
    machine.move_to(AT);
    machine.decode(true);
    assert_eq!(machine.there(), both_at(AT));
    let taken: SharedFunction = machine.pci.remove(3).unwrap();
    assert_eq!(machine.there(), []);
    // What was taken out decodes, and has nothing in the guest.
    assert_eq!(taken.lock().unwrap().decoded().len(), 1);
}

#[test]
fn an_area_is_not_put_over_what_answers_first() {
    struct Other;
    impl BusDevice for Other {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(0x55);
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }
    let machine = Machine::new();
    // It has the first page of the register, which is no area.
    let other = machine.memory.map(AT, 0x10, Arc::new(Other)).unwrap();
    machine.move_to(AT);
    machine.decode(true);
    assert_eq!(machine.there(), []);
    machine.load(AT + 0x1000);
    assert_eq!(machine.there(), []);
    machine.memory.unmap(other);
    // Whoever comes behind an area does not answer there in either way.
    machine.load(AT + 0x1000);
    assert_eq!(machine.there(), both_at(AT));
    machine.memory.map(AT, 0x4000, Arc::new(Other)).unwrap();
    machine.load(AT);
    assert_eq!(machine.there(), both_at(AT));
    assert_eq!(machine.card.lock().unwrap().accesses, 3);
}

#[test]
fn areas_that_cannot_be_of_their_register_are_left_out() {
    let machine = Machine::new();
    // Over the register's end, behind it, and of a register that there is not.
    let wrong = [(0, 0x3000, 0x2000), (0, 1 << 40, 0x1000), (1, 0, 0x1000)];
    let wrong = wrong.map(|(bar, offset, len)| area(bar, offset, len));
    machine.card.lock().unwrap().areas = wrong.into();
    machine.move_to(AT);
    machine.decode(true);
    assert_eq!(machine.there(), []);
}

#[test]
fn a_fault_at_the_edge_sees_every_access_while_it_is_armed() {
    let machine = Machine::new();
    machine.move_to(AT);
    machine.decode(true);
    assert_eq!(machine.there(), both_at(AT));
    let order = EdgeOrder::new(EdgeKind::LoadOnes);
    let mut card = machine.card.lock().unwrap();
    machine.edge.arm(order, &mut *card).unwrap();
    drop(card);
    assert_eq!(machine.there(), []);
    // Nor does moving it, or an access, bring them back.
    machine.move_to(AT + 0x8000);
    machine.load(AT + 0x9000);
    assert_eq!(machine.there(), []);
    machine
        .edge
        .disarm(None, &mut *machine.card.lock().unwrap());
    machine.load(AT + 0x9000);
    assert_eq!(machine.there(), both_at(AT + 0x8000));
}

#[test]
fn what_was_withdrawn_stays_out_and_what_is_refused_is_tried_again() {
    let machine = Machine::new();
    machine.move_to(AT);
    machine.decode(true);
    let areas = machine.card.lock().unwrap().areas.clone();
    areas[0].withdraw();
    assert_eq!(machine.there(), both_at(AT)[1..]);
    machine.load(AT + 0x1000);
    machine.move_to(AT + 0x4000);
    assert_eq!(machine.there(), both_at(AT + 0x4000)[1..]);
    *machine.slots.refuses.lock().unwrap() = Some(SlotRefused::Here("it is tested"));
    machine.move_to(AT);
    assert_eq!(machine.there(), []);
    *machine.slots.refuses.lock().unwrap() = None;
    machine.load(AT);
    assert_eq!(machine.there(), both_at(AT)[1..]);
    // A host that has none is not asked at each access.
    *machine.slots.refuses.lock().unwrap() = Some(SlotRefused::ByHost("none".into()));
    machine.move_to(AT + 0x4000);
    *machine.slots.refuses.lock().unwrap() = None;
    machine.load(AT + 0x4000);
    assert_eq!(machine.there(), []);
    // Others come in the place of those that the function does not list any more.
    machine.card.lock().unwrap().areas = vec![area(0, 0, 0x4000)];
    machine.load(AT + 0x4000);
    assert_eq!(machine.there(), [(AT + 0x4000, 0x4000)]);
    machine.card.lock().unwrap().areas.clear();
    assert_eq!(machine.there(), []);
}

#[test]
fn areas_are_whole_pages_without_what_has_to_exit() {
    let pages = |areas: &[Range<u64>], holes: &[Range<u64>]| whole_pages(areas, holes);
    assert_eq!(pages(&[0..0x4000], &[]), [0..0x4000]);
    assert_eq!(
        pages(&[0..0x4000], &[0x1ff0..0x2010]),
        [0..0x1000, 0x3000..0x4000]
    );
    assert_eq!(pages(&[0x10..0x3010], &[]), [0x1000..0x3000]);
    assert_eq!(
        pages(&[0..0x1000, 0x3000..0x5000], &[0..1]),
        [0x3000..0x5000]
    );
    assert_eq!(pages(&[0..0x1000], &[5..5]), [0..0x1000]);
    assert_eq!(pages(&[0x800..0xfff, 5..5], &[]), []);
    assert_eq!(
        pages(&[u64::MAX - 1..u64::MAX], &[u64::MAX - 1..u64::MAX]),
        []
    );
    let memory = || BarMemory::of_file(file(0x1000), 0, 0x1000).unwrap();
    assert!(BarArea::new(0, 0x800, memory()).is_err());
    assert!(BarArea::new(0, 0u64.wrapping_sub(0x1000), memory()).is_err());
}

#[test]
fn memory_is_of_files_that_have_it_and_a_cut_is_seen() {
    let short = BarMemory::of_file(file(0x1000), 0, 0x2000);
    assert!(short.is_err());
    assert!(BarMemory::of_file(file(0x2000), 0x800, 0x1000).is_err());
    assert!(BarMemory::of_file(file(0x2000), u64::MAX - 0xfff, 0x1000).is_err());
    assert!(BarMemory::of_file(file(0x2000), 0, 0).is_err());
    let not_memory = Arc::new(File::open("/proc/self/exe").unwrap());
    assert!(BarMemory::of_file(not_memory, 0, 0x1000).is_err());
    let good = file(0x3000);
    let memory = BarMemory::of_file(good.clone(), 0x1000, 0x1000).unwrap();
    good.set_len(0x2000).unwrap();
    assert!(!memory.is_cut());
    good.set_len(0x1fff).unwrap();
    assert!(memory.is_cut());
}
