//! What a call that goes on in the guest leaves there, part by part, and what takes it back.
//!
//! ```text
//!  part 1            spill            part 2             fault
//!  ────────────────────┬──── guest ────┬──────────────────►
//!  recorded as pending │ settled       │ pending: dropped with the private view
//! ```
//!
//! Only what is settled is in the guest. Functions that give something back wait until the call has
//! ended well: what they would free is needed again if it does not.

use serde::Serialize;

use super::effects::{KernelCall, KernelEffects, OppositeArgument, Pair};
use super::host_memory::Kept;
use super::lasting::{Done, Lasting};
use super::undo_log::{Restorable, UndoLog};
use super::view::{Page, Pfn};
use crate::guest::addr::{Gva, GvaRange};
use devices::hold::DeviceState;

/// Most calls of kernel functions kept for one call: a few for each descriptor of the largest
/// rings.
pub const MAX_CALLS: usize = 1 << 15;
/// Bytes that one of them takes, with what takes it back and where it is found by that.
const CALL_BYTES: u64 = 320;
/// Bytes that the device's states before and after a part take, about: its registers and its rings.
const DEVICE_PART_BYTES: u64 = 64 << 10;
/// Most parts in which a call may use the device.
const MAX_DEVICE_PARTS: usize = 256;

/// Why what a call did before it went on in the guest stays there although it failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "why")]
pub enum Stays {
    /// Nothing is known of the kernel's functions.
    NoModel,
    /// It changed more memory than is kept.
    TooMuchMemory,
    /// It called more kernel functions than are kept.
    TooManyCalls,
    /// It called a function that nothing takes back.
    Irrevocable {
        /// Guest virtual address.
        function: u64,
    },
    /// It called a function of which nothing is known.
    Unknown {
        /// Guest virtual address.
        function: u64,
    },
    /// A kernel function that called the driver back was under way.
    KernelFunctionOpen,
    /// The device cannot be put back.
    Device {
        /// Why.
        reason: String,
    },
    /// A kernel function that takes something back did not return.
    Hangs {
        /// Guest virtual address.
        function: u64,
    },
    /// It had changed a list, and the list is not any more as it left it.
    List {
        /// Guest virtual address of an object's links (`struct list_head`).
        links: u64,
    },
    /// There was no stack any more to call kernel functions on that take it back.
    StackGone,
}

/// What became of the parts of a failed call that were in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Published {
    /// Everything was taken back.
    Undone {
        /// Bytes of the driver's memory that were put back.
        bytes: u64,
        /// Kernel functions that were called for it.
        kernel_calls: u32,
    },
    /// It stays.
    Stays(Stays),
}

impl Published {
    /// Whether something of the failed call is left.
    pub fn stays(&self) -> bool {
        matches!(self, Self::Stays(_))
    }
}

/// A kernel function with lasting effects that has not returned yet.
#[derive(Debug, Clone, Copy)]
struct Open {
    call: KernelCall,
    /// Stack pointer after its return.
    rsp: u64,
    /// The number that tells whether it did something, before.
    before: Option<u64>,
}

/// Reads a number of up to 8 bytes from the call's memory; `None` where there is none.
pub trait ReadNumber {
    /// The `bytes` bytes at guest virtual address `va`.
    fn number(&self, va: u64, bytes: u8) -> Option<u64>;
}

/// What to do about a call of a kernel function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crossing {
    /// It is called.
    Call,
    /// It is called later; the driver goes on as if it had returned.
    Later,
}

/// The journal of one call.
#[derive(Debug, Clone, Default)]
pub struct Journal {
    /// Old bytes of memory.
    pub memory: UndoLog,
    kept: Kept,
    open: Vec<Open>,
    settled: Settled,
    pending: Pending,
}

#[derive(Debug, Clone, Default)]
struct Settled {
    done: Lasting,
    deferred: Vec<KernelCall>,
    device: Vec<(DeviceState, DeviceState)>,
    /// The device does not take requests of others any more as it did when the call began.
    requests_changed: bool,
    /// More kernel functions were open than the one that comes back first.
    nested: bool,
    /// Some of its calls were not kept.
    incomplete: bool,
    stays: Option<Stays>,
}

#[derive(Debug, Clone, Default)]
struct Pending {
    done: Vec<Done>,
    deferred: Vec<KernelCall>,
    device: Option<DeviceState>,
    stays: Option<Stays>,
    overflowed: bool,
}

