//! An image against a device whose registers behave as the 82574L's do where it matters.

mod driver;
mod histories;
mod stored;

use super::bench::*;
use super::*;
use crate::pci::registers::RegisterAccess;
use crate::pci::registers::mdio::mdic;

pub(super) const EIAC: u32 = 0x00dc;
pub(super) const IVAR: u32 = 0x00e4;
pub(super) const TDT: u32 = 0x3818;
const LINK_UP: u32 = 0x2;
const TXOFF: u32 = 0x10;
const LINK_CHANGE: u32 = 0x0100_0004;
const ASSERTED: u32 = 1 << 31;

/// Gives the device to its user again.
pub(super) fn unpark(description: &Description, device: &mut Fake, parked: Parked) {
    let saved = parked.into_checkpoint();
    give(description, device, &saved);
}

fn down() -> Parked {
    let description = description();
    let survey = surveyed(&description);
    park(&description, &survey, &mut Fake::new(), ParkedLink::Down)
}

fn phy(parked: &mut Parked, number: u32) -> u32 {
    store(parked, MDIC, mdic::READ | 1 << 21 | number << 16);
    load(parked, MDIC)
}

#[test]
fn the_link_goes_with_an_interrupt_once() {
    let mut parked = down();
    assert!(!parked.interrupt_due(), "it is masked");
    store(&mut parked, IMS, LINK_CHANGE);
    assert!(parked.interrupt_due());
    assert_eq!(load(&mut parked, STATUS) & LINK_UP, 0);
    assert_eq!(phy(&mut parked, 1) & 0x24, 0, "BMSR");
    assert_eq!(phy(&mut parked, 5) & 0xffff, 0, "what the partner can do");
    assert_eq!(phy(&mut parked, 2) & 0xffff, 0x141, "its identifier stays");
    assert_eq!(load(&mut parked, ICR), LINK_CHANGE | ASSERTED);
    assert_eq!(load(&mut parked, ICR), 0);
    assert!(!parked.interrupt_due());
    parked.lose_link();
    assert!(!parked.interrupt_due(), "it has gone already");
}

#[test]
fn a_link_that_stays_looks_paused_and_can_be_lost() {
    let description = description();
    let survey = surveyed(&description);
    let mut device = Fake::new();
    device.phy[5] = 0x4de1;
    device.store(IMS, LINK_CHANGE);
    let mut parked = park(&description, &survey, &mut device, ParkedLink::Stays);
    assert!(!parked.interrupt_due());
    let status = load(&mut parked, STATUS);
    assert_eq!(status & (LINK_UP | TXOFF), LINK_UP | TXOFF);
    assert_eq!(phy(&mut parked, 1) & 0x24, 0x24);
    assert_eq!(phy(&mut parked, 5) & 0xffff, 0x4de1, "as it is now");
    parked.lose_link();
    assert!(parked.interrupt_due());
    assert_eq!(load(&mut parked, STATUS) & (LINK_UP | TXOFF), 0);
    assert_eq!(phy(&mut parked, 1) & 0x24, 0);
}

#[test]
fn messages_go_to_the_vectors_of_their_causes_and_once() {
    let mut parked = down();
    store(&mut parked, IVAR, 0x0008_090a | 0x3 << 16);
    store(&mut parked, EIAC, 0x0050_0000);
    assert_eq!(parked.take_messages(), 0);
    store(&mut parked, IMS, LINK_CHANGE | 0x0050_0000);
    assert_eq!(parked.take_messages(), 1 << 3, "Other is the fourth vector");
    assert_eq!(parked.take_messages(), 0);
    store(&mut parked, ICS, 0x0010_0000);
    assert_eq!(parked.take_messages(), 1 << 2, "RxQ0");
    assert_eq!(
        load(&mut parked, ICR),
        LINK_CHANGE | ASSERTED,
        "RxQ0 is cleared"
    );
    store(&mut parked, ICS, 0x0040_0000);
    store(&mut parked, IMC, u32::MAX);
    assert_eq!(parked.take_messages(), 0);
    store(&mut parked, IMS, 0x0040_0000);
    assert_eq!(
        parked.take_messages(),
        1 << 1,
        "TxQ0, when it is not masked any more"
    );
}

#[test]
fn bus_mastering_stops_at_once_and_semaphores_are_had() {
    let mut parked = down();
    assert_eq!(load(&mut parked, STATUS) & MASTER, MASTER);
    let ctrl = load(&mut parked, CTRL);
    store(&mut parked, CTRL, ctrl | 4);
    assert_eq!(load(&mut parked, STATUS) & MASTER, 0);
    store(&mut parked, EXTCNF_CTRL, 0x20);
    assert_eq!(load(&mut parked, EXTCNF_CTRL) & 0x20, 0x20);
    assert_eq!(load(&mut parked, SWSM) & 1, 0, "free, and taken by that");
    assert_eq!(load(&mut parked, SWSM) & 1, 1);
    store(&mut parked, SWSM, 0);
    assert_eq!(load(&mut parked, SWSM) & 1, 0);
}

