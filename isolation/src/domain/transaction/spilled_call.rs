//! What is kept of a call while it goes on in the guest.

use kvm_bindings::kvm_regs;

use super::answers::Answers;
use super::callbacks::Callback;
use super::time::CallTime;
use crate::domain::effects::KernelCall;
use crate::domain::host_memory::Kept;
use crate::domain::journal::Journal;
use crate::domain::monitor::CrossingFrame;
use crate::domain::view::Pfn;
use crate::guest::addr::GvaRange;

/// A place on a stack that holds a return address.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReturnSlot {
    /// Stack pointer after a return through it.
    pub(super) rsp: u64,
    pub(super) slot: (Pfn, usize),
}

/// A call that goes on in the guest.
#[derive(Debug, Clone)]
pub struct SpilledCall {
    pub(super) entry: kvm_regs,
    pub(super) spills: u32,
    /// Time that it has had.
    pub(super) time: CallTime,
    pub(super) return_address: u64,
    pub(super) return_slot: (Pfn, usize),
    pub(super) callbacks: Vec<Callback>,
    pub(super) answers: Answers,
    pub(super) stacks: Vec<GvaRange>,
    /// What is charged for it, its journal left aside.
    pub(super) _kept: Kept,
    /// `None` if nothing is known of the kernel's functions.
    pub(super) journal: Option<Box<Journal>>,
    /// Kernel functions called by the driver, outermost first; the last one is running in the
    /// guest.
    pub(super) frames: Vec<CrossingFrame>,
    pub(super) slots: Vec<ReturnSlot>,
}

impl SpilledCall {
    /// Stack pointer with which the guest arrives at the return gate.
    pub fn returns_with(&self) -> u64 {
        self.frames.last().map_or(0, |frame| frame.rsp)
    }

    /// Registers at the entry of the call.
    pub fn entry(&self) -> &kvm_regs {
        &self.entry
    }

    /// Kernel functions that the call did not call yet and that have to be called once it has ended
    /// well, or in any case if it is given to the guest for good.
    pub fn take_deferred(&mut self) -> Vec<KernelCall> {
        let journal = self.journal.as_mut();
        journal.map_or_else(Vec::new, |journal| journal.take_deferred())
    }

    /// What is charged of the host's memory for these.
    pub fn take_kept(&mut self) -> Kept {
        let journal = self.journal.as_mut();
        journal.map_or_else(Kept::default, |journal| journal.take_kept())
    }

    /// Whether the call can be taken back.
    pub fn is_journalled(&self) -> bool {
        self.journal.is_some()
    }

    /// Whether there are such kernel functions.
    pub fn has_deferred(&self) -> bool {
        self.journal
            .as_ref()
            .is_some_and(|journal| journal.has_deferred())
    }

    /// Whether packets must not be given to the device while the call is in the guest: it has
    /// changed the device's transmitter, and could not be taken back with them in its ring.
    pub fn keeps_packets_out(&self) -> bool {
        let journal = self.journal.as_ref();
        journal.is_some_and(|journal| journal.keeps_packets_out())
    }

    /// Times that the call has gone on in the guest by now.
    pub fn spills(&self) -> u32 {
        self.spills
    }
}
