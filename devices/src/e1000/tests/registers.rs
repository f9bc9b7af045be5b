//! The driver's own self-test (`ethtool -t`), and resets.

use super::driver::{Driver, broadcast, descriptor};
use crate::e1000::bench::MAC;
use crate::e1000::regs::*;
use crate::e1000::stats::{GPTC, TPT};
use crate::pci::PciFunction;

const PATTERNS: [u32; 4] = [0x5a5a_5a5a, 0xa5a5_a5a5, 0, u32::MAX];

#[test]
fn registers_pass_the_drivers_pattern_test() {
    let mut driver = Driver::new();
    let bench = &mut driver.bench;
    bench.write(IMC, u32::MAX);
    bench.write(RCTL, 0);
    bench.write(TCTL, tctl::PSP);
    let status = bench.read(STATUS);
    bench.write(STATUS, 0xffff_f833);
    assert_eq!(bench.read(STATUS), status);
    let mut tests = vec![
        (FCAL, 0xffff_ffff, 0xffff_ffff),
        (FCAH, 0x0000_ffff, 0xffff_ffff),
        (FCT, 0x0000_ffff, 0xffff_ffff),
        (VET, 0x0000_ffff, 0xffff_ffff),
        (RDTR, 0x0000_ffff, 0xffff_ffff),
        (RDBAH, 0xffff_ffff, 0xffff_ffff),
        (RDLEN, 0x000f_ff80, 0x000f_ffff),
        (RDH, 0x0000_ffff, 0x0000_ffff),
        (RDT, 0x0000_ffff, 0x0000_ffff),
        (FCRTH, 0x0000_fff8, 0x0000_fff8),
        (FCTTV, 0x0000_ffff, 0x0000_ffff),
        (TIPG, 0x3fff_ffff, 0x3fff_ffff),
        (TDBAH, 0xffff_ffff, 0xffff_ffff),
        (TDLEN, 0x000f_ff80, 0x000f_ffff),
        (RDBAL, 0xffff_fff0, 0xffff_ffff),
        (TXCW, 0xc000_ffff, 0x0000_ffff),
        (TDBAL, 0xffff_fff0, 0xffff_ffff),
        (TIDV, 0x0000_ffff, 0x0000_ffff),
    ];
    tests.extend((0..15).map(|i| (RA + 8 * i + 4, 0x8003_ffff, 0xffff_ffff)));
    tests.extend((0..128).map(|i| (MTA + 4 * i, 0xffff_ffff, 0xffff_ffff)));
    for (register, mask, write) in tests {
        for pattern in PATTERNS {
            bench.write(register, pattern & write);
            assert_eq!(
                bench.read(register),
                pattern & write & mask,
                "register {register:#x}"
            );
        }
    }
    for (register, mask, write) in [
        (RCTL, u32::MAX, 0),
        (RCTL, 0x06df_b3fe, 0x003f_fffb),
        (TCTL, u32::MAX, 0),
    ] {
        bench.write(register, write & mask);
        assert_eq!(
            bench.read(register) & mask,
            write & mask,
            "register {register:#x}"
        );
    }
}

#[test]
fn each_cause_interrupts_when_it_is_unmasked_and_only_then() {
    let mut driver = Driver::new();
    let bench = &mut driver.bench;
    for i in 0..17 {
        let mask = 1 << i;
        bench.write(IMC, u32::MAX);
        bench.write(ICS, mask);
        assert!(!bench.interrupt());
        bench.write(IMS, mask);
        assert!(bench.interrupt());
        assert_eq!(bench.read(ICR), mask);
        assert!(!bench.interrupt(), "reading acknowledges");
        bench.write(ICS, !mask);
        assert!(!bench.interrupt());
        bench.write(ICR, !mask);
        assert_eq!(bench.read(ICR), 0, "writing ones clears");
    }
}

#[test]
fn the_throttle_delays_the_next_assertion_only() {
    let mut driver = Driver::new();
    let bench = &mut driver.bench;
    bench.write(ITR, 1000);
    bench.write(ICS, icr::RXT0);
    assert!(bench.interrupt());
    bench.read(ICR);
    bench.write(ICS, icr::RXT0);
    assert!(!bench.interrupt());
    bench.advance_ns(255_999);
    assert!(!bench.interrupt());
    bench.advance_ns(1);
    assert!(bench.interrupt());
    assert_eq!(bench.line_changes(), 3);
}

#[test]
fn interrupts_that_are_withheld_come_when_they_may_unless_they_are_over_by_then() {
    let mut driver = Driver::new();
    let bench = &mut driver.bench;
    bench.write(ICS, icr::RXT0);
    bench.nic.withhold_interrupts(true);
    assert!(!bench.interrupt(), "one that is asserted goes away too");
    bench.nic.withhold_interrupts(false);
    assert!(bench.interrupt());
    bench.nic.withhold_interrupts(true);
    assert_eq!(bench.read(ICR), icr::RXT0);
    bench.nic.withhold_interrupts(false);
    assert!(!bench.interrupt());
}

#[test]
fn a_frozen_line_follows_when_it_is_let_go() {
    let mut driver = Driver::new();
    let bench = &mut driver.bench;
    bench.nic.freeze_interrupts(true);
    bench.write(ICS, icr::RXT0);
    bench.read(ICR);
    bench.nic.freeze_interrupts(false);
    assert_eq!(bench.line_changes(), 0, "nobody saw it");
    bench.nic.freeze_interrupts(true);
    bench.write(ICS, icr::RXT0);
    assert!(!bench.interrupt());
    bench.nic.freeze_interrupts(false);
    assert!(bench.interrupt());
    // A reset lets go of it.
    bench.nic.freeze_interrupts(true);
    bench.nic.reset();
    assert!(!bench.interrupt());
}

