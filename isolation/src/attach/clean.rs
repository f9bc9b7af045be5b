//! The guest's memory without what isolation has put there, for a snapshot: who restores it knows
//! of no gates, and isolates anew.

use devices::dma::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::Isolator;
use crate::dispatch::armed::Armed;
use crate::guest::gate::GATE;
use crate::guest::gate::{FTRACE_NOP, GATE_BYTES};

/// Bytes of guest memory as they are without isolation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CleanBytes {
    /// Guest physical address of the first. They do not cross a page.
    pub at: GuestAddress,
    /// What belongs there.
    pub bytes: Vec<u8>,
}

impl CleanBytes {
    /// What takes the gate at `gpa` out; `None` if there is none.
    pub(super) fn of_gate(gpa: u64, memory: &GuestMemory) -> Option<Self> {
        let at = GuestAddress(gpa);
        let mut now = [0; GATE_BYTES];
        memory.read_slice(&mut now, at).ok()?;
        (now == GATE.bytes()).then(|| Self {
            at,
            bytes: FTRACE_NOP.to_vec(),
        })
    }

    /// Puts them there.
    pub(super) fn write(&self, memory: &GuestMemory) {
        if memory.write_slice(&self.bytes, self.at).is_err() {
            tracing::error!("cannot take a gate out of guest memory at {:#x}", self.at.0);
        }
    }
}

impl Armed {
    /// What takes everything of this module out of the guest's memory. None of its calls is open.
    pub(super) fn clean(&self, memory: &GuestMemory) -> Vec<CleanBytes> {
        let gates = self.gates.values();
        let gates = gates.filter_map(|gate| CleanBytes::of_gate(gate.gpa, memory));
        let call_loop = self.open.call_loop.filter(|_| !self.open.loop_stays);
        let call_loop = call_loop.map(|call_loop| {
            let (at, bytes) = call_loop.place_without();
            CleanBytes { at, bytes }
        });
        gates.chain(call_loop).collect()
    }
}

impl Isolator {
    /// What to put into a copy of the guest's memory, so that there is nothing of isolation in it.
    /// To be asked while the machine is at rest ([`vmm::VmHandle::quiesce`]): no call is open then,
    /// and the only traces are gates, the loop that calls kernel functions (which stays if a thread
    /// may be in it), and a fault that was put into the guest's own text. Faults that were ordered
    /// for isolated calls and redirected calls are in the domain's copies of code only.
    pub fn clean_bytes(&self) -> Vec<CleanBytes> {
        let memory = self.vm.ram().memory();
        let modules = self.modules();
        let watch = *self.watch();
        let watch = watch.and_then(|watch| CleanBytes::of_gate(watch.gpa(), memory));
        let of_modules = modules.values().flat_map(|armed| armed.clean(memory));
        let fault = self.text_fault();
        let of_fault = fault.iter().flat_map(|fault| fault.clean(memory));
        of_modules.chain(watch).chain(of_fault).collect()
    }
}
