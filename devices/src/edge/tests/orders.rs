//! Which accesses a fault is for, when it strikes, and what is refused.

use proptest::prelude::*;

use super::super::{Direction, EdgeKind, EdgeOrder, MAX_FAULTS, MILLION, OrderError, When};
use super::{Bench, FOUR};
use crate::pci::PciFunction;

#[test]
fn every_kind_has_a_name_of_its_own_a_sentence_and_a_source() {
    for kind in EdgeKind::ALL {
        assert_eq!(EdgeKind::from_name(kind.name()), Some(kind));
        assert!(kind.sentence().ends_with('.') && !kind.source().is_empty());
        let written = serde_json::to_string(&kind).unwrap();
        assert_eq!(written, format!("\"{}\"", kind.name()));
    }
    assert_eq!(EdgeKind::from_name("gremlin"), None);
}

#[test]
fn only_what_matches_is_struck() {
    let ones = EdgeOrder::new(EdgeKind::LoadOnes);
    for (order, struck) in [
        (ones.clone(), true),
        (ones.clone().bar(0).offsets(4..8).width(4), true),
        (ones.clone().offsets(7..8), true),
        (ones.clone().offsets(0..5), true),
        (ones.clone().offsets(0..u64::MAX), true),
        (ones.clone().direction(Direction::Load), true),
        (ones.clone().offsets(8..9), false),
        (ones.clone().offsets(0..4), false),
        (ones.clone().offsets(u64::MAX - 1..u64::MAX), false),
        (ones.clone().bar(1), false),
        (ones.clone().width(2), false),
    ] {
        let mut bench = Bench::armed(order.clone());
        let seen = bench.load(4);
        assert_eq!(seen == u32::MAX, struck, "{order:?}");
        assert_eq!(bench.counts(), (struck.into(), struck.into()), "{order:?}");
    }
    let mut bench = Bench::armed(EdgeOrder::new(EdgeKind::Silent).direction(Direction::Store));
    assert_eq!(bench.load(4), FOUR);
    bench.store(4, 0);
    assert_eq!(bench.load(4), u32::MAX);
}

#[test]
fn a_fault_strikes_once_or_at_every_nth_or_always() {
    for (when, strikes) in [
        (When::Once, "x......"),
        (When::Always, "xxxxxxx"),
        (When::Nth(3), "..x..x."),
        (When::Nth(1), "xxxxxxx"),
        (When::Nth(u64::MAX), "......."),
        (When::Chance(MILLION), "xxxxxxx"),
    ] {
        let mut bench = Bench::armed(EdgeOrder::new(EdgeKind::LoadOnes).when(when));
        let seen = |bench: &mut Bench| match bench.load(4) {
            u32::MAX => 'x',
            _ => '.',
        };
        let seen: String = (0..7).map(|_| seen(&mut bench)).collect();
        assert_eq!(seen, strikes, "{when:?}");
        let struck = strikes.matches('x').count() as u64;
        assert_eq!(bench.counts(), (7, struck));
    }
}

#[test]
fn a_fault_leaves_the_first_events_alone() {
    for (after, when, strikes) in [
        (2, When::Once, "..x...."),
        (2, When::Always, "..xxxxx"),
        (2, When::Nth(2), "...x.x."),
        (u64::MAX, When::Always, "......."),
    ] {
        let order = EdgeOrder::new(EdgeKind::LoadOnes).after(after).when(when);
        let mut bench = Bench::armed(order);
        let seen = |bench: &mut Bench| match bench.load(4) {
            u32::MAX => 'x',
            _ => '.',
        };
        let seen: String = (0..7).map(|_| seen(&mut bench)).collect();
        assert_eq!(seen, strikes, "{after}, {when:?}");
        assert_eq!(bench.counts().0, 7);
    }
    // One that lasts begins with the strike, too.
    let mut bench = Bench::armed(EdgeOrder::new(EdgeKind::Silent).after(1));
    assert_eq!(bench.load(4), FOUR);
    assert_eq!(bench.load(4), u32::MAX);
}

#[test]
fn the_seed_decides_when_and_which_bits() {
    let run = |seed| {
        let order = EdgeOrder::new(EdgeKind::LoadFlipped).when(When::Chance(MILLION / 4));
        let mut bench = Bench::armed(order.seed(seed));
        let seen: Vec<u32> = (0..400).map(|_| bench.load(4)).collect();
        (seen, bench.counts().1)
    };
    let (one, struck) = run(7);
    assert_eq!((&one, struck), (&run(7).0, run(7).1));
    assert_ne!(one, run(8).0);
    assert!((60..140).contains(&struck), "about a quarter: {struck}");
    for seen in one.iter().filter(|seen| **seen != FOUR) {
        assert_eq!((seen ^ FOUR).count_ones(), 1);
    }
    // A bit that is stuck is the same one at each load.
    let mut bench = Bench::armed(EdgeOrder::new(EdgeKind::StuckOnes).seed(3));
    bench.card.stores.clear();
    bench.store(4, 0);
    let stuck = bench.load(4);
    assert_eq!(stuck.count_ones(), 1);
    assert_eq!(bench.load(4), stuck);
}

