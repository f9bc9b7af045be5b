//! Calls that go on in the guest: what they did so far is published, and the guest's vCPU takes
//! over in the middle of the kernel function that the driver called.
//!
//! ```text
//!   P: driver ─► kernel function ─► must sleep        P: driver goes on ─► ... ─► commit
//!                                     │ publish                ▲
//!   K:                                └─► sleeps, ... returns ─┘ return gate
//! ```
//!
//! Only the innermost kernel function goes on in the guest: its return address on the stack becomes
//! the return gate. What is further out returns in P again, so its return addresses may stay those
//! of the monitor; the guest never returns through them while the call is open. A spilled call is
//! found again by the stack pointer with which that kernel function returns: nobody else has that
//! stack.

use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind};
use kvm_bindings::kvm_regs;

use super::Call;
use super::call::{CallEnd, PassThroughReason};
use super::callbacks::Callback;
use super::spilled_call::{ReturnSlot, SpilledCall};
use crate::domain::Domain;
use crate::domain::error::DomainError;
use crate::domain::monitor::PORT_TRAPPED;
use crate::domain::monitor::{self, CrossingFrame};
use crate::domain::view::{PAGE_SIZE, Pfn};
use crate::domain::violation::ViolationKind;

/// Bytes of the host's memory that a call in the guest takes at least.
const SPILLED_BYTES: u64 = 1024;
/// Times that one call may go on in the guest.
const MAX_SPILLS: u32 = 4096;
/// Most words of a call's stack that are looked through for what was handed out to it.
const MAX_STACK_WORDS: usize = 1024;

impl Domain {
    /// Gives a spilled call to the guest for good: its stack gets the driver's own return
    /// addresses, and the guest runs the rest unisolated. Returns where a vCPU goes on that has
    /// reached the return gate.
    pub fn hand_over(&mut self, call: &SpilledCall) -> u64 {
        for slot in &call.slots {
            let (pfn, offset) = slot.slot;
            let at = pfn.gpa() + offset as u64;
            let now = self.view.shared_word(at).unwrap_or(0);
            // The innermost one holds the return gate.
            if self.monitor.contains_va(now) || slot.rsp == call.returns_with() {
                let address = self.unmonitored(call, slot.rsp);
                if let Err(error) = self.view.write_shared_word(at, address) {
                    tracing::error!("a call's stack cannot be given back to the guest: {error}");
                }
            }
        }
        self.unmonitored(call, call.returns_with())
    }

    /// Where the driver's own code would return to with stack pointer `rsp`.
    fn unmonitored(&self, call: &SpilledCall, rsp: u64) -> u64 {
        let frames = call.frames.iter().filter(|frame| frame.rsp == rsp);
        let callbacks = call.callbacks.iter().filter(|callback| callback.rsp == rsp);
        frames
            .map(|frame| frame.return_address)
            .chain(callbacks.map(|callback| callback.return_address))
            .find(|address| !self.monitor.contains_va(*address))
            .unwrap_or(call.return_address)
    }
}

