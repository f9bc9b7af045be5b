//! Cards made from their names, and two of them held as one.

use crate::dma::GuestMemory;
use vm_memory::GuestAddress;

use super::*;
use crate::e1000::bench::BenchLine;
use crate::hold::{DeviceAddress, HoldableSet, OutsideChanges};
use crate::pci::config::offset;
use crate::pci::msix::tests::RecordedVectors;
use crate::wire::gateway::{Gateway, GatewayConfig};

fn make(model: &NicModel, dma: &DmaSpace) -> Nic {
    let mut vectors = |count: u16| -> Result<Arc<dyn MsiVectors>, String> {
        Ok(RecordedVectors::new(usize::from(count)))
    };
    let gateway = Gateway::new(&GatewayConfig::default()).unwrap();
    let parts = NicParts {
        mac: [2, 0, 0, 0, 0, 1],
        wire: Box::new(gateway),
        dma: dma.clone(),
        intx: Arc::new(BenchLine::default()),
        vectors: &mut vectors,
    };
    model.make(parts).unwrap()
}

fn memory() -> DmaSpace {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    DmaSpace::new(Arc::new(memory))
}

#[test]
fn every_model_is_found_by_its_name_and_is_an_ethernet_function() {
    let dma = memory();
    for model in &MODELS {
        assert!(std::ptr::eq(
            NicModel::from_name(model.name).unwrap(),
            model
        ));
        let nic = make(model, &dma);
        let mut class = [0; 2];
        nic.function.lock().unwrap().config_read(0x0a, &mut class);
        assert_eq!(class, [0x00, 0x02], "{}", model.name);
        assert!(nic.set_cable.is_some(), "{} has a cable", model.name);
    }
    assert!(NicModel::from_name("ne2000").is_none());
}

/// Two cards with their registers at these addresses.
fn pair() -> (Vec<Nic>, Arc<dyn Holdable>) {
    let dma = memory();
    let nics: Vec<_> = [0x1000_0000u32, 0x2000_0000]
        .into_iter()
        .map(|at| {
            let nic = make(&MODELS[0], &dma);
            let mut function = nic.function.lock().unwrap();
            function.config_write(offset::BAR0, &at.to_le_bytes());
            function.config_write(offset::COMMAND, &[7, 0]);
            drop(function);
            nic
        })
        .collect();
    let each = nics.iter().map(|nic| {
        let holdable = nic.holdable.as_ref().unwrap();
        holdable(CheckpointBy::Exact).unwrap()
    });
    let set = HoldableSet::of(each).unwrap();
    (nics, set)
}

/// Transmit descriptor base and length, low word: registers without a side effect while
/// transmission is off.
const TDBAL: u64 = 0x3800;
const TCTL: u64 = 0x400;

