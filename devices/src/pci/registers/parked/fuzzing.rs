//! An image under any accesses, with switches in between: for fuzzing, and for a test with random
//! ones.

use super::super::description::entries::Register;
use super::super::mdio::mdic;
use super::bench::*;
use super::{Parked, ParkedLink};

/// Bytes of one step.
const STEP: usize = 7;
/// Registers that are no part of the state and yet do something.
const SPECIAL: [u32; 9] = [STATUS, EEC, EERD, MDIC, ICR, ICS, IMC, EXTCNF_CTRL, SWSM];

/// Has a guest do what `input` says to an image.
///
/// # Panics
/// The image has grown, or the device cannot be given to the guest, or to the next one after it.
pub fn exercise(input: &[u8]) {
    let description = description();
    let survey = surveyed(&description);
    let mut known: Vec<u32> = SPECIAL.to_vec();
    known.extend(description.register.iter().flat_map(Register::offsets));
    let mut device = Fake::new();
    device.lacks = 0x0060_0000;
    device.phy_lacks = 0x8;
    let mut parked = park(&description, &survey, &mut device, ParkedLink::Down);
    let size = size(&parked);
    for step in input.as_chunks::<STEP>().0 {
        let [what, low, high, v0, v1, v2, v3] = *step;
        let place = u16::from_le_bytes([low, high]);
        let bytes = [v0, v1, v2, v3, v0, v1, v2, v3, v0];
        let value = u32::from_le_bytes([v0, v1, v2, v3]);
        let register = known[usize::from(place) % known.len()];
        let anywhere = u64::from(place) << 2 ^ u64::from(what >> 3);
        let some = &bytes[..usize::from(what >> 4) % bytes.len()];
        match what & 7 {
            0 | 1 => store(&mut parked, register, value),
            2 => drop(load(&mut parked, register)),
            3 => store(
                &mut parked,
                MDIC,
                value & !(3 << 21) | mdic::WRITE | 1 << 21,
            ),
            4 => parked.read(anywhere, &mut some.to_vec()),
            5 => parked.write(anywhere, some),
            6 if value & 1 != 0 => parked.lose_link(),
            6 => drop(parked.take_messages()),
            _ => {
                let saved = parked.into_checkpoint();
                give(&description, &mut device, &saved);
                let link = match place & 1 {
                    0 => ParkedLink::Down,
                    _ => ParkedLink::Stays,
                };
                parked = park(&description, &survey, &mut device, link);
            }
        }
        parked.interrupt_due();
        assert!(self::size(&parked) == size && parked.since.stored.len() <= known.len());
    }
    give(&description, &mut device, &parked.into_checkpoint());
    give(&description, &mut device, survey.fresh());
    assert_eq!(
        [device.get(RAL), device.get(RAH)],
        [0x1200_5452, 0x8000_5634]
    );
}

fn size(parked: &Parked) -> (usize, usize) {
    (parked.state.len(), parked.others.len())
}
