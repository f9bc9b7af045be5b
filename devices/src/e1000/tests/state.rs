//! What is under way when a state is saved goes on where it is restored.

use super::driver::*;
use crate::e1000::regs::*;

#[test]
fn running_delays_go_on() {
    let mut driver = Driver::new();
    driver.bench.write(RDTR, 100);
    driver.bench.write(TIDV, 200);
    driver.bench.deliver(&broadcast(60));
    driver.queue_data(TX_BUFFERS, &broadcast(60), EOP | RS | IDE, 0);
    driver.ring();
    driver.bench.read(ICR);
    driver.bench.advance_ns(60 * 1024);
    let mut twin = driver.twin();
    twin.bench.advance_ns(39 * 1024);
    assert!(!twin.bench.interrupt());
    twin.bench.advance_ns(1024);
    assert_eq!(twin.bench.read(ICR), icr::RXT0);
    twin.bench.advance_ns(100 * 1024);
    assert_eq!(twin.bench.read(ICR), icr::TXDW);
}

#[test]
fn a_throttled_interrupt_comes_in_its_time() {
    let mut driver = Driver::new();
    driver.bench.write(ITR, 1000);
    driver.bench.write(ICS, icr::RXT0);
    driver.bench.read(ICR);
    driver.bench.advance_ns(100_000);
    for cause_before in [false, true] {
        if cause_before {
            driver.bench.write(ICS, icr::RXT0);
        }
        let mut twin = driver.twin();
        twin.bench.write(ICS, icr::RXT0);
        twin.bench.advance_ns(155_999);
        assert!(!twin.bench.interrupt());
        twin.bench.advance_ns(1);
        assert!(twin.bench.interrupt());
    }
}

#[test]
fn an_asserted_line_is_asserted_again_and_can_be_acknowledged() {
    let mut driver = Driver::new();
    driver.bench.write(ICS, icr::LSC);
    let mut twin = driver.twin();
    assert!(twin.bench.interrupt());
    assert_eq!(twin.bench.read(ICR), icr::LSC);
    assert!(!twin.bench.interrupt());
}

#[test]
fn a_packet_that_was_half_fetched_or_half_sent_is_sent_once() {
    let mut driver = Driver::new();
    let frame = broadcast(200);
    driver.queue_data(TX_BUFFERS, &frame[..80], 0, 0);
    driver.ring();
    let mut twin = driver.twin();
    twin.bench.far_end().room = Some(0);
    // The first part is in the controller already.
    twin.bench.dma.write(TX_BUFFERS, &[0xee; 80]).unwrap();
    twin.queue_data(TX_BUFFERS + 0x100, &frame[80..], EOP | RS, 0);
    twin.ring();
    assert!(twin.sent().is_empty());
    let mut third = twin.twin();
    third
        .bench
        .dma
        .write(TX_BUFFERS + 0x100, &[0xee; 120])
        .unwrap();
    third.bench.far_end().room = None;
    third.bench.serve();
    assert_eq!(third.sent(), [frame]);
    assert_eq!((third.tx_status(1), third.bench.read(TDH)), (1, 2));
}

#[test]
fn descriptors_that_were_finished_after_the_checkpoint_are_unfinished_again() {
    let mut driver = Driver::new();
    let frame = broadcast(100);
    driver.queue_data(TX_BUFFERS, &frame, EOP | RS, 0);
    let (state, rings) = (driver.bench.nic.save(), driver.bench.nic.save_rings());
    driver.ring();
    assert_eq!(
        (driver.sent(), driver.tx_status(0)),
        (vec![frame.clone()], 1)
    );
    driver.bench.nic.restore(state).unwrap();
    driver.bench.nic.restore_rings(&rings);
    assert_eq!((driver.tx_status(0), driver.bench.read(TDH)), (0, 0));
    // The driver that made the call again has the same frame sent again.
    driver.ring();
    assert_eq!((driver.sent(), driver.tx_status(0)), (vec![frame], 1));
}

#[test]
fn rings_that_are_not_in_use_are_left_alone() {
    let mut driver = Driver::new();
    driver.bench.write(TCTL, 0);
    let rings = driver.bench.nic.save_rings();
    // Whoever owns that memory now.
    driver.queue_data(TX_BUFFERS, &[], EOP, 0xff);
    driver.bench.nic.restore_rings(&rings);
    assert_eq!(driver.tx_status(0), 0xff);
}

#[test]
fn a_frame_that_waits_for_descriptors_goes_along() {
    let mut driver = Driver::with_rings(8, 8);
    driver.bench.write(RCTL, rctl::EN | rctl::BAM | 3 << 16);
    driver.bench.deliver(&broadcast(1000));
    driver.bench.deliver(&broadcast(1001));
    let mut twin = driver.twin();
    assert_eq!(twin.receive().unwrap().data[..1000], broadcast(1000));
    assert_eq!(twin.receive().unwrap().data[..1001], broadcast(1001));
}

