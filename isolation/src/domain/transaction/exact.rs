//! Stores of the driver that are looked at one by one: those to pages that hold objects of others,
//! too.
//!
//! ```text
//!  store ─► page fault ─► which bytes? ─► not all the call's: a stray write, nothing was stored
//!                              │
//!                              ├─ rep movs, rep stos: carried out here, up to the page's end
//!                              └─ others: the page is opened, one step with RFLAGS.TF,
//!                                         debug exception, the page is closed
//! ```

use iced_x86::{
    Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, UsedMemory,
};
use kvm_bindings::kvm_regs;

use super::{Call, Step, TRAP_FLAG};
use crate::domain::error::DomainError;
use crate::domain::monitor::ExceptionFrame;
use crate::domain::roots::Root;
use crate::domain::view::{PAGE_SIZE, Pfn};
use crate::domain::violation::ViolationKind;

/// RFLAGS: string instructions go downwards.
const DIRECTION_FLAG: u64 = 1 << 10;
/// Most bytes that one store writes, but for string instructions: a register of AVX-512.
const MAX_STORE: u64 = 64;

/// A string instruction with a repeat prefix, as far as it goes in one page.
struct Repeated {
    /// Where it stores.
    to: u64,
    /// Where it loads, if it does: `RAX` is stored otherwise.
    from: Option<u64>,
    /// Bytes of one element.
    element: u64,
    /// Bytes in all, some elements.
    bytes: u64,
}

