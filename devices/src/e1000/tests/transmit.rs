use super::driver::*;
use crate::e1000::regs::*;

#[test]
fn a_frame_goes_out_and_is_reported() {
    let mut driver = Driver::new();
    driver.send(&broadcast(100));
    assert_eq!(driver.sent(), [broadcast(100)]);
    assert_eq!(driver.tx_status(0), 1);
    assert_eq!(driver.bench.read(ICR), icr::TXDW | icr::TXQE);
    assert_eq!(driver.bench.read(TDH), 1);
}

#[test]
fn a_short_frame_is_padded_if_asked_for() {
    let mut driver = Driver::new();
    driver.send(&broadcast(20));
    let mut expected = broadcast(20);
    expected.resize(60, 0);
    assert_eq!(driver.sent(), [expected]);
    driver.bench.write(TCTL, tctl::EN);
    driver.send(&broadcast(20));
    assert_eq!(driver.sent(), [broadcast(20)]);
}

#[test]
fn a_full_wire_loses_and_repeats_nothing() {
    let mut driver = Driver::with_rings(16, 64);
    driver.bench.far_end().room = Some(0);
    for i in 0..40u8 {
        let mut frame = broadcast(60);
        frame[20] = i;
        driver.queue_data(TX_BUFFERS + u64::from(i) * 64, &frame, EOP | RS, 0);
    }
    driver.ring();
    assert_eq!((driver.bench.read(TDH), driver.tx_status(0)), (0, 0));
    let mut numbers = Vec::new();
    while numbers.len() < 40 {
        driver.bench.far_end().room = Some(3);
        driver.bench.serve();
        numbers.extend(driver.sent().iter().map(|frame| frame[20]));
    }
    assert_eq!(numbers, (0..40).collect::<Vec<u8>>());
    assert_eq!(driver.bench.read(TDH), 40);
}

#[test]
fn a_new_head_forgets_the_packet_that_was_begun() {
    let mut driver = Driver::new();
    driver.queue_data(TX_BUFFERS, &broadcast(100), 0, 0);
    driver.ring();
    driver.open();
    driver.send(&broadcast(61));
    assert_eq!(driver.sent(), [broadcast(61)]);
}

#[test]
fn packets_that_cannot_be_are_dropped_and_the_ring_goes_on() {
    let mut driver = Driver::with_rings(16, 16);
    // Data outside of memory, more than a packet has, an unknown type, a runt.
    driver.queue(descriptor(1 << 40, EOP | RS | 100, 0));
    driver.queue(descriptor(TX_BUFFERS, 0xffff, 0));
    driver.queue(descriptor(TX_BUFFERS, EOP | RS | 100, 0));
    driver.queue(descriptor(TX_BUFFERS, EOP | RS | DEXT | 7 << 20 | 100, 0));
    driver.queue(descriptor(TX_BUFFERS, EOP | RS | 13, 0));
    driver.send(&broadcast(60));
    assert_eq!(driver.sent(), [broadcast(60)]);
    assert_eq!(driver.bench.read(TDH), 6);
}

#[test]
fn heads_and_tails_outside_of_the_ring_stop_it() {
    let mut driver = Driver::new();
    for (register, value) in [(TDT, 16), (TDH, 0xffff), (TDLEN, 0), (TDBAH, 0x8000_0000)] {
        driver.bench.write(register, value);
        driver.send(&broadcast(60));
        if register != TDT {
            assert!(driver.sent().is_empty(), "register {register:#x}");
        }
        driver.bench.write(TDBAH, 0);
        driver.open();
        driver.sent();
        driver.send(&broadcast(61));
        assert_eq!(driver.sent(), [broadcast(61)]);
    }
}

#[test]
fn the_longest_ring_of_the_largest_packets_takes_many_short_turns() {
    let mut driver = Driver::new();
    let count = 0xfff80 / 16;
    driver.bench.write(TDLEN, count * 16);
    // The ring covers memory that the test needs for nothing else; all of it says the same.
    let ring = 0x10_0000u64;
    driver.bench.write(TDBAL, ring as u32);
    let bytes = descriptor(0, EOP | 16288, 0).repeat(count as usize);
    driver.bench.dma.write(ring, &bytes).unwrap();
    driver.bench.write(TDT, count - 1);
    let first = driver.sent().len();
    assert!(
        (1..2000).contains(&first),
        "{first} packets in one register write"
    );
    for _ in 0..count {
        driver.bench.serve();
        driver.sent();
        if driver.bench.read(TDH) == count - 1 {
            return;
        }
    }
    panic!("the ring was not finished");
}