impl Journal {
    /// For a call that begins. What the journal takes of the host's memory is charged to `kept`.
    pub fn new(restorable: Restorable, kept: Kept) -> Self {
        let mut journal = Self {
            memory: UndoLog::new(restorable),
            kept,
            ..Self::default()
        };
        if !journal.fits() {
            journal.memory.give_up();
        }
        journal
    }

    /// Page `pfn` is about to become `new` in the guest, where it is `old`.
    pub fn record(&mut self, pfn: Pfn, old: &Page, new: &Page) {
        self.memory.record(pfn, old, new);
        if !self.fits() {
            self.memory.give_up();
        }
    }

    /// What is charged for it, which the kernel functions that it has named take along.
    pub fn take_kept(&mut self) -> Kept {
        std::mem::take(&mut self.kept)
    }

    fn calls(&self) -> usize {
        let settled = self.settled.done.len() + self.settled.deferred.len();
        let pending = self.pending.done.len() + self.pending.deferred.len();
        settled + pending + self.open.len()
    }

    /// Charges what it takes by now; `false` if there is no room for the last of it.
    fn fits(&mut self) -> bool {
        let calls = self.calls() as u64 * CALL_BYTES;
        let device = self.settled.device.len() as u64 * DEVICE_PART_BYTES;
        self.kept.reach(self.memory.bytes() + calls + device)
    }

    /// Whether a call was not kept for want of room: this part cannot be taken back once it is in
    /// the guest, and no more calls need to be seen.
    pub fn has_overflowed(&self) -> bool {
        self.pending.overflowed
    }

    fn is_full(&self) -> bool {
        self.calls() >= MAX_CALLS
    }

    /// The driver calls a kernel function; after it returned the stack pointer is `rsp`.
    pub fn enter(
        &mut self,
        call: KernelCall,
        rsp: u64,
        effects: &KernelEffects,
        memory: &impl ReadNumber,
    ) -> Crossing {
        let function = call.function;
        if self.is_full() || !self.fits() {
            self.pending.stays.get_or_insert(Stays::TooManyCalls);
            self.pending.overflowed = true;
            return Crossing::Call;
        }
        let Some(effect) = effects.lasting.get(&function) else {
            let unknown = Stays::Unknown { function };
            self.pending.stays.get_or_insert(unknown);
            return Crossing::Call;
        };
        if effect.deferred {
            self.pending.deferred.push(call);
            return Crossing::Later;
        }
        let before = effect.changes.and_then(|place| {
            let at = call.arguments[usize::from(place.argument)].wrapping_add(place.offset);
            memory.number(at, place.bytes)
        });
        self.open.push(Open { call, rsp, before });
        Crossing::Call
    }

    /// The kernel function after which the stack pointer is `rsp` has returned `result`, if it is
    /// one that matters.
    pub fn leave(
        &mut self,
        rsp: u64,
        result: u64,
        effects: &KernelEffects,
        memory: &impl ReadNumber,
    ) {
        let Some(at) = self.open.iter().rposition(|open| open.rsp == rsp) else {
            return;
        };
        let open = self.open[at];
        self.open.truncate(at);
        let Some(effect) = effects.lasting.get(&open.call.function) else {
            return;
        };
        let arguments = open.call.arguments;
        let number = |place: crate::domain::effects::Place| {
            let at = arguments[usize::from(place.argument)].wrapping_add(place.offset);
            memory.number(at, place.bytes)
        };
        let unchanged = effect
            .changes
            .is_some_and(|place| open.before.is_some() && number(place) == open.before);
        let nothing_done = unchanged || !effect.success.is(result);
        if nothing_done && effect.pair != Some(Pair::GoesOn) {
            return;
        }
        let undo = effect.undo.as_ref().and_then(|opposite| {
            let mut called_with = [0; 6];
            for (argument, value) in opposite.arguments.iter().zip(&mut called_with) {
                *value = match *argument {
                    OppositeArgument::Result => result,
                    OppositeArgument::Own(index) => arguments[usize::from(index)],
                    OppositeArgument::At(place) => number(place)?,
                    OppositeArgument::Constant(number) => number,
                };
            }
            let call = KernelCall {
                function: opposite.function,
                arguments: called_with,
            };
            Some((call, opposite.arguments.len().min(6)))
        });
        self.pending.done.push(match undo {
            // A wait that was given up, by a signal for instance, is over.
            Some((call, _)) if nothing_done => Done {
                call,
                undo: None,
                pair: Some(Pair::Ends),
            },
            None if nothing_done => return,
            undo => Done {
                call: open.call,
                undo,
                pair: effect.pair,
            },
        });
    }

