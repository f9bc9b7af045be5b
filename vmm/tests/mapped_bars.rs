//! Base address registers that are memory: a hand-made guest reaches them without an exit where
//! their register is decoded, and by exits everywhere else.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

use common::{Guest, Running, config};
use devices::edge::{Edge, EdgeKind, EdgeOrder};
use devices::pci::areas::{BarArea, BarMemory};
use devices::pci::config::{ConfigSpace, PciIdentity, offset};
use devices::pci::{BarIndex, BarRange, BarSpace, PciFunction};
use vm_memory::{Bytes, GuestAddress};

/// Where the test says what the guest is to do: an address, and how often.
const ORDER: u64 = 0x21_0000;
/// In the 32-bit PCI window.
const AT: u64 = 0xc000_0000;
const BAR_BYTES: u64 = 0x4000;
/// The part of the register that is memory.
const AREA: u64 = 0x1000;
const AREA_BYTES: u64 = 0x2000;
const TIMES: u32 = 1000;

// Counts a word up so many times, by a load and a store each; reports what it is then.
guest_code!(
    counts_up,
    // The GiB below 4 GiB is mapped, in a page directory at 0x1f0000.
    "mov edi, 0x1f0000",
    "mov eax, 0xc0000083",
    "mov ecx, 512",
    "1: mov [rdi], rax",
    "add rax, 0x200000",
    "add rdi, 8",
    "dec ecx",
    "jnz 1b",
    "mov rax, cr3",
    "and rax, -4096",
    "mov rax, [rax]",
    "and rax, -4096",
    "mov qword ptr [rax + 24], 0x1f0003",
    "mov edx, 0x500",
    "mov eax, 1",
    "out dx, eax",
    "2: mov rdi, [0x210000]",
    "test rdi, rdi",
    "jnz 3f",
    "pause",
    "jmp 2b",
    // Told last is the address.
    "3: mov ecx, [0x210008]",
    "mov qword ptr [0x210000], 0",
    "4: mov eax, [rdi]",
    "inc eax",
    "mov [rdi], eax",
    "dec ecx",
    "jnz 4b",
    "out dx, eax",
    "jmp 2b",
);

/// A card of one register, in a file; a part of it is memory.
struct Card {
    config: ConfigSpace,
    file: Arc<File>,
    areas: Vec<Arc<BarArea>>,
    /// Accesses that it has seen.
    seen: u64,
}