impl Call<'_> {
    /// Lets the guest go on with the registers `at`. `None` if it cannot: the call is as it was.
    pub(super) fn spill(
        &mut self,
        reason: PassThroughReason,
        at: &kvm_regs,
    ) -> Result<Option<(CallEnd, kvm_regs)>, DomainError> {
        let frames = self.domain.monitor.crossing_frames();
        let (Some(gate), Some(innermost)) = (self.request.return_gate, frames.last()) else {
            return Ok(None);
        };
        if self.spills >= MAX_SPILLS {
            return Ok(None);
        }
        let returns = frames.iter().map(|frame| frame.rsp);
        let mut returns: Vec<u64> = returns
            .chain(self.callbacks.iter().map(|c| c.rsp))
            .collect();
        returns.dedup();
        let mut slots = Vec::new();
        for rsp in returns {
            let Some(slot) = self.stack_slot(rsp.wrapping_sub(8))? else {
                return Ok(None);
            };
            slots.push(ReturnSlot { rsp, slot });
        }
        let Some(gate_slot) = slots.iter().find(|slot| slot.rsp == innermost.rsp) else {
            return Ok(None);
        };
        let gate_slot = gate_slot.slot;
        let frame_bytes = size_of::<CrossingFrame>() + size_of::<ReturnSlot>();
        let frames_bytes = frames.len() * frame_bytes
            + self.callbacks.len() * size_of::<Callback>()
            + self.answers.bytes();
        let mut kept = self.domain.host_memory.nothing();
        if !kept.grow(SPILLED_BYTES + 2 * frames_bytes as u64) {
            return Ok(None);
        }
        self.domain.vm.settle()?;
        // For whoever walks the stack in the guest.
        if self.read_slot(self.return_slot)? == self.domain.monitor.exit_stub() {
            self.write_slot(self.return_slot, self.return_address)?;
        }
        self.write_slot(gate_slot, gate)?;
        let held = self.values_held(at)?;
        // Nothing is known of it any more behind the call's leaving.
        if let Some(kind) = self.overrun() {
            return self.abort(kind, self.request.function).map(Some);
        }
        self.supervisor.leaves(&held);
        if let Some(kind) = self.publish()? {
            return self.abort(kind, self.request.function).map(Some);
        }
        self.settle_journal(frames.len() > 1 || !self.callbacks.is_empty());
        let spilled = SpilledCall {
            entry: self.entry,
            spills: self.spills + 1,
            time: self.time,
            return_address: self.return_address,
            return_slot: self.return_slot,
            callbacks: std::mem::take(&mut self.callbacks),
            answers: std::mem::take(&mut self.answers),
            stacks: std::mem::take(&mut self.stacks),
            _kept: kept,
            journal: self.journal.take(),
            frames,
            slots,
        };
        Ok(Some((CallEnd::Spilled(reason, Box::new(spilled)), *at)))
    }

    /// Takes a spilled call up again: its kernel function has returned in the guest.
    pub(super) fn begin_again(
        &mut self,
        spilled: &SpilledCall,
    ) -> Result<Option<PassThroughReason>, DomainError> {
        self.return_address = spilled.return_address;
        self.return_slot = spilled.return_slot;
        self.callbacks = spilled.callbacks.clone();
        self.stacks = spilled.stacks.clone();
        self.answers = spilled.answers.clone();
        if let Some(reason) = self.prepare()? {
            return Ok(Some(reason));
        }
        let Some((returned, outer)) = spilled.frames.split_last() else {
            return Err(DomainError::Internal("a spilled call without a crossing"));
        };
        let stub = self.domain.monitor.exit_stub();
        // Below the stack pointer by now if the kernel function was called in the function's place.
        self.write_slot(self.return_slot, stub)?;
        for callback in &self.callbacks {
            self.supervisor
                .called_back(callback.function, callback.arguments);
        }
        self.supervisor.returned(self.request.regs.rax);
        self.tell_answers();
        self.answer_leave(returned.rsp, self.request.regs.rax);
        let monitor = &mut self.domain.monitor;
        if !monitor.resume_with(outer, returned.return_address) {
            return Err(DomainError::Internal("crossings nested too deep"));
        }
        self.journal_leave(returned.rsp, self.request.regs.rax);
        if let Some(journal) = &mut self.journal {
            journal.settle_return();
        }
        self.start(&self.request.regs);
        Ok(None)
    }

    /// Registers with which the guest can do itself what P may not, being stopped at it with
    /// `regs`; `None` where that is not known for sure.
    pub(super) fn in_the_guest(
        &self,
        kind: &ViolationKind,
        regs: &kvm_regs,
    ) -> Result<Option<kvm_regs>, DomainError> {
        let rip = match kind {
            ViolationKind::ForeignPort {
                port: PORT_TRAPPED, ..
            } => self
                .trapped_at(regs.rip, &self.domain.trapped)
                .map(|(_, function)| function),
            ViolationKind::ForeignPort { port, write: true } if port.to_le_bytes()[1] == 0 => {
                self.gate_at(regs.rip, port.to_le_bytes()[0])
            }
            ViolationKind::ForeignMsr { .. }
            | ViolationKind::ForeignPort { .. }
            | ViolationKind::ForeignMmio { write: false, .. }
            | ViolationKind::PrivilegedInstruction => {
                self.is_access(regs.rip, kind).then_some(regs.rip)
            }
            // KVM has moved on already.
            _ => None,
        };
        Ok(rip.map(|rip| kvm_regs { rip, ..*regs }))
    }

    /// Where the `out` to this port is that P, stopped with this RIP, has just come to: KVMs differ
    /// in whether they have moved on already. Behind an entry gate of another isolated module is
    /// its return gate, another `out`.
    fn gate_at(&self, rip: u64, port: u8) -> Option<u64> {
        let out = monitor::out(port.into());
        let is_there = |at: &u64| {
            let mut code = [0; 2];
            self.domain.code(*at, &mut code).is_ok() && out == code
        };
        let there = [rip, rip.wrapping_sub(out.len() as u64)];
        if let Some(at) = there.into_iter().find(is_there) {
            return Some(at);
        }
        // `out` with its port in DX, unless there is another one in front: then it is not known
        // which one it is.
        let kind = ViolationKind::ForeignPort {
            port: port.into(),
            write: true,
        };
        let mut before = [0];
        let behind_another = self.domain.code(rip.wrapping_sub(1), &mut before).is_ok()
            && matches!(before, [0xee | 0xef]);
        (!behind_another && self.is_access(rip, &kind)).then_some(rip)
    }

    /// Whether the instruction at `rip` is one that makes such an access, and no other effect with
    /// it.
    fn is_access(&self, rip: u64, kind: &ViolationKind) -> bool {
        let mut code = [0; 15];
        let readable = (1..=code.len())
            .rev()
            .find(|bytes| self.domain.code(rip, &mut code[..*bytes]).is_ok());
        let code = &code[..readable.unwrap_or(0)];
        let instruction = Decoder::with_ip(64, code, rip, DecoderOptions::NONE).decode();
        match kind {
            ViolationKind::ForeignMsr { .. } => {
                matches!(instruction.mnemonic(), Mnemonic::Rdmsr | Mnemonic::Wrmsr)
            }
            ViolationKind::ForeignPort { .. } => {
                matches!(instruction.mnemonic(), Mnemonic::In | Mnemonic::Out)
            }
            // Not every KVM delivers a breakpoint where it emulates.
            ViolationKind::PrivilegedInstruction => instruction.mnemonic() == Mnemonic::Int3,
            _ => {
                let load = matches!(
                    instruction.mnemonic(),
                    Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd
                );
                load && instruction.op1_kind() == OpKind::Memory
            }
        }
    }

    /// What is in the registers that functions leave alone (System V ABI), and on the stack of the
    /// call up to its return address.
    pub(super) fn values_held(&self, at: &kvm_regs) -> Result<Vec<u64>, DomainError> {
        let mut values = vec![at.rbx, at.rbp, at.r12, at.r13, at.r14, at.r15];
        let words = (at.rsp & !7..self.entry.rsp).step_by(8);
        for va in words.take(MAX_STACK_WORDS) {
            if let Some(slot) = self.stack_slot(va)? {
                values.push(self.read_slot(slot)?);
            }
        }
        values.sort_unstable();
        values.dedup();
        Ok(values)
    }

    pub(super) fn stack_slot(&self, va: u64) -> Result<Option<(Pfn, usize)>, DomainError> {
        let translation = self.domain.roots.translate(va, &self.domain.view)?;
        let slot = translation.map(|at| (Pfn::of(at.gpa), (at.gpa % PAGE_SIZE) as usize));
        Ok(
            slot.filter(|(pfn, offset)| {
                offset.is_multiple_of(8) && self.domain.view.contains(*pfn)
            }),
        )
    }
}
