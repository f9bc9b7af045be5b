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