impl Card {
    fn new(size_bytes: u64, area: (u64, u64)) -> Self {
        let mut config = ConfigSpace::new(PciIdentity {
            vendor_id: 0x1234,
            device_id: 0x5678,
            revision_id: 0,
            class_code: 0xff_0000,
            subsystem_vendor_id: 0,
            subsystem_id: 0,
        });
        config.add_bar(0, BarSpace::Memory64, size_bytes).unwrap();
        let fd = rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = Arc::new(File::from(fd));
        file.set_len(size_bytes).unwrap();
        let memory = BarMemory::of_file(file.clone(), area.0, area.1 as usize).unwrap();
        Self {
            config,
            file,
            areas: vec![BarArea::new(0, area.0, memory).unwrap()],
            seen: 0,
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
    fn bar_read(&mut self, _bar: BarIndex, offset: u64, data: &mut [u8]) {
        self.seen += 1;
        if self.file.read_exact_at(data, offset).is_err() {
            data.fill(0);
        }
    }
    fn bar_write(&mut self, _bar: BarIndex, offset: u64, data: &[u8]) {
        self.seen += 1;
        // A file that was cut stays so.
        if offset < self.file.metadata().unwrap().len() {
            self.file.write_all_at(data, offset).unwrap();
        }
    }
    fn reset(&mut self) {
        self.config.reset();
    }
}

struct Test {
    guest: Running,
    card: Arc<Mutex<Card>>,
    edge: Arc<Edge>,
    slot: u8,
}

impl Test {
    fn new() -> Self {
        Self::with(Card::new(BAR_BYTES, (AREA, AREA_BYTES)))
    }

    fn with(card: Card) -> Self {
        let mut guest = Guest::new(config(counts_up(), 1));
        let slot = guest.vm.reserve_pci_slot().unwrap();
        let card = Arc::new(Mutex::new(card));
        guest.vm.add_pci(&slot, card.clone()).unwrap();
        let guest = guest.start();
        // Whoever starts the machine has placed the registers.
        assert_eq!(guest.report(), 1);
        Self {
            guest,
            card,
            edge: slot.edge().clone(),
            slot: slot.number(),
        }
    }

    fn card(&self) -> MutexGuard<'_, Card> {
        self.card.lock().unwrap()
    }

    fn area(&self) -> Arc<BarArea> {
        self.card().areas[0].clone()
    }

    fn write(&self, register: u16, data: &[u8]) {
        let bus = self.guest.handle.pci_bus();
        bus.config_write(self.slot, register, data);
    }

    fn move_to(&self, address: u64) {
        self.write(offset::BAR0 + 4, &address.to_le_bytes()[4..]);
        self.write(offset::BAR0, &address.to_le_bytes()[..4]);
    }

    fn decode(&self, on: bool) {
        self.write(offset::COMMAND, &[if on { 2 } else { 0 }, 0]);
    }

    fn order(&self, address: u64, times: u32) {
        let ram = self.guest.handle.ram().memory().clone();
        ram.write_obj(times, GuestAddress(ORDER + 8)).unwrap();
        ram.write_obj(address, GuestAddress(ORDER)).unwrap();
    }

    /// Has the guest count the word at `address` up; gives what it is then, the guest's exits for
    /// memory, and the accesses that the card saw.
    fn count_up(&self, address: u64) -> (u32, u64, u64) {
        let exits = || {
            let exits = self.guest.handle.status().exits[0];
            exits.mmio_read + exits.mmio_write
        };
        let (exits_before, seen_before) = (exits(), self.card().seen);
        self.order(address, TIMES);
        let value = self.guest.report();
        (
            value,
            exits() - exits_before,
            self.card().seen - seen_before,
        )
    }

    fn in_file(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.card().file.read_exact_at(&mut data, offset).unwrap();
        u32::from_le_bytes(data)
    }
}

const ALL: u64 = 2 * TIMES as u64;

#[test]
fn a_guest_reaches_an_area_without_an_exit_where_its_register_is_decoded() {
    let test = Test::new();
    test.move_to(AT);
    // Not decoded: nobody answers.
    assert_eq!(test.count_up(AT + AREA).1, ALL);
    assert_eq!(test.card().seen, 0);
    test.decode(true);
    assert_eq!(test.count_up(AT + AREA), (TIMES, 0, 0));
    assert_eq!(test.in_file(AREA), TIMES);
    let end = AREA + AREA_BYTES - 4;
    assert_eq!(test.count_up(AT + end), (TIMES, 0, 0));
    assert_eq!(test.in_file(end), TIMES);
    // Around it each access is the card's.
    assert_eq!(test.count_up(AT + AREA - 4), (TIMES, ALL, ALL));
    assert_eq!(test.count_up(AT + AREA + AREA_BYTES), (TIMES, ALL, ALL));
    // The same memory at another place, and nothing at the old one.
    let other = AT + 0x10_0000;
    test.move_to(other);
    assert_eq!(test.count_up(other + AREA), (2 * TIMES, 0, 0));
    assert_eq!(test.count_up(AT + AREA).1, ALL);
    test.decode(false);
    assert_eq!(test.count_up(other + AREA), (0, ALL, 0));
    test.decode(true);
    assert_eq!(test.count_up(other + AREA), (3 * TIMES, 0, 0));
    test.guest.power_off();
}

#[test]
fn an_area_is_in_no_slot_over_guest_memory_or_outside_the_windows() {
    let test = Test::new();
    test.decode(true);
    let area = test.area();
    for address in [
        0,
        0x10_0000,
        // Behind this guest's memory, and where other guests have some.
        0x40_0000,
        AT - BAR_BYTES,
        // ECAM, where nothing is, the interrupt controllers, behind 4 GiB.
        0xf000_0000,
        0xf800_0000,
        0xfec0_0000,
        0xfee0_0000,
        1 << 32,
        u64::MAX << 14,
    ] {
        test.move_to(address);
        assert_eq!(area.address(), None, "{address:#x}");
    }
    // The guest's memory is still its own.
    assert_eq!(test.count_up(0x20_0000), (TIMES, 0, 0));
    test.move_to(0xefff_c000);
    assert_eq!(area.address(), Some(0xefff_c000 + AREA));
    // A register that reaches out of the window is decoded, and has no slot.
    test.move_to(AT);
    assert_eq!(area.address(), Some(AT + AREA));
    test.guest.power_off();
}

#[test]
fn two_cards_at_one_place_do_not_share_it() {
    let mut guest = Guest::new(config(counts_up(), 1));
    let cards: Vec<_> = (0..2)
        .map(|_| {
            let slot = guest.vm.reserve_pci_slot().unwrap();
            let card = Card::new(BAR_BYTES, (AREA, AREA_BYTES));
            let area = card.areas[0].clone();
            guest.vm.add_pci(&slot, Arc::new(Mutex::new(card))).unwrap();
            (slot.number(), area)
        })
        .collect();
    let bus = guest.vm.handle().pci_bus().clone();
    for (slot, _) in &cards {
        bus.config_write(*slot, offset::BAR0, &(AT as u32).to_le_bytes());
        bus.config_write(*slot, offset::COMMAND, &[2, 0]);
    }
    let places = || cards.iter().map(|(_, area)| area.address());
    assert!(places().eq([Some(AT + AREA), None]));
    // Half of one over half of the other.
    bus.config_write(
        cards[1].0,
        offset::BAR0,
        &(AT as u32 + 0x4000).to_le_bytes(),
    );
    assert!(places().eq([Some(AT + AREA), Some(AT + 0x4000 + AREA)]));
    bus.reset();
    assert!(places().eq([None, None]));
}

#[test]
fn a_fault_that_is_armed_sees_each_access() {
    let test = Test::new();
    test.move_to(AT);
    test.decode(true);
    assert_eq!(test.count_up(AT + AREA), (TIMES, 0, 0));
    let order = EdgeOrder::new(EdgeKind::LoadOnes);
    test.edge.arm(order, &mut *test.card()).unwrap();
    // All ones and one more: zero is stored each time.
    assert_eq!(test.count_up(AT + AREA), (0, ALL, ALL));
    assert_eq!(test.edge.statuses()[0].struck, u64::from(TIMES));
    test.edge.disarm(None, &mut *test.card());
    let (value, exits, _) = test.count_up(AT + AREA);
    assert_eq!(value, TIMES);
    assert_eq!(exits, 1, "the first access brings the area back");
    test.guest.power_off();
}

/// Nothing that the guest stores is lost, and nothing reaches the memory by the area behind its
/// withdrawal.
#[test]
fn an_area_is_taken_from_a_guest_that_hammers_it() {
    let test = Test::new();
    test.move_to(AT);
    test.decode(true);
    let area = test.area();
    let mut times = 0;
    for round in 0..30 {
        let many = 4000;
        test.order(AT + AREA, many);
        times += many;
        match round % 3 {
            0 => {
                test.decode(false);
                assert_eq!(area.address(), None);
                // What is stored now vanishes.
                test.guest.report();
                test.decode(true);
                let now = test.in_file(AREA);
                assert!(now <= times);
                times = now;
                continue;
            }
            1 => {
                // Out and in again while it counts: not one is missing.
                let order = EdgeOrder::new(EdgeKind::LoadFlipped).after(u64::MAX);
                test.edge.arm(order, &mut *test.card()).unwrap();
                assert_eq!(area.address(), None);
                std::thread::yield_now();
                test.edge.disarm(None, &mut *test.card());
            }
            _ => {}
        }
        assert_eq!(test.guest.report(), times);
        assert_eq!(test.in_file(AREA), times);
    }
    area.withdraw();
    let (value, exits, seen) = test.count_up(AT + AREA);
    assert_eq!((value, exits, seen), (times + TIMES, ALL, ALL));
    test.guest.power_off();
}

/// Whoever has given the file takes it away: the guest goes on, and the card sees its accesses.
#[test]
fn a_file_that_is_cut_under_an_area_ends_nothing() {
    let test = Test::new();
    test.move_to(AT);
    test.decode(true);
    assert_eq!(test.count_up(AT + AREA), (TIMES, 0, 0));
    test.card().file.set_len(0).unwrap();
    let (value, exits, seen) = test.count_up(AT + AREA + 0x1000);
    assert_eq!((value, exits, seen), (1, ALL, ALL), "nothing is kept");
    // Under its hands.
    let test = Test::new();
    test.move_to(AT);
    test.decode(true);
    test.order(AT + AREA, 20_000);
    test.card().file.set_len(AREA).unwrap();
    test.guest.report();
    assert_eq!(test.count_up(0x20_0000), (TIMES, 0, 0));
    test.guest.power_off();
}
