//! What functions decode on the two buses, and where the areas of their registers are that are
//! memory.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, PoisonError, Weak};

use super::{PciBus, Slot};
use crate::bus::{Bus, BusDevice};
use crate::pci::areas::{BarArea, GuestSlots};
use crate::pci::{BarIndex, BarSpace, PciFunction};

/// Puts areas to where the guest has placed their registers.
pub(super) struct AreaPort {
    /// The bus on which registers in memory are.
    memory: Weak<Bus>,
    slots: OnceLock<Arc<dyn GuestSlots>>,
}

impl AreaPort {
    pub fn new(memory: &Arc<Bus>) -> Self {
        Self {
            memory: Arc::downgrade(memory),
            slots: OnceLock::new(),
        }
    }

    pub fn set(&self, slots: Arc<dyn GuestSlots>) {
        if self.slots.set(slots).is_err() {
            tracing::error!("areas have their slots already");
        }
    }

    /// Has the areas of `function`, which is in `slot` and locked, where they are to be now.
    fn place(&self, slot: &Slot, function: &dyn PciFunction) {
        let areas = function.areas();
        if areas.is_empty() {
            return;
        }
        let (Some(slots), Some(memory)) = (self.slots.get(), self.memory.upgrade()) else {
            return;
        };
        let mapped = slot.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let may_be = !slot.gone.load(Ordering::Relaxed) && !slot.edge.is_armed();
        let address_of = |area: &BarArea| {
            let (range, id) = mapped.iter().find(|(range, _)| range.bar == area.bar())?;
            let within = area.range();
            let fits = range.space != BarSpace::Io && within.end <= range.size_bytes;
            let usable = may_be && fits && memory.answers_alone(*id);
            usable.then(|| range.address.checked_add(within.start))?
        };
        let places: Vec<_> = areas.iter().map(|area| (area, address_of(area))).collect();
        // All that leave go first: another one may come to their place.
        for (area, _) in places.iter().filter(|(area, to)| area.address() != *to) {
            area.take_out();
        }
        for (area, to) in places {
            if let Some(address) = to {
                area.put(address, &**slots);
            }
        }
    }
}

impl PciBus {
    /// Brings the mappings of a slot in line with what its function decodes.
    pub(super) fn remap(&self, slot: &Arc<Slot>, function: &dyn PciFunction) {
        if slot.gone.load(Ordering::Relaxed) {
            return;
        }
        self.remap_windows(slot, function);
        self.areas.place(slot, function);
    }

    fn remap_windows(&self, slot: &Arc<Slot>, function: &dyn PciFunction) {
        let wanted = function.decoded();
        let mut mapped = slot.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        if mapped.iter().map(|(range, _)| range).eq(wanted.iter()) {
            return;
        }
        mapped.retain(|(range, id)| {
            let keep = wanted.contains(range);
            if !keep {
                self.bus_of(range.space).unmap(*id);
            }
            keep
        });
        for range in wanted {
            if mapped.iter().any(|(existing, _)| *existing == range) {
                continue;
            }
            let window = Arc::new(BarWindow {
                slot: slot.clone(),
                areas: self.areas.clone(),
                bar: range.bar,
            });
            match self
                .bus_of(range.space)
                .map(range.address, range.size_bytes, window)
            {
                Ok(id) => mapped.push((range, id)),
                // The guest chose the address; hardware would not decode it either.
                Err(error) => tracing::debug!(%error, "base address register not mapped"),
            }
        }
        mapped.sort_by_key(|(range, _)| range.bar);
    }
}

/// What answers in the range of one base address register.
struct BarWindow {
    slot: Arc<Slot>,
    areas: Arc<AreaPort>,
    bar: BarIndex,
}

impl BarWindow {
    /// Lets the guest access the function, whose areas may have come back since.
    fn access(&self, access: impl FnOnce(&mut dyn PciFunction)) {
        let mut function = self.slot.lock();
        access(&mut self.slot.edge.around(&mut *function));
        self.areas.place(&self.slot, &*function);
        drop(function);
        self.slot.edge.accessed();
    }
}

impl BusDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.access(|function| function.bar_read(self.bar, offset, data));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.access(|function| function.bar_write(self.bar, offset, data));
    }
}