fn read(nic: &Nic, register: u64) -> u32 {
    let mut data = [0; 4];
    nic.function
        .lock()
        .unwrap()
        .bar_read(0, register, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn two_cards_of_one_driver_are_held_and_put_back_as_one() {
    let (nics, set) = pair();
    set.hold(&mut |held| {
        assert!(held.owns(0x1000_0000) && held.owns(0x2001_ffff) && !held.owns(0x3000_0000));
        held.checkpoint();
        for (base, value) in [(0x1000_0000, 0x1000u32), (0x2000_0000, 0x2000)] {
            let at = DeviceAddress::Memory(base + TDBAL);
            held.write(at, &value.to_le_bytes());
            let mut data = [0; 4];
            held.read(at, &mut data);
            assert_eq!(u32::from_le_bytes(data), value);
        }
    })
    .unwrap();
    assert_eq!(
        nics.iter().map(|nic| read(nic, TDBAL)).collect::<Vec<_>>(),
        [0x1000, 0x2000]
    );
    set.hold(&mut |held| {
        held.checkpoint();
        for base in [0x1000_0000, 0x2000_0000] {
            held.write(DeviceAddress::Memory(base + TDBAL), &[0xf0; 4]);
        }
        held.restore().unwrap();
    })
    .unwrap();
    assert_eq!(
        nics.iter().map(|nic| read(nic, TDBAL)).collect::<Vec<_>>(),
        [0x1000, 0x2000]
    );
}

#[test]
fn what_cannot_be_undone_in_one_card_is_undone_in_none() {
    let (nics, set) = pair();
    let write = |base: u64, register: u64, value: u32| {
        set.hold(&mut |held| {
            held.write(DeviceAddress::Memory(base + register), &value.to_le_bytes());
        })
        .unwrap();
    };
    let state = || {
        let mut state = None;
        set.hold(&mut |held| state = held.state()).unwrap();
        state.unwrap()
    };
    let undo = |parts: &[_]| {
        let mut result = Ok(());
        set.hold(&mut |held| result = held.undo(parts)).unwrap();
        result
    };
    let before = state();
    write(0x1000_0000, TDBAL, 0x1000);
    write(0x2000_0000, TCTL, 1 << 3);
    let after = state();
    let mut changed = false;
    set.hold(&mut |held| changed = held.requests_changed(&before, &after))
        .unwrap();
    assert!(changed);
    // Somebody else used what the second card's part is about.
    write(0x2000_0000, TCTL, 0x10 << 4);
    undo(&[(before.clone(), after.clone())]).unwrap_err();
    assert_eq!(
        (read(&nics[0], TDBAL), read(&nics[1], TCTL)),
        (0x1000, 0x10 << 4)
    );
    write(0x2000_0000, TCTL, 1 << 3);
    undo(&[(before, after)]).unwrap();
    assert_eq!((read(&nics[0], TDBAL), read(&nics[1], TCTL)), (0, 0));
    set.hold(&mut |held| {
        held.keep_outside();
        held.show_outside(OutsideChanges::Forgotten);
    })
    .unwrap();
}

/// The address that a driver would read: from the EEPROM by its read register, whose words must add
/// up, or from the configuration structure.
fn address(nic: &Nic) -> [u8; 6] {
    let mut function = nic.function.lock().unwrap();
    let mut identity = [0; 2];
    function.config_read(offset::DEVICE_ID, &mut identity);
    if u16::from_le_bytes(identity) != 0x100e {
        let mut mac = [0; 6];
        function.bar_read(0, 0x2000, &mut mac);
        return mac;
    }
    let words: Vec<u16> = (0..64u32)
        .map(|word| {
            function.bar_write(0, 0x14, &(word << 8 | 1).to_le_bytes());
            let mut answer = [0; 4];
            function.bar_read(0, 0x14, &mut answer);
            u16::from_le_bytes([answer[2], answer[3]])
        })
        .collect();
    let sum = words.iter().fold(0u16, |sum, word| sum.wrapping_add(*word));
    assert_eq!(sum, 0xbaba);
    let bytes: Vec<u8> = words[..3]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    bytes.try_into().unwrap()
}

#[test]
fn a_card_that_goes_on_from_a_state_has_its_address_until_it_is_given_another_one() {
    let dma = memory();
    let other = [2, 0, 0, 0, 0, 9];
    for model in &MODELS {
        let saved = make(model, &dma);
        (saved.set_address)(other);
        assert_eq!(address(&saved), other, "{}", model.name);
        let state = saved.function.lock().unwrap().save().unwrap();
        let card = make(model, &dma);
        assert_eq!(address(&card), [2, 0, 0, 0, 0, 1]);
        card.function.lock().unwrap().restore(&state).unwrap();
        assert_eq!(address(&card), other, "{}", model.name);
        (card.set_address)([2, 0, 0, 0, 1, 7]);
        assert_eq!(address(&card), [2, 0, 0, 0, 1, 7], "{}", model.name);
    }
}

#[test]
fn a_card_that_nobody_has_is_gone_whoever_may_still_pull_its_cable() {
    let dma = memory();
    for model in &MODELS {
        let nic = make(model, &dma);
        let (function, cable) = (Arc::downgrade(&nic.function), nic.set_cable.clone());
        drop(nic);
        assert!(function.upgrade().is_none(), "{}", model.name);
        cable.unwrap()(false);
    }
}
