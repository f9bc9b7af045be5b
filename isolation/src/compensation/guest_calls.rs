//! Kernel functions that the guest calls on the host's behalf, in the thread of the call that they
//! are for.
//!
//! ```text
//!   return gate ─► first function ─► return gate ─► second function ─► ... ─► the call's caller
//! ```
//!
//! As many as fit on the stack are called in one go ([`CallLoop`]).
//!
//! The stack below the caller's frame is free, so each function is entered as if the caller had
//! called it, with the return gate as its return address. What takes a failed call back may be about
//! objects in that call's own frames (an entry in a queue of who waits): then it is entered below
//! these. They may sleep: the thread comes back through the gate whenever it does.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use devices::dma::GuestMemory;
use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress};

use crate::compensation::call_loop::{CallLoop, LITTLE_STACK, MUCH_STACK, Progress, Row};
use crate::compensation::guest_time::{Stopwatch, Stopwatches};
use crate::dispatch::failed::Failed;
use crate::domain::attempt::Attempt;
use crate::domain::effects::{KernelCall, KernelEffects};
use crate::domain::host_memory::Kept;
use crate::domain::list_links::ChangedLinks;
use crate::domain::transaction::DeviceStore;
use crate::guest::addr::Gva;
use crate::guest::paging::VirtMemory;
use crate::guest::stack::stack_around;

/// Time of the guest after which a kernel function that takes something back is taken to hang.
pub(crate) const GUEST_CALL_LIMIT: Duration = Duration::from_secs(10);

/// RFLAGS.IF.
const INTERRUPT_FLAG: u64 = 1 << 9;

/// A call that failed and whose taking back is under way.
pub(crate) struct Failure {
    pub failed: Failed,
    pub attempt: Attempt,
    /// Registers at the entry of the call.
    pub entry: kvm_regs,
    pub ended: Instant,
    /// Whether its caller goes on whatever it returns.
    pub unheard: bool,
    /// Lists that it had changed.
    pub lists: Vec<ChangedLinks>,
}

/// Kernel functions to call, one after the other.
pub(crate) struct GuestCalls {
    /// Address of the gate through which the thread comes back.
    pub gate: u64,
    calls: VecDeque<KernelCall>,
    /// What the guest goes on with afterwards.
    pub finally: kvm_regs,
    /// The stack below this is free.
    below: u64,
    /// The call that is taken back by it; `None` if it is one that ended well, or that was given
    /// up.
    pub failure: Option<Failure>,
    /// The function that was called last, and how long ago; `None` as long as none was.
    running: Option<(u64, Stopwatch)>,
    /// How many are not called, because there is no stack for it any more.
    abandoned: usize,
    /// Where the thread is among those that were called in one go with it.
    progress: Option<Progress>,
    /// What is charged of the host's memory for the calls.
    kept: Kept,
    /// They are called as the driver would have called them, with interrupts as its caller has them.
    in_its_place: bool,
    /// Stores to the device that wait for them.
    later: Vec<DeviceStore>,
}

impl GuestCalls {
    pub fn new(
        gate: u64,
        calls: Vec<KernelCall>,
        finally: kvm_regs,
        failure: Option<Failure>,
    ) -> Self {
        Self {
            gate,
            calls: calls.into(),
            below: finally.rsp,
            finally,
            failure,
            running: None,
            abandoned: 0,
            progress: None,
            kept: Kept::default(),
            in_its_place: false,
            later: Vec::new(),
        }
    }

    /// In the place of a call that has ended well, with stores to its device that wait for them.
    pub fn in_its_place(mut self, later: Vec<DeviceStore>) -> Self {
        self.in_its_place = true;
        self.later = later;
        self
    }

    /// With the failed call's frames left alone, which end at `rsp`, if any of them is about an
    /// object there.
    pub fn below(mut self, rsp: u64) -> Self {
        let frames = rsp..self.finally.rsp;
        let mut arguments = self.calls.iter().flat_map(|call| &call.arguments);
        if arguments.any(|argument| frames.contains(argument)) {
            self.below = rsp;
        }
        self
    }

    /// Takes the stores to the device that wait for the calls.
    pub fn take_later(&mut self) -> Vec<DeviceStore> {
        std::mem::take(&mut self.later)
    }

    /// With what is charged of the host's memory for the calls.
    pub fn keeping(mut self, kept: Kept) -> Self {
        self.kept = kept;
        self
    }

    /// Registers to call all of them with in `call_loop`, which then returns to the caller by itself,
    /// and nobody hears of it. `None` if something is to be done then, or if there is no room.
    pub fn unheard(
        &self,
        call_loop: Option<CallLoop>,
        virt: VirtMemory<'_, GuestMemory>,
    ) -> Option<kvm_regs> {
        let nothing_behind = self.later.is_empty() && self.failure.is_none();
        if !self.in_its_place || !nothing_behind || self.calls.is_empty() || self.has_called() {
            return None;
        }
        let call_loop = call_loop?;
        let top = self.finally.rsp;
        let stack = stack_around(virt, Gva(top.wrapping_sub(8)));
        let room = CallLoop::room(top, stack, self.reserve());
        let (rows, calls) = rows(&self.calls, call_loop, |_| false, room);
        (calls == self.calls.len()).then_some(())?;
        let begun = call_loop.begin(&rows, &self.finally, self.finally.rip, virt);
        begun.map(|(regs, _)| regs)
    }

    /// Bytes of stack to be left for the functions.
    fn reserve(&self) -> u64 {
        match self.in_its_place {
            true => MUCH_STACK,
            false => LITTLE_STACK,
        }
    }