#[test]
fn a_reset_brings_the_context_s_own_address_back_and_keeps_nothing() {
    let description = description();
    let address = [2, 0, 0, 0, 0, 0x17];
    let survey = Survey::clone(&surveyed(&description));
    let survey = Arc::new(survey.with_address(&description, address));
    let mut device = Fake::new();
    let mut parked = park(&description, &survey, &mut device, ParkedLink::Down);
    for at in [RAL, TDT, 0x5600, 0x2800] {
        store(&mut parked, at, 0xa5a5_a5a5);
    }
    store(&mut parked, IMS, u32::MAX);
    store(&mut parked, CTRL, 0x0410_0240);
    assert_eq!(load(&mut parked, CTRL) & 1 << 26, 0, "reset is over");
    assert!(!parked.interrupt_due());
    assert_eq!(load(&mut parked, IMS), 0);
    assert_eq!(load(&mut parked, TDT), 0);
    let (low, high) = (load(&mut parked, RAL), load(&mut parked, RAH));
    assert_eq!((low, high), (2, 0x8000_1700));
    let mut sum = 0u16;
    for (number, expected) in (0..64).zip([2, 0, 0x1700].map(Some).into_iter().chain([None; 61])) {
        store(&mut parked, EERD, number << 2 | 1);
        let answer = load(&mut parked, EERD);
        assert_eq!(answer & 2, 2);
        let word = (answer >> 16) as u16;
        assert!(expected.is_none_or(|expected| word == expected));
        sum = sum.wrapping_add(word);
    }
    assert_eq!(sum, 0xbaba);
    assert_eq!(
        *parked
            .into_checkpoint()
            .by_offset(&description)
            .get(&0x5600)
            .unwrap(),
        0
    );
}

#[test]
fn packet_memory_shows_what_is_left() {
    let mut parked = down();
    assert_eq!(load(&mut parked, PBA), 0x0014_0014);
    store(&mut parked, PBA, 36);
    assert_eq!(load(&mut parked, PBA), 4 << 16 | 36);
    store(&mut parked, PBA, u32::MAX);
    assert_eq!(load(&mut parked, PBA), 0xffff);
}

#[test]
fn what_the_driver_was_about_to_read_is_still_there_after_each_change() {
    let description = description();
    let survey = surveyed(&description);
    let mut device = Fake::new();
    // It asks, and then has not got the device any more.
    device.store(MDIC, mdic::READ | 1 << 21 | 2 << 16);
    device.store(EERD, 4 << 2 | 1);
    let mut parked = park(&description, &survey, &mut device, ParkedLink::Down);
    assert_eq!(
        load(&mut parked, MDIC) & 0x101f_ffff,
        mdic::READY | 2 << 16 | 0x141
    );
    assert_eq!(load(&mut parked, EERD), 0x1234 << 16 | 4 << 2 | 2);
    store(&mut parked, MDIC, mdic::READ | 1 << 21 | 3 << 16);
    store(&mut parked, EERD, 2 << 2 | 1);
    unpark(&description, &mut device, parked);
    assert_eq!(
        device.load(MDIC) & 0x101f_ffff,
        mdic::READY | 3 << 16 | 0xcb1
    );
    assert_eq!(device.load(EERD), 0x5634 << 16 | 2 << 2 | 2);
}

#[test]
fn a_phy_without_a_register_or_another_phy_answers_with_an_error_and_its_pages_are_apart() {
    let mut parked = down();
    store(&mut parked, MDIC, mdic::READ | 2 << 21 | 1 << 16);
    assert_ne!(load(&mut parked, MDIC) & mdic::ERROR, 0);
    store(&mut parked, MDIC, mdic::WRITE | 1 << 21 | 16 << 16 | 0x60);
    assert_eq!(phy(&mut parked, 16) & 0xffff, 0x60);
    store(&mut parked, MDIC, mdic::WRITE | 1 << 21 | 22 << 16 | 2);
    assert_eq!(phy(&mut parked, 16) & 0xffff, 0);
    assert_eq!(phy(&mut parked, 2) & 0xffff, 0x141);
    store(&mut parked, MDIC, mdic::WRITE | 1 << 21 | 1 << 16 | 0xffff);
    assert_eq!(
        phy(&mut parked, 1) & 0x24,
        0,
        "the link is not the guest's to make"
    );
}