#[test]
fn nonsense_is_refused_and_leaves_nothing_armed() {
    let ones = EdgeOrder::new(EdgeKind::LoadOnes);
    let flipped = EdgeOrder::new(EdgeKind::LoadFlipped);
    let late = EdgeOrder::new(EdgeKind::StoreLate);
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = ones.clone().offsets(8..4);
    for order in [
        backwards,
        ones.clone().offsets(4..4),
        ones.clone().bar(6),
        ones.clone().width(0),
        ones.clone().width(9),
        ones.clone().when(When::Nth(0)),
        ones.clone().when(When::Chance(0)),
        ones.clone().when(When::Chance(MILLION + 1)),
        ones.clone().mask(1),
        ones.clone().value(1),
        ones.clone().span(1),
        ones.direction(Direction::Store),
        flipped.mask(0),
        late.clone().span(0),
        late.clone().span(u32::MAX),
        late.direction(Direction::Load),
        EdgeOrder::new(EdgeKind::LoadValue),
        EdgeOrder::new(EdgeKind::InterruptLost).bar(0),
        EdgeOrder::new(EdgeKind::InterruptLate).direction(Direction::Load),
    ] {
        let mut bench = Bench::default();
        let refused = bench.edge.arm(order.clone(), &mut bench.card);
        assert!(refused.is_err(), "{order:?}");
        assert!(!refused.unwrap_err().to_string().is_empty());
        assert!(!bench.edge.is_armed());
    }
}

#[test]
fn so_many_faults_are_armed_and_each_is_taken_back_by_its_number() {
    let mut bench = Bench::default();
    let order = EdgeOrder::new(EdgeKind::LoadFlipped);
    for n in 0..MAX_FAULTS {
        let status = bench.arm(order.clone().mask(1 << n));
        assert_eq!(status.number, n as u64 + 1);
    }
    let refused = bench.edge.arm(order, &mut bench.card);
    assert_eq!(refused, Err(OrderError::TooMany(MAX_FAULTS)));
    assert_eq!(bench.edge.disarm(Some(99), &mut bench.card), []);
    let gone = bench.edge.disarm(Some(1), &mut bench.card);
    assert_eq!((gone.len(), gone[0].number), (1, 1));
    assert_eq!(bench.load(4), 0xfffe);
    assert!(bench.edge.is_armed());
    assert_eq!(
        bench.edge.disarm(None, &mut bench.card).len(),
        MAX_FAULTS - 1
    );
    assert!(!bench.edge.is_armed());
}

proptest! {
    /// Whatever is armed and whatever the guest does, nothing overflows, and what is undone is as
    /// if it had never been.
    #[test]
    fn no_order_and_no_access_breaks_the_edge(
        kind in 0..EdgeKind::ALL.len(),
        offsets in any::<Option<(u64, u64)>>(),
        span in 1u32..5,
        seed in any::<u64>(),
        accesses in prop::collection::vec(
            (any::<bool>(), any::<u8>(), prop_oneof![0u64..40, any::<u64>()], 0usize..12), 1..40),
    ) {
        let kind = EdgeKind::ALL[kind];
        let mut order = EdgeOrder::new(kind).seed(seed).when(When::Chance(MILLION / 2));
        order.offsets = offsets.map(|(start, end)| start..end);
        order.span = kind.default_span().map(|_| span);
        order.value = (kind == EdgeKind::LoadValue).then_some(seed);
        let mut bench = Bench::default();
        let armed = bench.edge.arm(order, &mut bench.card);
        for (is_store, bar, offset, bytes) in accesses {
            let mut data = vec![0; bytes];
            let mut seen = bench.edge.around(&mut bench.card);
            match is_store {
                true => seen.bar_write(bar, offset, &data),
                false => seen.bar_read(bar, offset, &mut data),
            }
        }
        if armed.is_ok() {
            let status = bench.disarm();
            prop_assert!(status.struck <= status.matched);
        }
        bench.store(0, 0x55aa);
        prop_assert_eq!(bench.load(0), 0x55aa);
    }
}
