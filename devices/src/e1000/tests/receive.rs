use super::driver::{Driver, broadcast};
use crate::e1000::checksum::fcs;
use crate::e1000::regs::*;
use crate::e1000::stats::{GPRC, MPC, RNBC};

#[test]
fn a_frame_arrives_padded_with_its_fcs() {
    let mut driver = Driver::new();
    driver.bench.deliver(&broadcast(42));
    assert!(driver.bench.interrupt());
    assert_eq!(driver.bench.read(ICR), icr::RXT0);
    let mut expected = broadcast(42);
    expected.resize(60, 0);
    expected.extend_from_slice(&fcs(&expected));
    let received = driver.receive().unwrap();
    assert_eq!((received.data, received.status), (expected, 0x07));
}

#[test]
fn a_stripped_fcs_is_not_there() {
    let mut driver = Driver::new();
    driver.bench.write(RCTL, rctl::EN | rctl::BAM | rctl::SECRC);
    driver.bench.deliver(&broadcast(100));
    assert_eq!(driver.receive().unwrap().data, broadcast(100));
}

#[test]
fn frames_wait_on_the_wire_for_descriptors() {
    let mut driver = Driver::with_rings(8, 8);
    for i in 0..50 {
        let mut frame = broadcast(60);
        frame[20] = i;
        driver.bench.far_end().to_nic.push_back(frame);
    }
    driver.bench.serve();
    assert_eq!(
        driver.bench.far_end().to_nic.len(),
        43,
        "a ring of 8 holds 7"
    );
    for i in 0..50 {
        assert_eq!(driver.receive().unwrap().data[20], i);
    }
    assert_eq!(driver.receive(), None);
    assert_eq!((driver.bench.read(GPRC), driver.bench.read(MPC)), (50, 0));
}

#[test]
fn a_jumbo_frame_takes_several_buffers_and_waits_for_enough() {
    let mut driver = Driver::with_rings(16, 8);
    driver.bench.write(RCTL, rctl::EN | rctl::BAM | rctl::LPE);
    // 7 of 15 descriptors go to small frames, so 8 are left; 16000 bytes need 8.
    for _ in 0..8 {
        driver.bench.deliver(&broadcast(60));
    }
    let jumbo = broadcast(16000);
    driver.bench.deliver(&jumbo);
    assert_eq!(driver.bench.read(RNBC), 1);
    for _ in 0..8 {
        assert_eq!(driver.receive().unwrap().data.len(), 64);
    }
    assert_eq!(driver.receive().unwrap().data[..16000], jumbo);
    assert_eq!(driver.bench.read(RNBC), 0, "waiting counts once");
}

#[test]
fn a_frame_that_never_fits_is_missed() {
    let mut driver = Driver::with_rings(8, 8);
    driver
        .bench
        .write(RCTL, rctl::EN | rctl::BAM | rctl::LPE | 3 << 16);
    driver.bench.deliver(&broadcast(2000));
    driver.bench.deliver(&broadcast(60));
    assert_eq!(driver.bench.read(MPC), 1);
    assert_eq!(driver.bench.read(ICR) & icr::RXO, icr::RXO);
    assert_eq!(driver.receive().unwrap().data.len(), 64);
}

#[test]
fn a_vlan_tag_is_stripped_into_the_descriptor() {
    let mut driver = Driver::new();
    driver.bench.set_bits(CTRL, ctrl::VME);
    let mut frame = broadcast(100);
    frame[12..16].copy_from_slice(&[0x81, 0x00, 0x60, 0x2a]);
    driver.bench.deliver(&frame);
    let received = driver.receive().unwrap();
    assert_eq!((received.status & 8, received.special), (8, 0x602a));
    let mut expected = frame.clone();
    expected.drain(12..16);
    assert_eq!(received.data[..96], expected);
    assert_eq!(received.data[96..], fcs(&frame));
}

#[test]
fn the_low_descriptor_threshold_is_reported_once() {
    let mut driver = Driver::with_rings(16, 8);
    for i in 0..15 {
        driver.bench.deliver(&broadcast(60));
        let low = driver.bench.read(ICR) & icr::RXDMT0 != 0;
        assert_eq!(
            low,
            i == 6,
            "15 descriptors, half of the ring is left after the 7th"
        );
    }
}

#[test]
fn the_receive_delay_restarts_and_the_absolute_one_does_not() {
    let mut driver = Driver::new();
    driver.bench.write(RDTR, 100);
    driver.bench.write(RADV, 150);
    driver.bench.deliver(&broadcast(60));
    driver.bench.advance_ns(90 * 1024);
    assert!(!driver.bench.interrupt());
    driver.bench.deliver(&broadcast(60));
    driver.bench.advance_ns(59 * 1024);
    assert!(!driver.bench.interrupt());
    driver.bench.advance_ns(1024);
    assert!(driver.bench.interrupt(), "the absolute delay is over");
    driver.bench.read(ICR);
    driver.bench.advance_ns(1 << 30);
    assert!(!driver.bench.interrupt(), "one interrupt for both");
    driver.bench.deliver(&broadcast(60));
    driver.bench.write(RDTR, FPD | 100);
    assert!(driver.bench.interrupt(), "flushed");
}

#[test]
fn frames_are_lost_while_nobody_listens() {
    let mut driver = Driver::new();
    driver.bench.write(RCTL, 0);
    driver.bench.deliver(&broadcast(60));
    driver.bench.write(RCTL, rctl::EN | rctl::BAM);
    assert_eq!(driver.receive(), None);
    assert!(driver.bench.far_end().to_nic.is_empty());
}

#[test]
fn heads_and_tails_outside_of_the_ring_stop_it() {
    let mut driver = Driver::new();
    for (register, value) in [(RDT, 16), (RDH, 16), (RDH, 0xffff), (RDLEN, 0)] {
        driver.bench.write(register, value);
        driver.bench.deliver(&broadcast(60));
        assert_eq!(driver.receive(), None);
        driver.open();
        assert!(driver.receive().is_some(), "it waited on the wire");
    }
}

#[test]
fn a_new_head_forgets_the_frame_that_waited() {
    let mut driver = Driver::with_rings(8, 8);
    driver
        .bench
        .write(RCTL, rctl::EN | rctl::BAM | rctl::LPE | 3 << 16);
    for _ in 0..3 {
        driver.bench.deliver(&broadcast(1000));
    }
    assert_eq!(
        driver.bench.read(RNBC),
        1,
        "the second needs 4 of 3 descriptors"
    );
    driver.open();
    assert_eq!(
        driver.receive().unwrap().data.len(),
        1004,
        "the third, from the wire"
    );
    assert_eq!(driver.receive(), None);
}
