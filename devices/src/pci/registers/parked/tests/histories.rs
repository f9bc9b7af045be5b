//! Random stores.

use proptest::prelude::*;

use super::super::fuzzing::exercise;
use super::*;
use crate::pci::registers::description::entries::Register;

/// Registers of the state to which a store is no more than that.
fn plain(description: &Description) -> Vec<u32> {
    let special = [CTRL, IMS, PBA];
    let registers = description.register.iter();
    let offsets = registers.filter(|one| !special.contains(&one.offset));
    offsets.flat_map(Register::offsets).collect()
}

proptest! {
    #[test]
    fn stores_to_an_image_are_the_stores_to_the_device(
        before in prop::collection::vec((any::<prop::sample::Index>(), any::<u32>()), 0..50),
        parked_for in prop::collection::vec((any::<prop::sample::Index>(), any::<u32>()), 0..200),
        others in prop::collection::vec((any::<prop::sample::Index>(), any::<u32>()), 0..200),
        stays: bool,
    ) {
        let description = description();
        let survey = surveyed(&description);
        let places = plain(&description);
        let mut direct = Fake::new();
        let mut device = Fake::new();
        let link = if stays { ParkedLink::Stays } else { ParkedLink::Down };
        for (at, value) in &before {
            direct.store(*at.get(&places), *value);
            device.store(*at.get(&places), *value);
        }
        let mut parked = park(&description, &survey, &mut device, link);
        // Another guest has it meanwhile.
        for (at, value) in &others {
            device.store(*at.get(&places), *value);
        }
        for (at, value) in &parked_for {
            let at = *at.get(&places);
            direct.store(at, *value);
            store(&mut parked, at, *value);
            let keep = description.kept_at(at);
            prop_assert_eq!(load(&mut parked, at), *value & keep);
        }
        unpark(&description, &mut device, parked);
        for at in places.into_iter().chain([CTRL, IMS, PBA]) {
            let keep = description.kept_at(at);
            prop_assert_eq!(direct.get(at) & keep, device.get(at) & keep, "{:#x}", at);
        }
    }

    #[test]
    fn whatever_a_guest_does_the_device_can_be_given_to_it(
        input in prop::collection::vec(any::<u8>(), 0..3000),
    ) {
        exercise(&input);
    }
}