#[test]
fn parts_of_registers_are_read_and_not_written() {
    let mut parked = down();
    store(&mut parked, RAL, 0x4433_2211);
    store(&mut parked, RAH, 0x8877_6655);
    let mut data = [0; 6];
    parked.read(u64::from(RAL) + 1, &mut data);
    assert_eq!(data, [0x22, 0x33, 0x44, 0x55, 0x66, 0x77]);
    for (offset, bytes) in [(0, 1), (0, 2), (2, 2), (1, 4), (0, 3)] {
        parked.write(u64::from(RAL) + offset, &[0xff; 4][..bytes]);
    }
    assert_eq!(load(&mut parked, RAL), 0x4433_2211);
    parked.write(u64::from(RAL), &[7; 8]);
    assert_eq!(load(&mut parked, RAH), 0x0707_0707);
    let mut end = [1; 8];
    parked.read(u64::MAX - 3, &mut end);
    assert_eq!(end, [0; 8]);
    parked.write(u64::MAX - 3, &[1; 64]);
}

#[test]
fn a_device_that_holds_less_than_a_guest_stored_is_given_its_state_all_the_same() {
    let description = description();
    let survey = surveyed(&description);
    let mut device = Fake::new();
    let mut parked = park(&description, &survey, &mut device, ParkedLink::Down);
    for at in (0..0x2_0000).step_by(4).filter(|at| *at != CTRL) {
        store(&mut parked, at, u32::MAX);
    }
    // All but the resets.
    store(&mut parked, CTRL, 0x7bff_ffff);
    for number in 0..32 {
        store(
            &mut parked,
            MDIC,
            mdic::WRITE | 1 << 21 | number << 16 | 0xffff,
        );
    }
    device.lacks = 0x00f0_0000;
    let saved = parked.into_checkpoint();
    description.load(&mut device, &saved).unwrap();
    let rest = [(RCTL, 2), (TCTL, 2), (IMS, u32::MAX)];
    assert!(
        rest.iter().all(|(at, bits)| device.get(*at) & bits == 0),
        "it stands still"
    );
    description.resume(&mut device, &saved).unwrap();
    assert_eq!(device.get(TCTL), 0xff0f_ffff);
    assert_eq!(device.phy[0], 0x7dff);
    // What no guest stored is still looked at.
    let mut device = Fake::new();
    let mut other = park(&description, &survey, &mut device, ParkedLink::Down);
    store(&mut other, TDT, 7);
    let saved = other.into_checkpoint();
    device.registers.insert(RAL, 0);
    device.lacks = 0x2;
    assert!(description.load(&mut device, &saved).is_err());
}

#[test]
fn a_device_that_does_not_answer_has_no_image() {
    let description = description();
    let mut device = Fake::new();
    device.nvm.truncate(8);
    let survey = description.survey(&mut device);
    assert_eq!(survey, Err(CheckpointError::NoNvm(8)));
    let other = Description::intel_82540em().unwrap();
    let survey = surveyed(&description);
    let saved = survey.fresh().clone();
    let parked = Parked::new(
        Arc::new(other),
        survey.clone(),
        saved,
        survey.shown(),
        ParkedLink::Down,
    );
    assert!(matches!(parked, Err(CheckpointError::NoImage(_))));
}

#[test]
fn a_description_whose_image_contradicts_itself_is_refused() {
    let whole = include_str!("../../../../models/82574l.toml");
    let (rest, parked) = whole.split_once("[parked.link]").unwrap();
    for (from, to, why) in [
        (
            "offset = 0x0008",
            "offset = 0x0004",
            "none of the registers",
        ),
        ("mask = 0x00d0", "mask = 0x00c8", "not saved"),
        ("raise = 0x00c8", "raise = 0x00c4", "part of the state"),
        ("raise = 0x00c8", "raise = 0x00c0", "another meaning"),
        ("block = 0x00d8", "block = 0x20000", "no aligned registers"),
        (
            "shift = 16, vector = 0x7",
            "shift = 30, vector = 0x7",
            "no such field",
        ),
        ("bits = 0x04000000", "beats = 0x04000000", "unknown field"),
        ("offset = 0x1000\n", "offset = 0x1004\n", "not saved"),
        (
            "value = 0x2\n",
            "value = 0x2\ncount = 0\n",
            "no aligned registers",
        ),
        ("page = 22", "page = 32", "no such register"),
        ("words = 2048", "words = 32", "lie outside"),
        ("words = 2048", "words = 0xffffffff", "lie outside"),
        ("number_shift = 2", "number_shift = 32", "lie outside"),
        ("done = 0x2", "done = 0", "lie outside"),
    ] {
        assert!(parked.contains(from), "{from}");
        let changed = parked.replacen(from, to, 1);
        let error = Description::parse(&format!("{rest}[parked.link]{changed}")).unwrap_err();
        assert!(error.to_string().contains(why), "{to}: {error}");
    }
}
