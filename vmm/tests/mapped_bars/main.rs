//! Base address registers that are memory: a hand-made guest reaches them without an exit where
//! their register is decoded, and by exits everywhere else.

#![allow(clippy::unwrap_used)]

mod card;
#[path = "../common/mod.rs"]
mod common;
mod counting;
mod server;

use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

use card::Card;
use common::{Guest, config};
use counting::{AT, Counting, counts_up};
use devices::edge::{EdgeKind, EdgeOrder};
use devices::pci::areas::BarArea;
use devices::pci::config::offset;
use server::{MAPPED, PAGE, Remote};

const BAR_BYTES: u64 = 0x4000;
/// The part of the register that is memory.
const AREA: u64 = 0x1000;
const AREA_BYTES: u64 = 0x2000;
const TIMES: u32 = 1000;

/// A guest with a card in its slot.
struct Test {
    guest: Counting,
    card: Arc<Mutex<Card>>,
}

impl Test {
    fn new() -> Self {
        let card = Card::new(BAR_BYTES, (AREA, AREA_BYTES));
        let card = Arc::new(Mutex::new(card));
        let function = card.clone();
        let guest = Counting::start(|_, _| function);
        Self { guest, card }
    }

    fn card(&self) -> MutexGuard<'_, Card> {
        self.card.lock().unwrap()
    }

    fn area(&self) -> Arc<BarArea> {
        self.card().areas[0].clone()
    }

    /// Has the guest count the word at `address` up; gives what it is then, the guest's exits for
    /// memory, and the accesses that the card saw.
    fn count_up(&self, address: u64) -> (u32, u64, u64) {
        let seen_before = self.card().seen;
        let (value, exits) = self.guest.count_up(address, TIMES);
        (value, exits, self.card().seen - seen_before)
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
    test.guest.move_to(AT);
    // Not decoded: nobody answers.
    assert_eq!(test.count_up(AT + AREA).1, ALL);
    assert_eq!(test.card().seen, 0);
    test.guest.decode(true);
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
    test.guest.move_to(other);
    assert_eq!(test.count_up(other + AREA), (2 * TIMES, 0, 0));
    assert_eq!(test.count_up(AT + AREA).1, ALL);
    test.guest.decode(false);
    assert_eq!(test.count_up(other + AREA), (0, ALL, 0));
    test.guest.decode(true);
    assert_eq!(test.count_up(other + AREA), (3 * TIMES, 0, 0));
    test.guest.running.power_off();
}

#[test]
fn an_area_is_in_no_slot_over_guest_memory_or_outside_the_windows() {
    let test = Test::new();
    test.guest.decode(true);
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
        test.guest.move_to(address);
        assert_eq!(area.address(), None, "{address:#x}");
    }
    // The guest's memory is still its own.
    assert_eq!(test.count_up(0x20_0000), (TIMES, 0, 0));
    test.guest.move_to(0xefff_c000);
    assert_eq!(area.address(), Some(0xefff_c000 + AREA));
    // A register that reaches out of the window is decoded, and has no slot.
    test.guest.move_to(AT);
    assert_eq!(area.address(), Some(AT + AREA));
    test.guest.running.power_off();
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
    test.guest.move_to(AT);
    test.guest.decode(true);
    assert_eq!(test.count_up(AT + AREA), (TIMES, 0, 0));
    let order = EdgeOrder::new(EdgeKind::LoadOnes);
    test.guest.edge.arm(order, &mut *test.card()).unwrap();
    // All ones and one more: zero is stored each time.
    assert_eq!(test.count_up(AT + AREA), (0, ALL, ALL));
    assert_eq!(test.guest.edge.statuses()[0].struck, u64::from(TIMES));
    test.guest.edge.disarm(None, &mut *test.card());
    let (value, exits, _) = test.count_up(AT + AREA);
    assert_eq!(value, TIMES);
    assert_eq!(exits, 1, "the first access brings the area back");
    test.guest.running.power_off();
}

/// Nothing that the guest stores is lost, and nothing reaches the memory by the area behind its
/// withdrawal.
#[test]
fn an_area_is_taken_from_a_guest_that_hammers_it() {
    let test = Test::new();
    test.guest.move_to(AT);
    test.guest.decode(true);
    let area = test.area();
    let mut times = 0;
    for round in 0..30 {
        let many = 4000;
        test.guest.order(AT + AREA, many);
        times += many;
        match round % 3 {
            0 => {
                test.guest.decode(false);
                assert_eq!(area.address(), None);
                // What is stored now vanishes.
                test.guest.running.report();
                test.guest.decode(true);
                let now = test.in_file(AREA);
                assert!(now <= times);
                times = now;
                continue;
            }
            1 => {
                // Out and in again while it counts: not one is missing.
                let order = EdgeOrder::new(EdgeKind::LoadFlipped).after(u64::MAX);
                test.guest.edge.arm(order, &mut *test.card()).unwrap();
                assert_eq!(area.address(), None);
                std::thread::yield_now();
                test.guest.edge.disarm(None, &mut *test.card());
            }
            _ => {}
        }
        assert_eq!(test.guest.running.report(), times);
        assert_eq!(test.in_file(AREA), times);
    }
    area.withdraw();
    let (value, exits, seen) = test.count_up(AT + AREA);
    assert_eq!((value, exits, seen), (times + TIMES, ALL, ALL));
    test.guest.running.power_off();
}

/// Whoever has given the file takes it away: the guest goes on, and the card sees its accesses.
#[test]
fn a_file_that_is_cut_under_an_area_ends_nothing() {
    let test = Test::new();
    test.guest.move_to(AT);
    test.guest.decode(true);
    assert_eq!(test.count_up(AT + AREA), (TIMES, 0, 0));
    test.card().file.set_len(0).unwrap();
    let (value, exits, seen) = test.count_up(AT + AREA + 0x1000);
    assert_eq!((value, exits, seen), (1, ALL, ALL), "nothing is kept");
    // Under its hands.
    let test = Test::new();
    test.guest.move_to(AT);
    test.guest.decode(true);
    test.guest.order(AT + AREA, 20_000);
    test.card().file.set_len(AREA).unwrap();
    test.guest.running.report();
    assert_eq!(test.count_up(0x20_0000), (TIMES, 0, 0));
    test.guest.running.power_off();
}

/// The crate `vfio_user` at the other end, in a thread of its own.
#[test]
fn a_guest_reaches_what_a_server_lets_be_mapped_without_a_message() {
    let remote = Remote::new();
    let mut function = None;
    let guest = Counting::start(|guest, slot| {
        let made = remote.function(&mut guest.vm, slot);
        function = Some(made.clone());
        made
    });
    let function = function.unwrap();
    guest.move_to(AT);
    guest.decode(true);
    let before = remote.accesses();
    assert_eq!(guest.count_up(AT + MAPPED, TIMES), (TIMES, 0));
    assert_eq!(remote.accesses(), before);
    assert_eq!(remote.word(MAPPED), TIMES);
    // The page behind it goes by messages, to the same memory.
    assert_eq!(guest.count_up(AT + MAPPED + PAGE, TIMES), (TIMES, ALL));
    assert_eq!(remote.accesses(), before + ALL);
    assert_eq!(remote.word(MAPPED + PAGE), TIMES);
    // A server that has gone takes its memory with it.
    function.lock().unwrap().disconnect("it is tested");
    assert_eq!(guest.count_up(AT + MAPPED, TIMES), (0, ALL));
    assert_eq!(remote.word(MAPPED), TIMES);
    guest.running.power_off();
}