    /// The device is about to be used for the first time in this part; it is as `state` says.
    pub fn reach_device(&mut self, state: Option<DeviceState>) {
        match state {
            Some(state) => self.pending.device = Some(state),
            None => {
                let reason = "its state cannot be taken".to_owned();
                self.pending.stays.get_or_insert(Stays::Device { reason });
            }
        }
    }

    /// Whether the device was used in this part.
    pub fn reached_device(&self) -> bool {
        self.pending.device.is_some()
    }

    /// This part is in the guest now. The device, if it was used, is as `device` says; `nested` if
    /// kernel functions are under way besides the one that goes on in the guest.
    pub fn settle(&mut self, device: Option<DeviceState>, nested: bool) {
        self.memory.settle();
        let Pending {
            done,
            deferred,
            device: before,
            stays,
            overflowed,
        } = std::mem::take(&mut self.pending);
        let settled = &mut self.settled;
        settled.incomplete |= overflowed;
        settled.nested = nested;
        settled.deferred.extend(deferred);
        if let (None, Some(stays)) = (&settled.stays, stays) {
            settled.stays = Some(stays);
        }
        if let (Some(before), Some(after)) = (before, device) {
            settled.device.push((before, after));
        }
        done.into_iter()
            .for_each(|done| settled.done.happened(done));
        let parts = self.settled.device.len();
        if parts > MAX_DEVICE_PARTS || parts > 0 && !self.fits() {
            let settled = &mut self.settled;
            settled.device.clear();
            let reason = "it was used in too many parts".to_owned();
            settled.stays.get_or_insert(Stays::Device { reason });
        }
    }

    /// The last settled part that used the device changed where that takes requests of others from.
    pub fn requests_changed(&mut self) {
        self.settled.requests_changed = true;
    }

    /// Whether requests (packets) that others give to the device would be in the way of taking the
    /// call back.
    pub fn keeps_packets_out(&self) -> bool {
        self.settled.requests_changed
    }

    /// The kernel function that went on in the guest has returned there, and its return is noted:
    /// what it did is done.
    pub fn settle_return(&mut self) {
        let done = std::mem::take(&mut self.pending.done);
        done.into_iter()
            .for_each(|done| self.settled.done.happened(done));
    }

    /// This part has been taken back.
    pub fn discard(&mut self) {
        self.memory.discard();
        self.pending = Pending::default();
    }

    /// Why the settled parts cannot be undone, as far as can be told without the device.
    pub fn why_it_stays(&self) -> Option<Stays> {
        let settled = &self.settled;
        if let Some(stays) = &settled.stays {
            return Some(stays.clone());
        }
        if self.memory.is_incomplete() {
            return Some(Stays::TooMuchMemory);
        }
        if settled.nested {
            return Some(Stays::KernelFunctionOpen);
        }
        let forever = settled.done.iter().find(|done| done.undo.is_none())?;
        let function = forever.call.function;
        Some(Stays::Irrevocable { function })
    }

    /// How the device was before and after each settled part that used it, oldest first.
    pub fn device(&self) -> &[(DeviceState, DeviceState)] {
        &self.settled.device
    }

    /// The kernel functions that take the settled parts back, in the order in which they are
    /// called.
    pub fn compensation(&self) -> Vec<KernelCall> {
        let done = self.settled.done.iter().rev();
        done.filter_map(|done| done.undo.map(|(call, _)| call))
            .collect()
    }

    /// Of the kernel functions that take the settled parts back those that are called also where
    /// something else stays: what ends what the call has begun and nobody else ends, and what takes
    /// back what is about objects on its `stack`, which are gone with it. In the order in which they
    /// are called. None where not all calls are known: what seems begun may have ended.
    pub fn ends(&self, stack: GvaRange) -> Vec<KernelCall> {
        if self.settled.incomplete {
            return Vec::new();
        }
        let done = self.settled.done.iter().rev();
        let ends = done.filter_map(|done| {
            let (call, arguments) = done.undo?;
            let mut given = call.arguments.iter().take(arguments);
            let is_gone = given.any(|argument| stack.contains(Gva(*argument)));
            (done.pair.is_some() || is_gone).then_some(call)
        });
        ends.collect()
    }

    /// The settled calls that wait for the end of the call.
    pub fn take_deferred(&mut self) -> Vec<KernelCall> {
        std::mem::take(&mut self.settled.deferred)
    }

    /// Whether settled calls wait for the end of the call.
    pub fn has_deferred(&self) -> bool {
        !self.settled.deferred.is_empty()
    }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
