//! Each kind on a function made by hand: what its driver sees, what reaches it, and that it is over
//! when it is taken back.

mod interrupts;
mod models;
mod orders;

use std::sync::Arc;

use super::*;
use crate::pci::{BarIndex, BarRange};
use crate::state::{Form, Part, StateError};

/// A function whose registers show what was stored, and which remembers what reached it.
#[derive(Default)]
pub(super) struct Card {
    registers: [u8; 32],
    pub loads: u32,
    pub stores: Vec<(BarIndex, u64, Vec<u8>)>,
    pub resets: u32,
}

const FORM: Form = Form {
    kind: "card",
    version: 1,
};

impl PciFunction for Card {
    fn config_read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0x34);
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.stores.push((99, offset.into(), data.to_vec()));
    }
    fn decoded(&self) -> Vec<BarRange> {
        Vec::new()
    }
    fn bar_read(&mut self, _bar: BarIndex, offset: u64, data: &mut [u8]) {
        self.loads += 1;
        for (byte, at) in data.iter_mut().zip(offset..) {
            let register = usize::try_from(at).ok();
            *byte = register
                .and_then(|at| self.registers.get(at))
                .copied()
                .unwrap_or(0xff);
        }
    }
    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        self.stores.push((bar, offset, data.to_vec()));
        for (byte, at) in data.iter().zip(offset..) {
            let register = usize::try_from(at).ok();
            if let Some(place) = register.and_then(|at| self.registers.get_mut(at)) {
                *place = *byte;
            }
        }
    }
    fn reset(&mut self) {
        self.resets += 1;
        self.registers = [0; 32];
    }
    fn save(&self) -> Result<Part, StateError> {
        Part::new(FORM, &self.registers)
    }
    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        self.registers = state.open(FORM)?;
        Ok(())
    }
}

/// A card behind its edge.
pub(super) struct Bench {
    pub edge: Arc<Edge>,
    pub card: Card,
    /// What the card was told of its cable.
    pub cable: Arc<Mutex<Vec<bool>>>,
}

impl Default for Bench {
    fn default() -> Self {
        let edge = Arc::new(Edge::default());
        let cable = Arc::<Mutex<Vec<bool>>>::default();
        let told = cable.clone();
        edge.has_link(Arc::new(move |plugged| told.lock().unwrap().push(plugged)));
        Self {
            edge,
            card: Card::default(),
            cable,
        }
    }
}

impl Bench {
    pub fn armed(order: EdgeOrder) -> Self {
        let mut bench = Self::default();
        bench.card.registers = std::array::from_fn(|at| at as u8);
        bench.arm(order);
        bench
    }

    pub fn arm(&mut self, order: EdgeOrder) -> EdgeStatus {
        self.edge.arm(order, &mut self.card).unwrap()
    }

    pub fn disarm(&mut self) -> EdgeStatus {
        let ended = self.edge.disarm(None, &mut self.card).remove(0);
        self.edge.tell_link();
        ended
    }

    pub fn load(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        let mut seen = self.edge.around(&mut self.card);
        seen.bar_read(0, offset, &mut data);
        self.edge.accessed();
        u32::from_le_bytes(data)
    }

    pub fn store(&mut self, offset: u64, value: u32) {
        let mut seen = self.edge.around(&mut self.card);
        seen.bar_write(0, offset, &value.to_le_bytes());
        self.edge.accessed();
    }

    fn counts(&self) -> (u64, u64) {
        let status = self.edge.statuses().remove(0);
        (status.matched, status.struck)
    }
}

/// What the card shows at offset 4.
const FOUR: u32 = 0x0706_0504;