#[test]
fn another_carrier_is_a_link_status_change() {
    let driver = Driver::new();
    let state = driver.bench.nic.save();
    let mut other = Driver::new();
    other.bench.far_end().plugged_in = false;
    other.bench.far_end().carrier = false;
    other.bench.nic.restore(state).unwrap();
    assert_eq!(other.bench.read(ICR), icr::LSC);
    assert_eq!(other.bench.read(STATUS) & status::LU, 0);
}

#[test]
fn a_damaged_state_is_refused_and_changes_nothing() {
    let mut driver = Driver::new();
    let state = serde_json::to_value(driver.bench.nic.save()).unwrap();
    driver.bench.write(VET, 0x1234);
    let before = driver.bench.nic.save();
    let damage: [(&str, serde_json::Value); 5] = [
        ("/eeprom/words", serde_json::json!([1, 2, 3])),
        ("/phy/registers", serde_json::json!([])),
        ("/held_frame", serde_json::json!(vec![0; 20_000])),
        ("/transmitter/options/finished_at", serde_json::json!(9)),
        ("/config/bytes", serde_json::json!([0])),
    ];
    for (place, value) in damage {
        let mut state = state.clone();
        *state.pointer_mut(place).unwrap() = value;
        let state = serde_json::from_value(state).unwrap();
        assert!(driver.bench.nic.restore(state).is_err(), "{place}");
        assert_eq!(driver.bench.nic.save(), before, "{place}");
    }
}

/// State and rings as [`crate::e1000::E1000::undo`] wants them.
fn part(driver: &Driver) -> crate::e1000::Moment {
    (driver.bench.nic.save(), driver.bench.nic.save_rings())
}

#[test]
fn parts_are_taken_back_around_what_was_done_in_between() {
    let mut driver = Driver::new();
    let first = (driver.bench.read(RCTL), driver.bench.read(TCTL));
    // A reset in two parts: off, and between them somebody else sets the filter table.
    let before = part(&driver);
    driver.bench.write(RCTL, first.0 & !rctl::EN);
    driver.bench.write(TCTL, first.1 & !tctl::EN);
    let off = part(&driver);
    driver.bench.write(MTA, 0x1234);
    let between = part(&driver);
    driver
        .bench
        .write(CTRL, driver.bench.nic.regs.get(CTRL) | ctrl::RST);
    driver.bench.write(MTA + 4, 0x5678);
    let reset = part(&driver);
    let parts = [(&before, &off), (&between, &reset)];
    driver.bench.nic.undo(&parts).unwrap();
    assert_eq!((driver.bench.read(RCTL), driver.bench.read(TCTL)), first);
    assert_eq!(driver.bench.read(MTA), 0x1234, "the other's");
    assert_eq!(driver.bench.read(MTA + 4), 0);
    // Rings and link are as they were: a frame goes through.
    driver.send(&broadcast(100));
    assert_eq!(driver.sent(), [broadcast(100)]);
    driver.bench.deliver(&broadcast(101));
    assert!(driver.receive().is_some());
}

#[test]
fn rings_that_were_used_in_between_are_not_taken_back() {
    let mut driver = Driver::new();
    let before = part(&driver);
    driver.bench.write(TDT, 0);
    driver.bench.write(RCTL, 0);
    let after = part(&driver);
    driver.bench.write(RCTL, rctl::EN | rctl::UPE);
    let now = driver.bench.nic.save();
    let error = driver.bench.nic.undo(&[(&before, &after)]).unwrap_err();
    assert!(matches!(error, crate::e1000::Error::UsedMeanwhile(RCTL)));
    assert_eq!(driver.bench.nic.save(), now, "all or nothing");
}

#[test]
fn a_frame_that_a_part_had_sent_is_sent_again() {
    let mut driver = Driver::new();
    let frame = broadcast(100);
    driver.queue_data(TX_BUFFERS, &frame, EOP | RS, 0);
    let before = part(&driver);
    driver.ring();
    let after = part(&driver);
    driver.bench.nic.undo(&[(&before, &after)]).unwrap();
    assert_eq!((driver.tx_status(0), driver.bench.read(TDH)), (0, 0));
    assert!(!driver.bench.interrupt());
}

#[test]
fn a_part_that_uses_the_transmitter_is_told_from_one_that_does_not() {
    let changes = |use_it: &dyn Fn(&mut Driver)| {
        let mut driver = Driver::new();
        let before = driver.bench.nic.save();
        use_it(&mut driver);
        before.transmits_otherwise(&driver.bench.nic.save())
    };
    assert!(changes(&|driver| driver.bench.write(TCTL, 0)));
    assert!(changes(&|driver| driver.bench.write(TDBAL, 0x3000)));
    assert!(changes(&|driver| driver.send(&broadcast(60))));
    // What a poll, an interrupt handler and a receiver do.
    assert!(!changes(&|driver| driver.bench.write(RDT, 3)));
    assert!(!changes(&|driver| driver.bench.write(IMC, u32::MAX)));
    assert!(!changes(&|driver| driver.bench.deliver(&broadcast(60))));
}
