//! Lines and vectors at the edge.

use std::sync::Arc;

use super::super::{EdgeKind, EdgeOrder, OrderError, When};
use super::Bench;
use crate::e1000::bench::BenchLine;
use crate::irq::{IrqLine, LineEvents};
use crate::pci::msix::tests::RecordedVectors;

/// An edge with a fault, the line of the guest, and the line as the function has it.
fn lines(order: EdgeOrder) -> (Bench, Arc<BenchLine>, Arc<dyn IrqLine>) {
    let mut bench = Bench::default();
    let guest = Arc::new(BenchLine::default());
    let function = bench.edge.line(guest.clone());
    bench.arm(order);
    (bench, guest, function)
}

#[test]
fn with_nothing_armed_the_line_follows_the_function() {
    let (mut bench, guest, function) = lines(EdgeOrder::new(EdgeKind::InterruptLost));
    bench.disarm();
    for level in [true, false, true] {
        function.set_level(level);
        assert_eq!(guest.asserted(), level);
    }
}

#[test]
fn a_lost_interrupt_never_comes_and_the_next_one_does() {
    let order = EdgeOrder::new(EdgeKind::InterruptLost).when(When::Once);
    let (mut bench, guest, function) = lines(order);
    function.set_level(true);
    function.set_level(true);
    bench.load(0);
    assert!(!guest.asserted());
    assert_eq!(bench.counts(), (1, 1), "a level that stays is no interrupt");
    function.set_level(false);
    function.set_level(true);
    assert!(guest.asserted());
    function.set_level(false);
    assert!(!guest.asserted());
}

#[test]
fn what_was_lost_is_there_when_the_fault_is_undone() {
    let (mut bench, guest, function) = lines(EdgeOrder::new(EdgeKind::InterruptLost));
    function.set_level(true);
    assert!(!guest.asserted());
    bench.disarm();
    assert!(guest.asserted(), "the function still wants it");
}

#[test]
fn a_late_interrupt_comes_at_the_kth_access_if_it_is_still_wanted() {
    let order = EdgeOrder::new(EdgeKind::InterruptLate).span(2);
    let (mut bench, guest, function) = lines(order);
    function.set_level(true);
    bench.load(0);
    assert!(!guest.asserted());
    bench.store(0, 0);
    assert!(guest.asserted());
    function.set_level(false);
    function.set_level(true);
    function.set_level(false);
    for _ in 0..4 {
        bench.load(0);
        assert!(!guest.asserted(), "nobody wants it any more");
    }
}

#[test]
fn a_stray_interrupt_leaves_the_line_as_the_function_has_it() {
    let order = EdgeOrder::new(EdgeKind::InterruptStray).when(When::Nth(2));
    let (mut bench, guest, function) = lines(order);
    bench.load(0);
    let changes = guest.changes();
    bench.load(0);
    assert_eq!(guest.changes() - changes, 2, "up and down");
    assert!(!guest.asserted());
    function.set_level(true);
    bench.load(0);
    bench.load(0);
    assert!(guest.asserted());
}

#[test]
fn a_storm_holds_the_line_over_so_many_accesses() {
    let order = EdgeOrder::new(EdgeKind::InterruptStorm)
        .when(When::Once)
        .span(3);
    let (mut bench, guest, function) = lines(order);
    function.set_level(true);
    function.set_level(false);
    for _ in 0..2 {
        bench.load(0);
        assert!(guest.asserted(), "the driver has lowered it in vain");
    }
    bench.load(0);
    assert!(!guest.asserted());
    // One that is under way ends with the fault, and with a reset.
    bench.disarm();
    for is_reset in [false, true] {
        bench.arm(EdgeOrder::new(EdgeKind::InterruptStorm));
        function.set_level(true);
        function.set_level(false);
        assert!(guest.asserted());
        if is_reset {
            use crate::pci::PciFunction;
            bench.edge.around(&mut bench.card).reset();
            assert!(!guest.asserted());
        }
        bench.disarm();
        assert!(!guest.asserted());
    }
}

#[test]
fn a_function_that_is_silent_or_removed_has_no_interrupts() {
    for kind in [EdgeKind::Silent, EdgeKind::Removed] {
        let order = EdgeOrder::new(kind).when(When::Once);
        let (mut bench, guest, function) = lines(order);
        function.set_level(true);
        assert!(guest.asserted(), "nobody has touched it yet");
        bench.load(0);
        assert!(!guest.asserted());
        function.set_level(false);
        function.set_level(true);
        assert!(!guest.asserted());
        bench.disarm();
        assert!(guest.asserted());
        bench.arm(EdgeOrder::new(kind));
        assert!(!guest.asserted(), "at once, as nothing says when");
    }
}

#[test]
fn vectors_are_lost_and_late_and_raised_again_as_lines_are() {
    let recorded = RecordedVectors::new(3);
    let mut bench = Bench::default();
    let vectors = bench.edge.vectors(recorded.clone());
    assert_eq!(vectors.count(), 3);
    let sent = || recorded.take_triggered();
    vectors.trigger(1);
    assert_eq!(sent(), [1]);
    bench.arm(EdgeOrder::new(EdgeKind::InterruptLost).when(When::Once));
    vectors.trigger(1);
    vectors.trigger(2);
    assert_eq!(sent(), [2]);
    bench.disarm();
    bench.arm(
        EdgeOrder::new(EdgeKind::InterruptLate)
            .when(When::Once)
            .span(1),
    );
    vectors.trigger(1);
    assert_eq!(sent(), [0u16; 0]);
    vectors.trigger(2);
    assert_eq!(sent(), [1, 2]);
    bench.disarm();
    bench.arm(EdgeOrder::new(EdgeKind::InterruptStray).when(When::Once));
    bench.load(0);
    assert_eq!(sent(), [2], "the vector that came last");
    bench.disarm();
    bench.arm(EdgeOrder::new(EdgeKind::InterruptStorm).span(2));
    vectors.trigger(0);
    for _ in 0..4 {
        bench.load(0);
    }
    assert_eq!(sent(), [0, 0, 0]);
}

/// A line that somebody outside drives.
struct Outside;

impl IrqLine for Outside {
    fn set_level(&self, _asserted: bool) {}
    fn events(&self) -> Option<LineEvents> {
        let event = || vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        Some(LineEvents {
            trigger: event(),
            unmask: event(),
        })
    }
}

#[test]
fn interrupts_that_go_past_the_edge_cannot_be_disturbed() {
    let mut bench = Bench::default();
    let line = bench.edge.line(Arc::new(Outside));
    bench.arm(EdgeOrder::new(EdgeKind::InterruptLost));
    bench.disarm();
    assert!(line.events().is_some());
    for kind in EdgeKind::ALL {
        let order = EdgeOrder::new(kind).value(0);
        let order = match kind {
            EdgeKind::LoadValue => order,
            _ => EdgeOrder::new(kind),
        };
        let armed = bench.edge.arm(order, &mut bench.card);
        match kind.name().starts_with("interrupt") {
            true => assert_eq!(armed, Err(OrderError::InterruptsUnseen(kind))),
            false => assert!(armed.is_ok(), "{kind:?}"),
        }
        bench.edge.disarm(None, &mut bench.card);
    }
}