#[test]
fn loads_give_what_the_fault_says_and_the_registers_value_again_when_it_is_undone() {
    for (order, seen) in [
        (EdgeOrder::new(EdgeKind::LoadOnes), u32::MAX),
        (EdgeOrder::new(EdgeKind::LoadZeroes), 0),
        (
            EdgeOrder::new(EdgeKind::LoadFlipped).mask(0x8000_0001),
            FOUR ^ 0x8000_0001,
        ),
        (
            EdgeOrder::new(EdgeKind::StuckOnes).mask(0xff00),
            FOUR | 0xff00,
        ),
        (
            EdgeOrder::new(EdgeKind::StuckZeroes).mask(0xff00),
            FOUR & !0xff00,
        ),
        (
            EdgeOrder::new(EdgeKind::LoadValue).value(0xdead_beef),
            0xdead_beef,
        ),
    ] {
        let kind = order.kind;
        let mut bench = Bench::armed(order);
        assert_eq!(bench.load(4), seen, "{kind:?}");
        assert_eq!(bench.card.loads, 1, "the load reaches the card: {kind:?}");
        bench.store(8, 0x1234_5678);
        assert_eq!(bench.card.stores.len(), 1, "stores pass: {kind:?}");
        assert_eq!(bench.counts(), (1, 1), "{kind:?}");
        assert_eq!(bench.disarm().struck, 1);
        assert_eq!(bench.load(4), FOUR, "{kind:?}");
        assert!(!bench.edge.is_armed() && bench.edge.statuses().is_empty());
    }
}

#[test]
fn faults_of_one_load_follow_each_other_in_the_order_in_which_they_were_armed() {
    let mut bench = Bench::armed(EdgeOrder::new(EdgeKind::LoadFlipped).mask(0xf0));
    bench.arm(EdgeOrder::new(EdgeKind::StuckOnes).mask(0xff));
    bench.arm(EdgeOrder::new(EdgeKind::LoadFlipped).mask(0x0f));
    assert_eq!(bench.load(4), FOUR & !0xff | 0xf0);
    let mut bench = Bench::armed(EdgeOrder::new(EdgeKind::LoadZeroes));
    bench.arm(EdgeOrder::new(EdgeKind::LoadFlipped).mask(1 << 31));
    assert_eq!(bench.load(4), 1 << 31);
}

#[test]
fn a_lost_store_never_arrives_and_a_flipped_one_arrives_flipped() {
    let mut bench = Bench::armed(EdgeOrder::new(EdgeKind::StoreLost).when(When::Once));
    bench.store(0, 1);
    bench.store(0, 2);
    assert_eq!(bench.card.stores, [(0, 0, vec![2, 0, 0, 0])]);
    bench.disarm();
    bench.arm(EdgeOrder::new(EdgeKind::StoreFlipped).mask(0xff00));
    bench.store(0, 0x0101);
    assert_eq!(bench.card.stores[1].2, [0x01, 0xfe, 0, 0]);
    bench.disarm();
    bench.store(0, 3);
    assert_eq!(bench.card.stores[2].2, [3, 0, 0, 0]);
}

#[test]
fn a_late_store_arrives_before_the_kth_access_behind_it_or_when_it_is_undone() {
    let late = EdgeOrder::new(EdgeKind::StoreLate).when(When::Once).span(3);
    let mut bench = Bench::armed(late.clone());
    bench.store(0, 7);
    bench.store(4, 8);
    assert_eq!(bench.load(0), 0x0302_0100, "not there yet");
    assert_eq!(bench.card.stores.len(), 1);
    assert_eq!(bench.load(0), 7, "it arrived before this access");
    bench.disarm();
    bench.arm(late.clone());
    bench.store(0, 9);
    bench.disarm();
    assert_eq!(bench.load(0), 9);
    // A reset loses it, and leaves the fault armed.
    bench.arm(late);
    bench.store(0, 10);
    bench.edge.around(&mut bench.card).reset();
    assert_eq!(bench.edge.statuses().len(), 1);
    for _ in 0..8 {
        assert_eq!(bench.load(0), 0);
    }
}

