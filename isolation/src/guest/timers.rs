//! Timers that are pending in the guest: the wheels of its processors (kernel/time/timer.c).
//!
//! ```text
//!   timer_bases (of each processor, several)     lock, running_timer
//!     vectors[0] ─► timer ─► timer               hlists: next, and where that is pointed at from
//!     vectors[1]
//!     ...
//! ```

use super::addr::{Gva, GvaRange};
use super::btf::{Btf, Kind};
use super::field::Field;
use super::paging::VirtMemory;
use super::phys::GuestPhys;
use super::symbols::SymbolTable;

/// Most processors of a guest.
const MAX_CPUS: u64 = 8;
/// Most wheels of a processor (`NR_BASES`).
const MAX_BASES: u64 = 4;
/// Most slots of a wheel (`WHEEL_SIZE`).
const MAX_SLOTS: u64 = 1024;
/// Most timers that are looked at: the guest stands still meanwhile.
const MAX_TIMERS: usize = 1 << 16;
/// Offset of where a link is pointed at from (`struct hlist_node`), in bytes.
const POINTED_AT: u64 = 8;

/// Where a kernel keeps its timers.
#[derive(Debug, Clone, Copy)]
pub struct TimerWheels {
    /// The wheels, as a per-CPU pointer, how many, and the bytes of one.
    bases: u64,
    count: u64,
    bytes: u64,
    /// `__per_cpu_offset` and `nr_cpu_ids`.
    offsets: Gva,
    cpus: Gva,
    lock: Field,
    running: Field,
    /// Offset of the slots, and how many.
    slots: u64,
    slot_count: u64,
    /// Offset of the link in a timer.
    link: u64,
    function: Field,
    delayed: Option<DelayedWork>,
}

/// Work whose timer has a function of the kernel's.
#[derive(Debug, Clone, Copy)]
struct DelayedWork {
    /// The timer's function.
    by: u64,
    /// Offsets of the timer, and of the work's function.
    timer: u64,
    function: u64,
}

/// What is to be done about timers of somebody who is gone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TimersLeft {
    /// How many are pending.
    pub count: usize,
    /// Stores of words, addresses and values, that take them out.
    pub stores: Vec<(Gva, u64)>,
}

/// A processor is changing its timers just now, or runs one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InUse;

impl TimerWheels {
    /// `None` if this kernel keeps them otherwise.
    pub fn find(types: &Btf, symbols: &SymbolTable) -> Option<Self> {
        let base = types.find_struct("timer_base")?;
        let timer = types.find_struct("timer_list")?;
        let bytes = types.size_of(base).filter(|bytes| *bytes > 0)?;
        let at = |name| symbols.kernel_symbol(name).map(|symbol| symbol.at);
        let bases = at("timer_bases")?;
        let extent = symbols.extent(bases, GvaRange::new(bases, bytes * MAX_BASES)?)?;
        let slots = types.find_member(base, "vectors")?;
        let Some((_, Kind::Array { count, .. })) = types.resolve(slots.type_id) else {
            return None;
        };
        let offset = |of, name| {
            let member = types.find_member(of, name)?;
            Some(u64::from(member.bit_offset / 8))
        };
        let delayed = || {
            let delayed = types.find_struct("delayed_work")?;
            let work = types.find_struct("work_struct")?;
            Some(DelayedWork {
                by: at("delayed_work_timer_fn")?.0,
                timer: offset(delayed, "timer")?,
                function: offset(delayed, "work")?.checked_add(offset(work, "func")?)?,
            })
        };
        Some(Self {
            bases: bases.0,
            count: (extent.len_bytes() / bytes).clamp(1, MAX_BASES),
            bytes,
            offsets: at("__per_cpu_offset")?,
            cpus: at("nr_cpu_ids")?,
            lock: Field::find(types, base, "lock")?,
            running: Field::find(types, base, "running_timer")?,
            slots: u64::from(slots.bit_offset / 8),
            slot_count: u64::from(count).min(MAX_SLOTS),
            link: offset(timer, "entry")?,
            function: Field::find(types, timer, "function")?,
            delayed: delayed(),
        })
    }