    /// Whether the guest has called any function.
    pub fn has_called(&self) -> bool {
        self.running.is_some()
    }

    /// How many functions were not called, because the thread's stack is not there any more.
    pub fn abandoned(&self) -> usize {
        self.abandoned
    }

    /// Stack pointer with which the thread comes back.
    pub fn returns_with(&self) -> u64 {
        self.below
    }

    /// Has the thread go on with what it was to go on with when the function that it is in returns,
    /// with nobody there who does that for it: over what is left of the failed call's frames by
    /// returns of `call_loop`, which stays.
    pub fn returns_by_itself(
        &self,
        call_loop: Option<CallLoop>,
        virt: VirtMemory<'_, GuestMemory>,
    ) {
        let last = self.finally.rsp.wrapping_sub(8);
        let mut written = write_stack(virt, last, self.finally.rip);
        let mut slot = self.below.wrapping_sub(8);
        if slot < last {
            match call_loop {
                Some(call_loop) => {
                    while slot < last && written {
                        written = write_stack(virt, slot, call_loop.returns());
                        slot = slot.wrapping_add(8);
                    }
                }
                None => written = false,
            }
        }
        if !written {
            tracing::error!("a thread that takes a call back is left at a gate that is gone");
        }
    }

    /// The function that runs, if it has for too long.
    pub fn hangs(&self, memory: &GuestMemory) -> Option<u64> {
        let (function, since) = self.running.as_ref()?;
        let running = || match &self.progress {
            Some(progress) => progress.function(memory),
            None => *function,
        };
        (since.elapsed() > GUEST_CALL_LIMIT).then(running)
    }

    /// Registers to call the next function with, or the next ones in `call_loop`, whose return
    /// leads to `return_gate`; with interrupts off if `effects` says that they may be. `None` if
    /// all have returned, or if the stack is not there any more ([`Self::abandoned`]).
    pub fn next(
        &mut self,
        return_gate: u64,
        effects: Option<&KernelEffects>,
        call_loop: Option<CallLoop>,
        stopwatches: &Stopwatches,
        virt: VirtMemory<'_, GuestMemory>,
    ) -> Option<kvm_regs> {
        let stay_off = self.finally.rflags & INTERRUPT_FLAG == 0;
        // What was waiting for the guest meanwhile, a tick at least, comes when the caller runs
        // again.
        let off = |call: &KernelCall| {
            let may_be_off =
                effects.is_some_and(|known| known.interrupts_off.contains(&call.function));
            stay_off || may_be_off && !self.in_its_place
        };
        let first = self.calls.front()?;
        let rflags = match off(first) {
            true => self.finally.rflags & !INTERRUPT_FLAG,
            false => self.finally.rflags,
        };
        let caller = kvm_regs {
            rflags,
            rsp: self.below,
            ..self.finally
        };
        let function = first.function;
        if let Some(call_loop) = call_loop {
            let top = self.below;
            let stack = stack_around(virt, Gva(top.wrapping_sub(8)));
            let room = CallLoop::room(top, stack, self.reserve());
            let (rows, calls) = rows(&self.calls, call_loop, off, room);
            if calls > usize::from(!self.in_its_place)
                && let Some((next, progress)) = call_loop.begin(&rows, &caller, return_gate, virt)
            {
                self.running = Some((function, stopwatches.start()));
                self.progress = Some(progress);
                self.calls.drain(..calls);
                return Some(next);
            }
        }
        if !write_stack(virt, self.below.wrapping_sub(8), return_gate) {
            tracing::error!("the stack that kernel functions are to be called on is not mapped");
            self.abandoned = std::mem::take(&mut self.calls).len();
            return None;
        }
        let call = self.calls.pop_front()?;
        self.running = Some((function, stopwatches.start()));
        self.progress = None;
        let [rdi, rsi, rdx, rcx, r8, r9] = call.arguments;
        Some(kvm_regs {
            rip: call.function,
            rsp: self.below.wrapping_sub(8),
            rax: 0,
            rdi,
            rsi,
            rdx,
            rcx,
            r8,
            r9,
            ..caller
        })
    }
}

/// At most `room` rows for as many of `calls` as they are enough for, and how many these are.
fn rows(
    calls: &VecDeque<KernelCall>,
    call_loop: CallLoop,
    off: impl Fn(&KernelCall) -> bool,
    room: usize,
) -> (Vec<Row>, usize) {
    let mut rows = Vec::with_capacity(room);
    let mut count = 0;
    let mut is_off = calls.front().is_some_and(&off);
    for call in calls {
        let switches = off(call) != is_off;
        if rows.len() + 1 + usize::from(switches) > room {
            break;
        }
        if switches {
            is_off = !is_off;
            rows.push(call_loop.interrupts(is_off));
        }
        rows.push(row(call));
        count += 1;
    }
    (rows, count)
}

fn row(call: &KernelCall) -> Row {
    let [rdi, rsi, rdx, rcx, r8, r9] = call.arguments;
    [call.function, rdi, rsi, rdx, rcx, r8, r9]
}

/// Writes a word of a stack; `false` if there is none.
pub(crate) fn write_stack(virt: VirtMemory<'_, GuestMemory>, va: u64, value: u64) -> bool {
    let at = virt.space.walk(virt.memory, Gva(va));
    at.is_ok_and(|at| {
        let gpa = GuestAddress(at.gpa.0);
        va.is_multiple_of(8) && virt.memory.write_slice(&value.to_le_bytes(), gpa).is_ok()
    })
}
