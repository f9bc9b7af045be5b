//! Modules that are about to be removed although something of a failed call of theirs stays: what
//! that call should have taken down may still use the module's memory when it is gone.
//!
//! ```text
//!   call fails, something stays ─► gates out ─► module removed ─► free_module: timers that it has left are taken out
//! ```
//!
//! A driver is restarted for such a call. What its functions of removal do not know of they do not
//! take down: `wg_destruct` of WireGuard cancels its work itself, and where it had failed before, the
//! timer went off in the memory of the module that was gone, or of the one in its place.

use std::collections::HashMap;
use std::sync::{MutexGuard, PoisonError};

use devices::dma::GuestMemory;
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use super::Isolator;
use super::removal::RemovalWatch;
use crate::dispatch::armed::Armed;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::paging::{AddressSpace, VirtMemory};

/// How often a vCPU that frees a module comes back to the gate while another one is at its timers.
const MAX_TIMES: u32 = 10_000;

/// Most modules that are remembered.
const MAX_MODULES: usize = 64;

/// A module of which something stays.
#[derive(Debug, Clone)]
pub(crate) struct Leaving {
    /// Its text, and all else that it has in memory.
    text: Vec<GvaRange>,
    data: Vec<GvaRange>,
    physical_bits: u8,
    /// How often its vCPU was at the gate.
    times: u32,
}

/// By name.
pub(crate) type AllLeaving = HashMap<String, Leaving>;

impl Leaving {
    /// Of a module of which something stays; `None` for any other.
    pub fn of(armed: &Armed) -> Option<Self> {
        let mut entries = armed.gates.values().map(|gate| &gate.entry);
        let (text, data) = armed.guest.knowledge.ranges();
        entries.any(|entry| entry.left_over > 0).then(|| Self {
            text: text.to_vec(),
            data: data.to_vec(),
            physical_bits: armed.guest.physical_bits,
            times: 0,
        })
    }
}

impl Isolator {
    pub(super) fn leaving(&self) -> MutexGuard<'_, AllLeaving> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The module's gates are out, or it is being freed.
    pub(super) fn leaves(&self, module: &str, armed: &Armed) {
        let mut all = self.leaving();
        all.remove(module);
        if let Some(leaving) = Leaving::of(armed).filter(|_| all.len() < MAX_MODULES) {
            all.insert(module.to_owned(), leaving);
        }
    }

    /// The guest frees the module whose `struct module` is the first argument: it is not isolated
    /// any more. `false` if the vCPU has to come back before that is gone.
    pub(crate) fn module_freed(
        &self,
        watch: RemovalWatch,
        regs: &kvm_regs,
        sregs: &kvm_sregs,
    ) -> bool {
        let memory = self.vm.ram().memory().clone();
        let mut modules = self.modules();
        // All isolated modules are the same guest's, on the same processor.
        let isolated = modules.values().next();
        let isolated = isolated.map(|armed| armed.guest.physical_bits);
        let bits = isolated.or_else(|| self.leaving().values().next().map(|one| one.physical_bits));
        let Some(bits) = bits else {
            return true;
        };
        let space = AddressSpace::from_registers(sregs.cr3, sregs.cr4, sregs.efer, bits);
        let virt = VirtMemory {
            space,
            memory: &*memory,
        };
        let Some(name) = watch.name(&virt, regs.rdi) else {
            return true;
        };
        if let Some(mut armed) = modules.remove(&name) {
            armed.disarm(&memory, Some(space));
            self.leaves(&name, &armed);
            self.put_away(armed);
            tracing::info!("module {name} was removed and is not isolated any more");
        }
        let is_done = self.take_timers_out(watch, &name, &virt);
        drop(modules);
        if is_done {
            self.unwatch_if_idle(&memory);
        }
        is_done
    }

    /// Takes out the timers that a module has left that is being freed. `false` if the vCPU has to
    /// come back for that.
    fn take_timers_out(
        &self,
        watch: RemovalWatch,
        name: &str,
        virt: &VirtMemory<'_, GuestMemory>,
    ) -> bool {
        let mut all = self.leaving();
        let Some(leaving) = all.get_mut(name) else {
            return true;
        };
        let Some(wheels) = watch.wheels() else {
            tracing::warn!("whether {name} has left timers is not known of this kernel");
            all.remove(name);
            return true;
        };
        let range = [&leaving.text[..], &leaving.data[..]].concat();
        let left = match wheels.left(virt, &range, &leaving.text) {
            Ok(left) => left,
            Err(_) if leaving.times < MAX_TIMES => {
                leaving.times += 1;
                return false;
            }
            Err(_) => {
                tracing::error!("timers that {name} may have left are always in use");
                all.remove(name);
                return true;
            }
        };
        if left.count > 0 {
            let done = write(virt, &left.stores);
            let of_them = if done { "were" } else { "could not be" };
            tracing::warn!(
                "{name} is removed, and timers that it has left {of_them} taken out: {}",
                left.count
            );
        }
        all.remove(name);
        true
    }
}

/// Stores words if all of them can be.
fn write(virt: &VirtMemory<'_, GuestMemory>, stores: &[(Gva, u64)]) -> bool {
    let places = stores.iter().map(|(at, word)| {
        let found = virt.space.walk(virt.memory, *at).ok()?;
        at.0.is_multiple_of(8).then_some((found.gpa, *word))
    });
    let Some(places) = places.collect::<Option<Vec<_>>>() else {
        return false;
    };
    let mut stored = places.into_iter().map(|(gpa, word)| {
        let at = GuestAddress(gpa.0);
        virt.memory.write_slice(&word.to_le_bytes(), at).is_ok()
    });
    stored.all(|stored| stored)
}