    /// The timers that are pending and lie in `memory`, or whose functions are in `text`, or the
    /// functions of the work that they queue; none where the wheels cannot be read.
    ///
    /// # Errors
    /// The wheels are in use: they can be looked at a little later.
    pub fn left<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        memory: &[GvaRange],
        text: &[GvaRange],
    ) -> Result<TimersLeft, InUse> {
        let mut left = TimersLeft::default();
        let mut budget = MAX_TIMERS;
        let cpus = virt.read_u64(self.cpus).unwrap_or(0) & u64::from(u32::MAX);
        let is_left = |timer: Gva| self.is_left(virt, timer, memory, text);
        for cpu in 0..cpus.min(MAX_CPUS) {
            let offset = self.offsets.checked_add(cpu * 8);
            let Some(offset) = offset.and_then(|at| virt.read_u64(at).ok()) else {
                continue;
            };
            for number in 0..self.count {
                let base = self.bases.wrapping_add(number * self.bytes);
                let base = Gva(base.wrapping_add(offset));
                let busy = |field: Field| field.read(virt, base).is_some_and(|word| word != 0);
                if busy(self.lock) || busy(self.running) {
                    return Err(InUse);
                }
                for slot in 0..self.slot_count {
                    let head = Gva(base.0.wrapping_add(self.slots + slot * 8));
                    self.in_slot(virt, head, &is_left, &mut budget, &mut left);
                }
            }
        }
        Ok(left)
    }

    /// Those of one slot, whose first link `head` points at.
    fn in_slot<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        head: Gva,
        is_left: &impl Fn(Gva) -> bool,
        budget: &mut usize,
        left: &mut TimersLeft,
    ) {
        let pointed_at = |link: Gva| link.checked_add(POINTED_AT);
        // What leads to the next one that stays, and whether it has to be told so.
        let (mut from, mut changed) = (head, false);
        let mut stores = Vec::new();
        let mut taken = 0;
        let mut next = virt.read_u64(head).ok().map(Gva);
        while let Some(link) = next.filter(|link| link.0 != 0) {
            let (Some(rest), Some(back)) = (budget.checked_sub(1), pointed_at(link)) else {
                return;
            };
            *budget = rest;
            // A list that is not whole is left alone.
            let Ok(behind) = virt.read_u64(link) else {
                return;
            };
            match link.checked_sub(self.link) {
                Some(timer) if is_left(timer) => {
                    (changed, taken) = (true, taken + 1);
                    stores.push((back, 0));
                }
                _ => {
                    if std::mem::take(&mut changed) {
                        stores.extend([(from, link.0), (back, from.0)]);
                    }
                    from = link;
                }
            }
            next = Some(Gva(behind));
        }
        if changed {
            stores.push((from, 0));
        }
        left.count += taken;
        left.stores.extend(stores);
    }

    fn is_left<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        timer: Gva,
        memory: &[GvaRange],
        text: &[GvaRange],
    ) -> bool {
        let is_in = |ranges: &[GvaRange], at: u64| ranges.iter().any(|one| one.contains(Gva(at)));
        if is_in(memory, timer.0) {
            return true;
        }
        let Some(function) = self.function.read(virt, timer) else {
            return false;
        };
        let works = self.delayed.filter(|delayed| delayed.by == function);
        let works = works.and_then(|delayed| {
            let work = timer.checked_sub(delayed.timer)?;
            virt.read_u64(work.checked_add(delayed.function)?).ok()
        });
        is_in(text, function) || works.is_some_and(|function| is_in(text, function))
    }
}

#[cfg(test)]
#[path = "timers_tests.rs"]
mod tests;
