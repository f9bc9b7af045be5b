//! States that are stored and come back as they were, or as something else.

use super::*;
use crate::pci::registers::{RegisterCheckpoint, SavedRing};

const CTRL_EXT: u32 = 0x0018;
const RST: u32 = 1 << 26;

/// Through bytes, as in a snapshot.
fn reopen(
    description: &Description,
    registers: &RegisterCheckpoint,
    shown: &Shown,
) -> Result<(RegisterCheckpoint, Shown), CheckpointError> {
    let stored = StoredState::new(registers, shown);
    let bytes = postcard::to_stdvec(&stored).unwrap();
    let read: StoredState = postcard::from_bytes(&bytes).unwrap();
    read.open(description)
}

#[test]
fn what_a_driver_did_with_an_image_is_there_again() {
    let description = description();
    let survey = surveyed(&description);
    let mut parked = park(&description, &survey, &mut Fake::new(), ParkedLink::Stays);
    store(&mut parked, TDT, 7);
    store(&mut parked, MDIC, mdic::WRITE | 1 << 21 | 4 << 16 | 0xde1);
    store(&mut parked, EERD, 1);
    let registers = parked.into_checkpoint();
    assert!(registers.image.stored.contains(&TDT) && registers.image.stored_phy != 0);
    assert!(!registers.image.asked.is_empty());
    let again = reopen(&description, &registers, survey.shown()).unwrap();
    assert_eq!(again, (registers, survey.shown().clone()));
}

#[test]
fn nothing_is_left_of_a_stored_state_that_cannot_have_been_taken() {
    let description = description();
    let survey = surveyed(&description);
    let mut registers = survey.fresh().clone();
    for (_, values) in &mut registers.registers {
        values.fill(u32::MAX);
    }
    registers
        .phy
        .iter_mut()
        .for_each(|(_, value)| *value = u16::MAX);
    let name = description.ring[0].name.clone();
    registers.rings.push(SavedRing {
        name,
        address: 0x1000,
        contents: vec![0xff; 16],
    });
    registers.image.stored.extend([TDT, STATUS, u32::MAX]);
    registers
        .image
        .asked
        .extend([(CTRL, RST), (EERD, 1), (u32::MAX, 1)]);
    let mut shown = survey.shown().clone();
    shown.asked.insert(CTRL, RST);
    shown.phy.extend([(1, 4), (31, 4), (200, 4)]);
    let (registers, shown) = reopen(&description, &registers, &shown).unwrap();
    let values = registers.by_offset(&description);
    assert_eq!(values[&CTRL], !RST);
    assert_eq!(values[&CTRL_EXT], 0xffff_cfff);
    assert_eq!(registers.phy.last().unwrap().1, 0x7dff);
    assert!(registers.rings.is_empty());
    assert_eq!(registers.image.stored, [TDT].into());
    assert_eq!(registers.image.asked, [(EERD, 1)].into());
    assert!(!shown.asked.contains_key(&CTRL));
    assert_eq!(shown.phy, [(1, 4)].into());
}

#[test]
fn a_state_of_another_device_is_refused() {
    let description = description();
    let survey = surveyed(&description);
    let mut other = survey.fresh().clone();
    other.version += 1;
    reopen(&description, &other, survey.shown()).unwrap_err();
    let mut short = survey.fresh().clone();
    short.registers.pop();
    reopen(&description, &short, survey.shown()).unwrap_err();
    let mut long = survey.fresh().clone();
    long.registers[0].1.push(0);
    reopen(&description, &long, survey.shown()).unwrap_err();
}
