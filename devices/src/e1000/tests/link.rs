use std::time::Duration;

use super::driver::{Driver, EOP, MEMORY_BYTES, RS, TX_BUFFERS, broadcast};
use crate::e1000::E1000Config;
use crate::e1000::bench::{Bench, MAC};
use crate::e1000::regs::*;
use crate::pci::PciFunction;

#[test]
fn a_pulled_cable_shows_as_a_link_status_change() {
    let mut driver = Driver::new();
    assert!(driver.bench.read(STATUS) & status::LU != 0);
    driver.bench.far_end().plugged_in = false;
    driver.bench.serve();
    assert_eq!(driver.bench.read(STATUS) & status::LU, 0);
    assert!(driver.bench.interrupt());
    assert_eq!(driver.bench.read(ICR), icr::LSC);
    driver.bench.far_end().plugged_in = true;
    driver.bench.serve();
    assert_eq!(driver.bench.read(ICR), icr::LSC);
    assert_eq!(
        driver.bench.read_phy(1) & 4,
        0,
        "the PHY remembers the loss"
    );
    assert_eq!(driver.bench.read_phy(1) & 0x24, 0x24);
}

#[test]
fn autonegotiation_takes_the_time_that_was_configured() {
    let config = E1000Config {
        autonegotiation: Duration::from_millis(3),
        ..E1000Config::new(MAC)
    };
    let mut bench = Bench::new(MEMORY_BYTES, config).unwrap();
    bench.set_bits(CTRL, ctrl::SLU);
    bench.write(IMS, icr::LSC);
    bench.write_phy(0, 0x1340);
    bench.advance_ns(2_900_000);
    assert_eq!(
        (bench.read(STATUS) & status::LU, bench.read_phy(1) & 0x24),
        (0, 0)
    );
    bench.advance_ns(100_000);
    assert!(bench.interrupt());
    assert_eq!(
        bench.read(STATUS),
        status::LU | status::FD | 2 << 6 | 2 << 8
    );
    // Gigabit, full duplex, resolved, link; the partner's PAUSE.
    assert_eq!(bench.read_phy(17), 0xac00);
    assert_eq!(bench.read_phy(5) & 0x0c00, 0x0c00);
}

#[test]
fn descriptors_wait_for_the_link() {
    let mut driver = Driver::new();
    driver.bench.far_end().plugged_in = false;
    driver.bench.serve();
    driver.send(&broadcast(60));
    assert!(driver.sent().is_empty());
    driver.bench.far_end().plugged_in = true;
    driver.bench.serve();
    assert_eq!(driver.sent(), [broadcast(60)]);
}

#[test]
fn a_wire_that_learns_in_sending_that_it_is_cut_keeps_the_rest() {
    let mut driver = Driver::new();
    for i in 0..3 {
        driver.queue_data(TX_BUFFERS + 64 * i, &broadcast(60), EOP | RS, 0);
    }
    driver.bench.far_end().plugged_in = false;
    driver.ring();
    assert_eq!(driver.bench.read(STATUS) & status::LU, 0);
    assert_eq!(
        driver.bench.read(TDH),
        1,
        "the first is lost, the others wait"
    );
    driver.bench.far_end().plugged_in = true;
    driver.bench.serve();
    assert_eq!(driver.sent().len(), 2);
}

#[test]
fn a_powered_down_phy_has_no_link() {
    let mut driver = Driver::new();
    driver.bench.write_phy(0, 0x1940);
    assert_eq!(driver.bench.read(STATUS) & status::LU, 0);
    driver.bench.write_phy(0, 0x1140);
    assert_ne!(driver.bench.read(STATUS) & status::LU, 0);
}

#[test]
fn mdic_reports_an_absent_phy_and_interrupts_when_asked() {
    let mut driver = Driver::new();
    driver.bench.write(IMS, icr::MDAC);
    driver
        .bench
        .write(MDIC, 2 << 21 | mdic::OP_READ | mdic::INTERRUPT);
    assert_eq!(
        driver.bench.read(MDIC) & (mdic::READY | mdic::ERROR),
        mdic::READY | mdic::ERROR
    );
    assert!(driver.bench.interrupt());
}

/// PHY Control with autonegotiation, gigabit, full duplex, and with power down.
const POWERED: u16 = 0x1140;
const POWERED_DOWN: u16 = POWERED | 1 << 11;

#[test]
fn the_far_end_sees_a_phy_that_is_powered_down_or_begins_anew() {
    let mut driver = Driver::new();
    assert_eq!(driver.bench.far_end().nic_link.last(), Some(&true));
    driver.bench.far_end().nic_link.clear();
    driver.bench.write_phy(0, POWERED_DOWN);
    driver.bench.write_phy(0, POWERED);
    driver.bench.write_phy(0, POWERED | 1 << 9);
    driver.bench.nic.reset();
    assert_eq!(
        driver.bench.far_end().nic_link,
        [false, true, false, true, false, true]
    );
}

#[test]
fn a_loss_of_a_held_link_that_stays_done_is_seen_afterwards() {
    let mut driver = Driver::new();
    let nic = |driver: &mut Driver, missed| {
        driver.bench.far_end().nic_link.clear();
        driver.bench.nic.hold_link();
        driver.bench.write_phy(0, POWERED_DOWN);
        driver.bench.nic.hold_link();
        driver.bench.write_phy(0, POWERED);
        driver.bench.nic.let_link_go(missed);
        driver.bench.far_end().nic_link.clone()
    };
    assert_eq!(nic(&mut driver, true), [false, true]);
    assert_eq!(nic(&mut driver, false), [true; 0]);
    // Nothing is left over from the time before.
    driver.bench.nic.hold_link();
    driver.bench.nic.let_link_go(true);
    assert_eq!(driver.bench.far_end().nic_link, [true; 0]);
}

#[test]
fn a_link_that_is_held_stays_for_the_far_end_but_not_for_the_guest() {
    let mut driver = Driver::new();
    driver.bench.far_end().nic_link.clear();
    driver.bench.nic.hold_link();
    driver.bench.write_phy(0, POWERED_DOWN);
    assert_eq!(driver.bench.read(STATUS) & status::LU, 0);
    driver.bench.write_phy(0, POWERED);
    driver.bench.nic.reset();
    driver.bench.nic.let_link_go(false);
    assert_eq!(driver.bench.far_end().nic_link, [true; 0]);
    driver.bench.nic.hold_link();
    driver.bench.write_phy(0, POWERED_DOWN);
    driver.bench.nic.let_link_go(false);
    assert_eq!(driver.bench.far_end().nic_link, [false]);
}
