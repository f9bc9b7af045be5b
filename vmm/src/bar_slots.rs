//! Memory slots for parts of base address registers that are memory ([`devices::pci::areas`]).
//!
//! They are slots of the guest's VM alone: another VM over its memory has none, so an access of an
//! isolated call exits. They lie in the PCI windows, where no guest memory is and nothing at a
//! fixed place, and do not overlap. KVM does not follow what is written to them.
//!
//! A page that its file has no more, or that a device does not give, ends `KVM_RUN` with an error
//! (a KVM that interprets the instruction takes it for a device's register instead): the areas that
//! may be the reason are withdrawn, and the vCPU makes its access again, which then exits. Several
//! vCPUs may come to such a page at once, and somebody else may have taken the area out meanwhile:
//! whoever finds that a slot has gone since it entered the guest tries again too
//! ([`BarSlots::gone`]).
//!
//! Lock order: an area, then the table here.

use std::sync::atomic::{AtomicU64, Ordering};
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
    /// KVM would not take it away: it stays, and withdrawing the area changes nothing.
    stays: bool,
}

impl Used {
    fn has(&self, address: u64) -> bool {
        let offset = address.checked_sub(self.address);
        offset.is_some_and(|offset| offset < self.len)
    }
}

/// The table of slots of one machine.
pub(crate) struct BarSlots {
    vm: Arc<VmFd>,
    windows: Windows,
    used: Mutex<[Option<Used>; MAX_SLOTS]>,
    /// How many have been taken away; raised with the table locked.
    gone: AtomicU64,
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
            gone: AtomicU64::new(0),
            this: this.clone(),
        });
        pci.put_areas_into(slots.clone());
        slots
    }

    /// How many slots have been taken away so far: for [`Self::withdraw_what_is_lost`], to be asked
    /// before `KVM_RUN`.
    pub fn gone(&self) -> u64 {
        self.gone.load(Ordering::Acquire)
    }

    /// `KVM_RUN` could not reach some memory, at guest physical `address` where it said so.
    /// `gone_before` is what [`Self::gone`] was when it began. Withdraws the areas that may be the
    /// reason; says whether a slot has gone since, so that it is worth trying again.
    pub fn withdraw_what_is_lost(&self, gone_before: u64, address: Option<u64>) -> bool {
        let mut areas = Vec::new();
        {
            let used = self.used();
            if self.gone() != gone_before {
                return true;
            }
            for one in used.iter().flatten().filter(|one| !one.stays) {
                match one.area.upgrade() {
                    // The area is being dropped, and its slot with it.
                    None => return true,
                    Some(area) if address.is_none_or(|at| one.has(at)) => areas.push(area),
                    Some(_) => {}
                }
            }
        }
        for area in suspects(areas, address.is_some()) {
            area.withdraw();
            tracing::warn!(
                ?area,
                "registers that were mapped are gone: every access exits from now on"
            );
        }
        self.gone() != gone_before
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
        let one = Used {
            address,
            len,
            area,
            stays: false,
        };
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

/// Which of `areas` are to go when one of them could not be reached: all where it `is_known` which
/// one. Else those whose file is found cut; else those in files, which other processes may take
/// away in other ways; else those of devices.
fn suspects(areas: Vec<Arc<BarArea>>, is_known: bool) -> Vec<Arc<BarArea>> {
    if is_known {
        return areas;
    }
    let is_of_file = |area: &Arc<BarArea>| area.memory().is_of_file();
    let (mut in_files, of_devices): (Vec<_>, Vec<_>) = areas.into_iter().partition(is_of_file);
    if in_files.iter().any(|area| area.memory().is_cut()) {
        in_files.retain(|area| area.memory().is_cut());
    }
    match in_files.is_empty() {
        true => of_devices,
        false => in_files,
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
        let Some(entry) = used.get_mut(self.number) else {
            return;
        };
        let Some(one) = entry else {
            return;
        };
        if let Err(error) = self.this.set(self.number, one, 0, 0) {
            tracing::error!(
                error,
                area = ?one.area.upgrade(),
                "a memory slot stays, and so does what is mapped there: a device whose registers these are is not given \
                 back to the host before this process ends"
            );
            one.stays = true;
            std::mem::forget(self.memory.take());
            return;
        }
        *entry = None;
        self.this.gone.fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
