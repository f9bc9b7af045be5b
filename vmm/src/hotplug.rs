//! Functions that come and go while the machine runs, by ACPI's notifications.
//!
//! ```text
//!  plug     function into its slot ─► bit in UP ─► event ─► GED's _EVT: Notify(slot, 1) ─► guest scans, binds
//!  unplug   bit in DOWN ─► event ─► Notify(slot, 3) ─► guest unbinds, _EJ0 ─► EJECT ─► function taken out
//! ```
//!
//! | port | register |
//! | --- | --- |
//! | 0x610 | UP, 32 bits: slots that have a new function; reading clears |
//! | 0x614 | DOWN, 32 bits: slots whose function is to go; reading clears |
//! | 0x618 | EJECT, 32 bits, written: slots whose function the guest has let go |
//!
//! A guest may eject what nobody asked it to, as at a real slot; what was given to the machine
//! before its start cannot be ejected. A guest that restarts has let everything go that was asked
//! back.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::bus::BusDevice;
use devices::pci::bus::{PciBus, SLOT_COUNT};
use event_manager::MutEventSubscriber;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::power::{EVENT_PCI_HOTPLUG, PowerDevice};

/// What the event loop serves.
pub type SharedSubscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// Number of ports from [`crate::layout::HOTPLUG_PORTS`].
pub const HOTPLUG_PORT_COUNT: u16 = 12;

const UP: u64 = 0;
const DOWN: u64 = 4;
const EJECT: u64 = 8;

/// State of the registers, and which slots were filled while the machine ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct HotplugState {
    up: u32,
    down: u32,
}

/// What the main loop has to do with its subscribers.
pub(crate) enum Change {
    /// Serve the device in a slot, and what belongs to it.
    Serve(u8, Vec<SharedSubscriber>),
    /// Serve it no more; the slot is free then.
    Forget(u8),
}

/// The hot-plug registers.
pub(crate) struct Hotplug {
    pci: Arc<PciBus>,
    power: Arc<PowerDevice>,
    up: AtomicU32,
    down: AtomicU32,
    slots: Mutex<Slots>,
    wake: EventFd,
}

#[derive(Default)]
struct Slots {
    /// Reserved or in use, as bits.
    taken: u32,
    /// With a function that came while the machine ran.
    removable: u32,
    /// Asked back from the guest.
    leaving: u32,
    changes: Vec<Change>,
}

impl Hotplug {
    pub fn new(pci: Arc<PciBus>, power: Arc<PowerDevice>) -> std::io::Result<Self> {
        Ok(Self {
            pci,
            power,
            up: AtomicU32::new(0),
            down: AtomicU32::new(0),
            slots: Mutex::new(Slots {
                taken: 1, // The host bridge.
                ..Slots::default()
            }),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the first free slot.
    pub fn reserve(&self) -> Option<u8> {
        let mut slots = self.slots();
        let free = (0..SLOT_COUNT).find(|slot| slots.taken >> slot & 1 == 0)?;
        slots.taken |= 1 << free;
        Some(free)
    }

    /// Gives a slot back that nothing was put into.
    pub fn release(&self, slot: u8) {
        self.slots().taken &= !bit(slot);
    }

    /// Slots with a function that came while the machine ran, or with none.
    pub fn removable(&self) -> Vec<u8> {
        let fixed = {
            let slots = self.slots();
            slots.taken & !slots.removable
        };
        (0..SLOT_COUNT)
            .filter(|slot| fixed >> slot & 1 == 0)
            .collect()
    }

    /// Whether `slot` has a function that came while the machine ran.
    pub fn is_removable(&self, slot: u8) -> bool {
        self.slots().removable & bit(slot) != 0
    }

    /// Slots with a function that came while the machine ran, and which of them were asked back, as
    /// bits.
    pub fn plugged(&self) -> (u32, u32) {
        let slots = self.slots();
        (slots.removable, slots.leaving)
    }

    /// The functions in the slots of `leaving` were asked back from the guest and no others.
    pub fn set_leaving(&self, leaving: u32) {
        let mut slots = self.slots();
        slots.leaving = leaving & slots.removable;
    }

    /// `slot`, which was reserved, has a function now.
    pub fn came(&self, slot: u8, subscribers: Vec<SharedSubscriber>) {
        {
            let mut slots = self.slots();
            slots.removable |= bit(slot);
            slots.changes.push(Change::Serve(slot, subscribers));
        }
        self.wake_main_loop();
        self.up.fetch_or(bit(slot), Ordering::AcqRel);
        self.power.announce(EVENT_PCI_HOTPLUG);
    }

    /// Asks the guest to let the function in `slot` go. Says whether it can go.
    pub fn ask_back(&self, slot: u8) -> bool {
        {
            let mut slots = self.slots();
            if slots.removable & bit(slot) == 0 {
                return false;
            }
            slots.leaving |= bit(slot);
        }
        self.down.fetch_or(bit(slot), Ordering::AcqRel);
        self.power.announce(EVENT_PCI_HOTPLUG);
        true
    }

    /// The guest has let go what is in the slots of `mask`.
    fn eject(&self, mask: u32) {
        let going = {
            let mut slots = self.slots();
            let going = mask & slots.removable;
            slots.removable &= !going;
            slots.leaving &= !going;
            going
        };
        for slot in (0..SLOT_COUNT).filter(|slot| going >> slot & 1 == 1) {
            // The main loop's is the last reference but those of accesses under way.
            drop(self.pci.remove(slot));
            self.slots().changes.push(Change::Forget(slot));
        }
        if going != 0 {
            self.wake_main_loop();
        }
    }

    /// Takes out what the guest was asked for: it has restarted.
    pub fn eject_leaving(&self) {
        let leaving = self.slots().leaving;
        self.eject(leaving);
    }

    /// What the main loop has to do, in order.
    pub fn take_changes(&self) -> Vec<Change> {
        std::mem::take(&mut self.slots().changes)
    }

    /// Readable when there are changes; to be read by the main loop.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    fn wake_main_loop(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::error!(%error, "main loop not woken");
        }
    }

    pub fn save(&self) -> HotplugState {
        HotplugState {
            up: self.up.load(Ordering::Acquire),
            down: self.down.load(Ordering::Acquire),
        }
    }

    pub fn restore(&self, state: HotplugState) {
        self.up.store(state.up, Ordering::Release);
        self.down.store(state.down, Ordering::Release);
    }
}

fn bit(slot: u8) -> u32 {
    1u32.checked_shl(u32::from(slot)).unwrap_or(0)
}

impl BusDevice for Hotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match (offset, data.len()) {
            (UP, 4) => self.up.swap(0, Ordering::AcqRel),
            (DOWN, 4) => self.down.swap(0, Ordering::AcqRel),
            _ => return,
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == EJECT
            && let &[a, b, c, d] = data
        {
            self.eject(u32::from_le_bytes([a, b, c, d]));
        }
    }
}