impl Call<'_> {
    /// Has the driver's store to `address` carried out, if the call may write all of its bytes.
    pub(super) fn one_store(
        &mut self,
        frame: &ExceptionFrame,
        address: u64,
        regs: &kvm_regs,
    ) -> Result<Step, DomainError> {
        let at = kvm_regs {
            rip: frame.rip,
            rsp: frame.rsp,
            rflags: frame.rflags,
            ..*regs
        };
        let instruction = self.domain.instruction(frame.rip);
        let Some(instruction) = instruction.filter(|found| !found.is_invalid()) else {
            return Ok(Step::Violation(
                ViolationKind::StrayWrite { address },
                frame.rip,
            ));
        };
        let is_here = |repeated: &Repeated| repeated.to / PAGE_SIZE == address / PAGE_SIZE;
        let repeated = repeated(&instruction, &at).filter(is_here);
        let bytes = repeated.as_ref().map_or_else(
            || stored_at(&instruction, &at, self.request.sregs.gs.base, address),
            |repeated| (repeated.to, repeated.bytes),
        );
        if let Some(address) = self.first_of_others(bytes) {
            return Ok(Step::Violation(
                ViolationKind::StrayWrite { address },
                frame.rip,
            ));
        }
        if let Some(repeated) = repeated
            && self.carry_out_repeated(&repeated, &at)?
        {
            self.last_fault = (0, 0, 0);
            let mut next = at;
            let times = repeated.bytes / repeated.element;
            next.rcx -= times;
            next.rdi = next.rdi.wrapping_add(repeated.bytes);
            if repeated.from.is_some() {
                next.rsi = next.rsi.wrapping_add(repeated.bytes);
            }
            let behind = frame.rip.wrapping_add(instruction.len() as u64);
            let rip = if next.rcx == 0 { behind } else { frame.rip };
            self.resume_at(frame, &next, rip);
            return Ok(Step::Continue);
        }
        let (first, last) = (bytes.0, bytes.0.wrapping_add(bytes.1 - 1));
        for page in [first, last].map(|at| at & !(PAGE_SIZE - 1)) {
            self.open_for_a_step(page)?;
        }
        if self.outdated.is_some() {
            // On tables that were made anew, which are loaded by a stub that is not to be stepped:
            // the store comes once more.
            let pages = std::mem::take(&mut self.stepping);
            self.domain.close(&pages);
            self.last_fault = (0, 0, 0);
            self.resume(frame, regs);
            return Ok(Step::Continue);
        }
        let stepped = ExceptionFrame {
            rflags: frame.rflags | TRAP_FLAG,
            ..*frame
        };
        self.resume(&stepped, regs);
        Ok(Step::Continue)
    }

    /// The debug exception after a store: the pages that were open for it are closed.
    pub(super) fn stepped(&mut self, frame: &ExceptionFrame, regs: &kvm_regs) -> Step {
        let pages = std::mem::take(&mut self.stepping);
        // The next store may be the same one again, and the fault before it one of as many as there
        // are stores.
        self.last_fault = (0, 0, 0);
        self.detours = self.detours.saturating_sub(2);
        self.domain.close(&pages);
        // The processor may remember that they were open.
        self.outdated = Some(Root::Driver);
        let next = ExceptionFrame {
            rflags: frame.rflags & !TRAP_FLAG,
            ..*frame
        };
        self.resume(&next, regs);
        Step::Continue
    }

    fn open_for_a_step(&mut self, page: u64) -> Result<(), DomainError> {
        if self.domain.roots.is_open(Root::Driver, page) {
            return Ok(());
        }
        let translation = self.domain.roots.translate(page, &self.domain.view)?;
        // What is not mapped, or not to be written by anybody, the store itself meets.
        let Some(translation) = translation.filter(|at| at.write) else {
            return Ok(());
        };
        self.open(page)?;
        self.domain.note_open(page, translation.gpa);
        self.stepping.push((Pfn::of(translation.gpa), page));
        Ok(())
    }

    /// The first of `bytes` at an address that the call may not write.
    fn first_of_others(&mut self, (at, bytes): (u64, u64)) -> Option<u64> {
        if self.supervisor.may_change(at, bytes) {
            return None;
        }
        let mut each = (0..bytes).map(|offset| at.wrapping_add(offset));
        each.find(|address| !self.supervisor.may_change(*address, 1))
    }

    /// Carries out a string instruction; `false`, with nothing done, if the processor has to.
    fn carry_out_repeated(
        &mut self,
        repeated: &Repeated,
        regs: &kvm_regs,
    ) -> Result<bool, DomainError> {
        let Some((to, to_offset)) = self.memory_at(repeated.to)? else {
            return Ok(false);
        };
        let from = match repeated.from {
            None => None,
            Some(from) => match self.memory_at(from)? {
                Some(from) => Some(from),
                None => return Ok(false),
            },
        };
        let bytes = repeated.bytes as usize;
        let element = repeated.element as usize;
        let source = match from {
            None => regs.rax.to_le_bytes()[..element].repeat(bytes / element),
            // What is stored may be loaded again a few elements later.
            Some((pfn, offset)) if pfn == to && offset.abs_diff(to_offset) < bytes => {
                return Ok(false);
            }
            Some((pfn, offset)) => {
                let page = self.domain.view.private_page(pfn)?;
                page[offset..offset + bytes].to_vec()
            }
        };
        self.begin_copy(repeated.to, to)?;
        let page = self.domain.view.private_page_mut(to)?;
        page[to_offset..to_offset + bytes].copy_from_slice(&source);
        self.note_host_written(to);
        self.domain.note_open(repeated.to, to.gpa());
        Ok(true)
    }

    /// The guest's memory at `va`: page, and offset in it.
    fn memory_at(&self, va: u64) -> Result<Option<(Pfn, usize)>, DomainError> {
        let translation = self.domain.roots.translate(va, &self.domain.view)?;
        let at = translation.map(|at| (Pfn::of(at.gpa), (at.gpa % PAGE_SIZE) as usize));
        Ok(at.filter(|(pfn, _)| self.domain.view.contains(*pfn)))
    }
}

/// What a string instruction with a repeat prefix does in the pages that it is at, if all of its
/// elements lie in one each.
fn repeated(instruction: &Instruction, regs: &kvm_regs) -> Option<Repeated> {
    if !instruction.has_rep_prefix() || regs.rflags & DIRECTION_FLAG != 0 {
        return None;
    }
    let (element, loads) = match string_store(instruction)? {
        (element, Source::Memory) => (element, true),
        (element, Source::Register) => (element, false),
        (_, Source::Port) => return None,
    };
    // With an address-size prefix other registers count, or a segment's base.
    let is_plain = instruction.memory_segment() != Register::FS
        && instruction.memory_segment() != Register::GS
        && instruction.op_kinds().all(|kind| {
            matches!(
                kind,
                OpKind::MemoryESRDI | OpKind::MemorySegRSI | OpKind::Register
            )
        });
    let left = |at: u64| PAGE_SIZE - at % PAGE_SIZE;
    let mut bytes = regs.rcx.saturating_mul(element).min(left(regs.rdi));
    if loads {
        bytes = bytes.min(left(regs.rsi));
    }
    let bytes = bytes / element * element;
    (is_plain && bytes > 0).then_some(Repeated {
        to: regs.rdi,
        from: loads.then_some(regs.rsi),
        element,
        bytes,
    })
}