#[test]
fn so_many_stores_are_late_and_not_more_and_none_is_lost() {
    let late = EdgeOrder::new(EdgeKind::StoreLate).span(MAX_SPAN);
    let mut bench = Bench::armed(late);
    for value in 0..200 {
        bench.store(0, value);
    }
    assert_eq!(bench.card.stores.len(), 200 - 64);
    bench.disarm();
    let arrived: Vec<u8> = bench.card.stores.iter().map(|store| store.2[0]).collect();
    assert_eq!(arrived, (0..200).collect::<Vec<u8>>());
}

#[test]
fn a_silent_function_answers_nothing_but_its_configuration_space() {
    let silent = EdgeOrder::new(EdgeKind::Silent).when(When::Nth(2));
    let mut bench = Bench::armed(silent);
    assert_eq!(bench.load(4), FOUR, "it strikes at the second access");
    for _ in 0..3 {
        assert_eq!(bench.load(4), u32::MAX);
        bench.store(4, 0);
    }
    assert_eq!((bench.card.loads, bench.card.stores.len()), (1, 0));
    let mut identity = [0; 2];
    let mut seen = bench.edge.around(&mut bench.card);
    seen.config_read(0, &mut identity);
    assert_eq!(identity, [0x34, 0x34]);
    // Power does not bring it back; its host does.
    bench.edge.around(&mut bench.card).reset();
    assert_eq!((bench.card.resets, bench.load(4)), (1, u32::MAX));
    bench.disarm();
    assert_eq!(bench.load(4), 0);
}

#[test]
fn a_removed_function_has_no_configuration_space_for_the_guest_either() {
    let mut bench = Bench::armed(EdgeOrder::new(EdgeKind::Removed).when(When::Once));
    let identity = |bench: &mut Bench| {
        let mut identity = [0; 2];
        let mut seen = bench.edge.around(&mut bench.card);
        seen.config_read(0, &mut identity);
        seen.config_write(4, &[7]);
        u16::from_le_bytes(identity)
    };
    assert_eq!(identity(&mut bench), 0x3434, "nobody has touched it yet");
    assert_eq!(bench.load(4), u32::MAX);
    assert_eq!(identity(&mut bench), 0xffff);
    assert_eq!(bench.card.stores.len(), 1, "the second write is lost");
    bench.disarm();
    assert_eq!((identity(&mut bench), bench.load(4)), (0x3434, FOUR));
    // Where nothing says when, it is gone at once.
    bench.arm(EdgeOrder::new(EdgeKind::Removed));
    assert_eq!(identity(&mut bench), 0xffff);
    bench.disarm();
    bench.arm(EdgeOrder::new(EdgeKind::Removed).bar(0));
    assert_eq!(identity(&mut bench), 0x3434);
}

#[test]
fn the_link_is_out_for_so_many_accesses_and_back_when_the_fault_is_undone() {
    let flap = EdgeOrder::new(EdgeKind::LinkFlap).when(When::Once).span(2);
    let mut bench = Bench::armed(flap.clone());
    let told = bench.cable.clone();
    let told = || std::mem::take(&mut *told.lock().unwrap());
    assert_eq!(told(), Vec::<bool>::new(), "it is in");
    bench.load(0);
    bench.load(0);
    assert_eq!(told(), [false]);
    bench.load(0);
    bench.load(0);
    assert_eq!(told(), [true]);
    bench.disarm();
    bench.arm(flap);
    bench.load(0);
    bench.disarm();
    assert_eq!(told(), [false, true]);
}

#[test]
fn the_state_is_the_functions_alone() {
    let mut bench = Bench::armed(EdgeOrder::new(EdgeKind::Silent));
    bench.load(0);
    let state = bench.edge.around(&mut bench.card).save().unwrap();
    assert_eq!(state, bench.card.save().unwrap());
    bench.card.registers[4] = 0;
    bench.edge.around(&mut bench.card).restore(&state).unwrap();
    assert_eq!(bench.card.registers[4], 4);
    assert_eq!(bench.load(4), u32::MAX, "the fault stays");
}
