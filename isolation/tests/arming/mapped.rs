//! A driver whose device has registers that are memory: the guest reaches them by itself, and an
//! isolated call does not.

use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use devices::hold::DeviceLost;
use devices::hold::goes_on::{GoesOn, HoldableFunction};
use devices::pci::config::offset;
use devices::pci::registers::Description;
use isolation::attach::request::IsolateRequest;
use isolation::dispatch::fault::{FaultOrder, UsedUpBy, WhichCalls};

use crate::card::Card;
use crate::guest::*;

/// Where `ret` is in `first_tells`: behind the gate, a load of an address, a load, an addition and a
/// store.
const RETURN: u64 = 5 + 10 + 2 + 2 + 2;

/// As a function of another process or of the host: it goes on while a call is in its domain. Its
/// state is the register.
impl GoesOn for Card {
    type Checkpoint = [u8; 4];

    fn take(&mut self, _: Option<&Description>) -> Result<Self::Checkpoint, DeviceLost> {
        let mut register = [0; 4];
        self.file.read_exact_at(&mut register, PAGE).unwrap();
        Ok(register)
    }

    fn put_back(
        &mut self,
        _: Option<&Description>,
        saved: &Self::Checkpoint,
    ) -> Result<(), DeviceLost> {
        self.file.write_all_at(saved, PAGE).unwrap();
        Ok(())
    }

    fn withhold_interrupts(&mut self, _withhold: bool) {}

    fn silence(&mut self) {}
}

struct Device {
    card: Arc<Mutex<Card>>,
    slot: u8,
}

impl Device {
    /// A card that comes to `guest`, with the register that its driver uses.
    fn of(guest: &Guest) -> Self {
        let card = Arc::new(Mutex::new(Card::new(4 * PAGE, (PAGE, PAGE))));
        let slot = guest.handle.reserve_pci_slot().unwrap();
        guest.handle.plug(&slot, card.clone(), Vec::new()).unwrap();
        let bus = guest.handle.pci_bus();
        let bar = (DEVICE_GPA - PAGE) as u32;
        bus.config_write(slot.number(), offset::BAR0, &bar.to_le_bytes());
        bus.config_write(slot.number(), offset::COMMAND, &[2, 0]);
        let area = card.lock().unwrap().areas[0].clone();
        assert_eq!(area.address(), Some(DEVICE_GPA));
        let slot = slot.number();
        Self { card, slot }
    }

    /// What the register is, and how many accesses the card has seen.
    fn state(&self) -> (u32, u64) {
        let card = self.card.lock().unwrap();
        let mut data = [0; 4];
        card.file.read_exact_at(&mut data, PAGE).unwrap();
        (u32::from_le_bytes(data), card.seen)
    }
}

#[test]
fn an_isolated_call_reaches_a_mapped_register_by_its_function_only() {
    let guest = Guest::start();
    let device = Device::of(&guest);
    let exits = || {
        let exits = guest.handle.status().exits[0];
        exits.mmio_read + exits.mmio_write
    };
    let before = exits();
    for round in 1..=3 {
        assert_eq!(guest.call(TELLS), round);
    }
    assert_eq!(device.state(), (3, 0), "the guest reaches it by itself");
    let request = IsolateRequest {
        device: Some(Arc::new(HoldableFunction::new(device.card.clone(), None))),
        device_slots: vec![device.slot],
        ..Guest::request("first")
    };
    guest.isolator.isolate(request).unwrap();
    for round in 4..=6 {
        assert_eq!(guest.call(TELLS), round);
    }
    assert_eq!(device.state(), (6, 6), "a load and a store each");
    // A call that fails behind its store: that was to wait for the commit.
    let order = FaultOrder {
        function: "first_tells".to_owned(),
        offset: RETURN,
        code: vec![0x0f, 0x0b],
        which: WhichCalls::ALL,
        times: 1,
        used_up_by: UsedUpBy::Failing,
    };
    guest.isolator.order_fault("first", order).unwrap();
    guest.call(TELLS);
    assert_eq!(device.state(), (6, 7), "its load only");
    assert_eq!(
        guest
            .status("first")
            .entries
            .iter()
            .map(|one| one.aborts)
            .sum::<u64>(),
        1
    );
    guest.isolator.release("first").unwrap();
    assert_eq!(guest.call(TELLS), 7);
    assert_eq!(device.state(), (7, 7));
    assert_eq!(exits() - before, 0, "the guest itself has no exit for it");
}