#[test]
fn the_command_register_can_mask_the_line() {
    let mut driver = Driver::new();
    driver.bench.write(ICS, icr::RXT0);
    driver.bench.nic.config_write(4, &[0x07, 0x04]);
    assert!(!driver.bench.interrupt());
    let mut status = [0; 2];
    driver.bench.nic.config_read(6, &mut status);
    assert_eq!(status[0] & 8, 8, "the interrupt is still pending");
    driver.bench.nic.config_write(4, &[0x07, 0x00]);
    assert!(driver.bench.interrupt());
}

#[test]
fn device_reset_through_the_io_window() {
    let mut driver = Driver::new();
    driver.bench.write(RA, 0xdead_beef);
    driver.bench.write(MTA, 5);
    driver.bench.nic.bar_write(2, 0, &CTRL.to_le_bytes());
    driver
        .bench
        .nic
        .bar_write(2, 4, &(ctrl::RST | ctrl::SLU).to_le_bytes());
    let bench = &mut driver.bench;
    assert_eq!(bench.read(CTRL) & (ctrl::RST | ctrl::SLU), 0);
    assert_eq!(
        (bench.read(RCTL), bench.read(IMS), bench.read(ICR)),
        (0, 0, 0)
    );
    assert_eq!(bench.read(MTA), 5);
    let address = [
        bench.read(RA).to_le_bytes(),
        bench.read(RA + 4).to_le_bytes(),
    ]
    .concat();
    assert_eq!(
        (&address[..6], address[7]),
        (&MAC[..], 0x80),
        "the address is loaded again"
    );
    assert_eq!(bench.read_phy(1) & 0x20, 0x20, "the PHY is left alone");
    driver.open();
    driver.send(&broadcast(60));
    assert_eq!(driver.sent().len(), 1);
}

#[test]
fn loopback_through_the_phy_brings_frames_back() {
    let mut driver = Driver::new();
    let bench = &mut driver.bench;
    bench.write_phy(16, 0x0808);
    bench.write_phy(0, 0x9140);
    bench.write_phy(0, 0x8140);
    bench.write_phy(0, 0x4140);
    assert_eq!(bench.read_phy(0), 0x4140);
    bench.set_bits(CTRL, ctrl::FRCSPD | ctrl::FRCDPX | 1 << 7);
    bench.write_phy(29, 0x1f);
    assert_eq!(bench.read_phy(29), 0x1f);
    for _ in 0..40 {
        driver.send(&broadcast(1024));
        assert!(driver.sent().is_empty(), "nothing goes over the wire");
        assert_eq!(driver.receive().unwrap().data[..1024], broadcast(1024));
    }
}

#[test]
fn a_sleeping_function_does_nothing_and_wakes_up_reset() {
    let mut driver = Driver::new();
    let place = 0xc000_0000u32.to_le_bytes();
    driver.bench.nic.config_write(0x10, &place);
    driver.bench.nic.config_write(4, &[0x07, 0x00]);
    let memory = driver.bench.nic.decoded()[0];
    assert!(!driver.bench.nic.sleeps_at(memory.address));
    driver.bench.nic.config_write(0xe0, &[3, 0]);
    assert!(driver.bench.nic.decoded().is_empty());
    // Where its registers would be is still known.
    let last = memory.address + memory.size_bytes - 1;
    assert!(driver.bench.nic.sleeps_at(memory.address) && driver.bench.nic.sleeps_at(last));
    assert!(!driver.bench.nic.sleeps_at(last + 1) && !driver.bench.nic.sleeps_at(0));
    driver.bench.deliver(&broadcast(60));
    driver.bench.nic.config_write(0xe0, &[0, 0]);
    assert_eq!(driver.bench.read(RCTL), 0);
    assert_eq!(driver.receive(), None);
}

#[test]
fn without_bus_mastering_nothing_moves() {
    let mut driver = Driver::new();
    driver.bench.nic.config_write(4, &[0x03, 0x00]);
    driver.send(&broadcast(60));
    driver.bench.deliver(&broadcast(60));
    assert!(driver.sent().is_empty());
    assert_eq!(driver.receive(), None);
    driver.bench.nic.config_write(4, &[0x07, 0x00]);
    assert_eq!(driver.sent().len(), 1);
    assert!(driver.receive().is_some());
}

#[test]
fn statistics_count_and_clear() {
    let mut driver = Driver::new();
    driver.queue(descriptor(0, 0, 0));
    driver.send(&broadcast(60));
    assert_eq!((driver.bench.read(GPTC), driver.bench.read(TPT)), (1, 1));
    assert_eq!((driver.bench.read(GPTC), driver.bench.read(TPT)), (0, 0));
}

#[test]
fn parts_of_registers_can_be_read_but_not_written() {
    let mut driver = Driver::new();
    let nic = &mut driver.bench.nic;
    let mut byte = [0];
    nic.bar_read(0, u64::from(VET) + 1, &mut byte);
    assert_eq!(byte, [0x81]);
    nic.bar_write(0, u64::from(VET), &[1, 2]);
    nic.bar_write(0, u64::from(VET) + 2, &[1, 2, 3, 4]);
    let mut both = [0; 8];
    nic.bar_read(0, u64::from(VET) - 4, &mut both);
    assert_eq!(both, [0, 0, 0, 0, 0, 0x81, 0, 0]);
    nic.bar_read(0, u64::MAX - 3, &mut both);
}
