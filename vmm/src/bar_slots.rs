//! Memory slots for parts of base address registers that are memory ([`devices::pci::areas`]).
//!
//! They are slots of the guest's VM alone: another VM over its memory has none, so an access of an
//! isolated call exits. They lie in the PCI windows, where no guest memory is and nothing at a
//! fixed place, and do not overlap. KVM does not follow what is written to them.
//!
//! A page that its file has no more, or that a device does not give, ends `KVM_RUN` with an error
//! (a KVM that interprets the instruction takes it for a device's register instead): the areas that
//! may be the reason are withdrawn, and the vCPU makes its access again, which then exits.
//!
//! Lock order: an area, then the table here.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use devices::pci::areas::{BarArea, BarMemory, GuestSlots, SlotRefused};
use devices::pci::bus::{PciBus, Windows};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

/// Number of the first slot; those of guest memory are before it.
const FIRST_SLOT: u32 = 16;
/// Most areas of a machine: KVM has hundreds of slots at least.
const MAX_SLOTS: usize = 64;

/// A slot in use.
struct Used {
    address: u64,
    len: u64,
    area: Weak<BarArea>,
}

/// The table of slots of one machine.
pub(crate) struct BarSlots {
    vm: Arc<VmFd>,
    windows: Windows,
    used: Mutex<[Option<Used>; MAX_SLOTS]>,
    /// For the slots to give themselves back.
    this: Weak<Self>,
}

impl BarSlots {
    /// Slots of `vm` in the memory windows of `windows`, for the areas of `pci`'s functions.
    pub fn of(pci: &PciBus, vm: Arc<VmFd>, windows: Windows) -> Arc<Self> {
        let slots = Arc::new_cyclic(|this| Self {
            vm,
            windows,
            used: Mutex::new([const { None }; MAX_SLOTS]),
            this: this.clone(),
        });
        pci.put_areas_into(slots.clone());
        slots
    }

    /// `KVM_RUN` could not reach some memory: withdraws the areas that may be the reason, those
    /// whose file was cut or else all. Says whether there were any, so that it is worth trying
    /// again.
    pub fn withdraw_what_is_lost(&self) -> bool {
        let areas: Vec<_> = {
            let used = self.used();
            let areas = used.iter().flatten();
            areas.filter_map(|one| one.area.upgrade()).collect()
        };
        let cut: Vec<_> = areas
            .iter()
            .filter(|area| area.memory().is_cut())
            .cloned()
            .collect();
        let lost = if cut.is_empty() { areas } else { cut };
        for area in &lost {
            area.withdraw();
            tracing::warn!(
                ?area,
                "registers that were mapped are gone: every access exits from now on"
            );
        }
        !lost.is_empty()
    }

    fn used(&self) -> MutexGuard<'_, [Option<Used>; MAX_SLOTS]> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, number: usize, used: &Used, host_address: u64, len: u64) -> Result<(), String> {
        let region = kvm_userspace_memory_region {
            slot: FIRST_SLOT + number as u32,
            flags: 0,
            guest_phys_addr: used.address,
            memory_size: len,
            userspace_addr: host_address,
        };
        // SAFETY: the range is a mapping that this process keeps until it has taken the slot away
        // (`Slot`), and of which it holds no reference: the guest may change it at any time.
        let result = unsafe { self.vm.set_user_memory_region(region) };
        result.map_err(|error| format!("KVM_SET_USER_MEMORY_REGION: {error}"))
    }
}

impl GuestSlots for BarSlots {
    fn put(&self, area: &Arc<BarArea>, address: u64) -> Result<Box<dyn Send>, SlotRefused> {
        let memory = area.memory().clone();
        let len = memory.len();
        let end = address.checked_add(len);
        let end = end.ok_or(SlotRefused::Here("it wraps around"))?;
        let windows = [self.windows.memory32, self.windows.memory64];
        let within = |(start, behind): &(u64, u64)| *start <= address && end <= *behind;
        if !windows.iter().any(within) {
            return Err(SlotRefused::Here("it is in no window for PCI"));
        }
        let mut used = self.used();
        let overlaps = |one: &Used| one.address < end && address < one.address + one.len;
        if used.iter().flatten().any(overlaps) {
            return Err(SlotRefused::Here("another area is there"));
        }
        let Some(number) = used.iter().position(Option::is_none) else {
            return Err(SlotRefused::Here("too many areas are mapped"));
        };
        let Some(this) = self.this.upgrade() else {
            return Err(SlotRefused::Here("the machine ends"));
        };
        let area = Arc::downgrade(area);
        let one = Used { address, len, area };
        self.set(number, &one, memory.host_address(), len)
            .map_err(SlotRefused::ByHost)?;
        used[number] = Some(one);
        let memory = Some(memory);
        Ok(Box::new(Slot {
            this,
            number,
            memory,
        }))
    }
}

/// A slot in use; taken away when it is dropped.
struct Slot {
    this: Arc<BarSlots>,
    number: usize,
    /// What the guest reaches by it.
    memory: Option<Arc<BarMemory>>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut used = self.this.used();
        let Some(one) = used.get_mut(self.number) else {
            return;
        };
        let taken = one
            .as_ref()
            .map(|one| self.this.set(self.number, one, 0, 0));
        match taken {
            Some(Err(error)) => {
                tracing::error!(
                    error,
                    "a memory slot stays, and so does what is mapped there"
                );
                std::mem::forget(self.memory.take());
            }
            _ => *one = None,
        }
    }
}