/// Where a string instruction has from what it stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Memory,
    Register,
    Port,
}

/// Bytes of an element, and where it is from, of an instruction that stores strings.
fn string_store(instruction: &Instruction) -> Option<(u64, Source)> {
    // MOVSD is the name of an SSE instruction as well.
    let is_string = matches!(
        instruction.op0_kind(),
        OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI
    );
    let found = match instruction.mnemonic() {
        Mnemonic::Movsb => (1, Source::Memory),
        Mnemonic::Movsw => (2, Source::Memory),
        Mnemonic::Movsd => (4, Source::Memory),
        Mnemonic::Movsq => (8, Source::Memory),
        Mnemonic::Stosb => (1, Source::Register),
        Mnemonic::Stosw => (2, Source::Register),
        Mnemonic::Stosd => (4, Source::Register),
        Mnemonic::Stosq => (8, Source::Register),
        Mnemonic::Insb => (1, Source::Port),
        Mnemonic::Insw => (2, Source::Port),
        Mnemonic::Insd => (4, Source::Port),
        _ => return None,
    };
    is_string.then_some(found)
}

/// First byte and length of what `instruction` stores around `fault`, which lies in it.
fn stored_at(instruction: &Instruction, regs: &kvm_regs, gs_base: u64, fault: u64) -> (u64, u64) {
    if let Some((element, _)) = string_store(instruction) {
        let all = string_in_page(instruction, regs, element);
        let is_there = (all.0..all.0.saturating_add(all.1)).contains(&fault);
        return if is_there { all } else { (fault, element) };
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let stores = |memory: &&UsedMemory| {
        matches!(
            memory.access(),
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        )
    };
    let stored = info.used_memory().iter().filter(stores);
    let mut longest = 1;
    for memory in stored {
        let size = memory.memory_size().size() as u64;
        let size = size.clamp(1, MAX_STORE);
        longest = longest.max(size);
        let at = memory.virtual_address(0, |register, _, _| value_of(register, regs, gs_base));
        // Bit instructions reach beyond what is their operand by its address.
        if let Some(at) = at.filter(|at| (*at..at.saturating_add(size)).contains(&fault)) {
            return (at, size);
        }
    }
    (fault, longest)
}

/// First byte and length of what a string instruction with elements of so many bytes stores in the
/// page that it is at, one element at least. A processor stops behind each element with the trap
/// flag set (Intel SDM volume 1, section 7.3.9.2), but KVM does not where it carries the
/// instruction out itself.
fn string_in_page(instruction: &Instruction, regs: &kvm_regs, element: u64) -> (u64, u64) {
    let mask = match instruction.op0_kind() {
        OpKind::MemoryESEDI => u64::from(u32::MAX),
        _ => u64::MAX,
    };
    let (to, times) = (regs.rdi & mask, regs.rcx & mask);
    let offset = to % PAGE_SIZE;
    let downwards = regs.rflags & DIRECTION_FLAG != 0;
    let in_page = match downwards {
        true => offset / element + 1,
        false => (PAGE_SIZE - offset) / element,
    };
    let repeats = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let times = if repeats { times.min(in_page) } else { 1 }.max(1);
    let first = match downwards {
        true => to.wrapping_sub((times - 1) * element),
        false => to,
    };
    (first, times * element)
}

/// What a register has that addresses are made of.
fn value_of(register: Register, regs: &kvm_regs, gs_base: u64) -> Option<u64> {
    let whole = match register.full_register() {
        Register::RAX => regs.rax,
        Register::RBX => regs.rbx,
        Register::RCX => regs.rcx,
        Register::RDX => regs.rdx,
        Register::RSI => regs.rsi,
        Register::RDI => regs.rdi,
        Register::RBP => regs.rbp,
        Register::RSP => regs.rsp,
        Register::R8 => regs.r8,
        Register::R9 => regs.r9,
        Register::R10 => regs.r10,
        Register::R11 => regs.r11,
        Register::R12 => regs.r12,
        Register::R13 => regs.r13,
        Register::R14 => regs.r14,
        Register::R15 => regs.r15,
        Register::GS => return Some(gs_base),
        Register::CS | Register::DS | Register::ES | Register::SS => return Some(0),
        _ => return None,
    };
    match register.size() {
        8 => Some(whole),
        4 => Some(whole & u64::from(u32::MAX)),
        _ => None,
    }
}
