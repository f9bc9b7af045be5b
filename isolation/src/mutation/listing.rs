//! A function's instructions as they are in memory, and what each of them is for.

use std::collections::HashSet;

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register,
};

use super::Function;
use crate::analysis::facts;

/// Longest function that is looked at, in bytes. What is behind is no site.
const MAX_FUNCTION: usize = 64 << 10;
/// Bytes of the tracer at a function's start, behind `endbr64`.
const TRACER: usize = 5;
/// How far behind an instruction it is looked for what uses its result, in instructions.
const AHEAD: usize = 32;

/// What an instruction is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Role {
    /// Goes on behind itself.
    Plain,
    /// Calls a function; its name if it has one.
    Call(Option<String>),
    /// Goes to a function for good.
    TailCall(Option<String>),
    /// Goes elsewhere in the driver.
    Jump,
    /// Goes elsewhere in the driver if a condition holds.
    Branch,
    /// Ends the function.
    Return,
    /// Does nothing.
    Nop,
    /// Of the tracer, or `endbr64`.
    Kept,
    /// Traps, does not come back, or is no instruction.
    Dead,
}

/// An instruction.
#[derive(Debug)]
pub(super) struct Insn {
    /// Decoded; `ip` is its address.
    pub i: Instruction,
    /// From the function's start, in bytes.
    pub offset: usize,
    /// What it is for.
    pub role: Role,
    /// A branch of the function leads here.
    pub joined: bool,
}

/// A function's instructions.
pub(super) struct Listing<'a> {
    /// The function.
    pub function: &'a Function<'a>,
    /// Its instructions by address.
    pub insns: Vec<Insn>,
    /// `rbp` is the frame pointer, not a register like any other.
    frame_pointer: bool,
}

impl<'a> Listing<'a> {
    /// Decodes a function from its start to its end.
    pub fn of(function: &'a Function<'a>) -> Self {
        let code = function.code.get(..MAX_FUNCTION).unwrap_or(function.code);
        let mut decoder = Decoder::with_ip(64, code, function.start, DecoderOptions::NONE);
        let mut listing = Self {
            function,
            insns: Vec::new(),
            frame_pointer: false,
        };
        let mut kept = TRACER;
        while decoder.can_decode() {
            let offset = decoder.position();
            let mut i = decoder.decode();
            if offset == 0 && i.mnemonic() == Mnemonic::Endbr64 {
                kept = kept.saturating_add(i.len());
            }
            if i.is_invalid() {
                // One byte on: what follows may be sense again.
                let ip = function.start.wrapping_add(offset as u64);
                i = Instruction::default();
                i.set_ip(ip);
                i.set_len(1);
                if decoder.set_position(offset.saturating_add(1)).is_err() {
                    break;
                }
                decoder.set_ip(ip.wrapping_add(1));
            }
            let role = if offset < kept {
                Role::Kept
            } else {
                listing.role(&i)
            };
            let frame = i.mnemonic() == Mnemonic::Mov
                && (i.op0_register(), i.op1_register()) == (Register::RBP, Register::RSP);
            listing.frame_pointer |= frame;
            listing.insns.push(Insn {
                i,
                offset,
                role,
                joined: false,
            });
        }
        let targets: HashSet<u64> = listing
            .insns
            .iter()
            .filter(|insn| matches!(insn.role, Role::Jump | Role::Branch))
            .map(|insn| insn.i.near_branch_target())
            .collect();
        for insn in &mut listing.insns {
            insn.joined = targets.contains(&insn.i.ip());
        }
        listing
    }

    fn role(&self, i: &Instruction) -> Role {
        let near = is_near(i);
        let target = i.near_branch_target();
        let inside = near && self.inside(target);
        // A call of its own start is recursion, a jump there a loop.
        let name = near.then(|| (self.function.callee)(target)).flatten();
        let thunk = |name: &String| name.starts_with("__x86_indirect_");
        match i.flow_control() {
            _ if i.is_invalid() => Role::Dead,
            FlowControl::Next if matches!(i.mnemonic(), Mnemonic::Nop | Mnemonic::Endbr64) => {
                Role::Nop
            }
            FlowControl::Next | FlowControl::XbeginXabortXend => Role::Plain,
            FlowControl::Call
                if name
                    .as_ref()
                    .is_some_and(|name| facts::LINUX.no_return.contains(&name.as_str())) =>
            {
                Role::Dead
            }
            FlowControl::Call => Role::Call(name.filter(|name| !thunk(name))),
            FlowControl::IndirectCall => Role::Call(None),
            FlowControl::ConditionalBranch => Role::Branch,
            FlowControl::UnconditionalBranch if inside => Role::Jump,
            FlowControl::UnconditionalBranch => match name {
                Some(name) if name.ends_with("_return_thunk") => Role::Return,
                Some(name) if thunk(&name) => Role::TailCall(None),
                Some(name) if !name.contains(".cold") => Role::TailCall(Some(name)),
                _ => Role::Jump,
            },
            FlowControl::IndirectBranch => Role::Jump,
            FlowControl::Return => Role::Return,
            FlowControl::Interrupt | FlowControl::Exception => Role::Dead,
        }
    }

    /// Whether an address is in the function.
    pub fn inside(&self, va: u64) -> bool {
        va.wrapping_sub(self.function.start) < self.function.code.len() as u64
    }

    /// The bytes of an instruction.
    pub fn bytes(&self, insn: &Insn) -> &'a [u8] {
        let end = insn.offset.saturating_add(insn.i.len());
        self.function.code.get(insn.offset..end).unwrap_or_default()
    }

    /// The instruction, if something may be changed about it.
    pub fn site(&self, index: usize) -> Option<&Insn> {
        let insn = self.insns.get(index)?;
        let none = matches!(insn.role, Role::Nop | Role::Kept | Role::Dead);
        (!none).then_some(insn)
    }

    /// The call, or the copy of a whole string, that the value goes to that the instruction at
    /// `index` put into `register`. Only what surely runs behind it counts.
    pub fn user(&self, index: usize, register: Register) -> Option<&Insn> {
        for insn in self.behind(index) {
            match insn.role {
                _ if insn.joined => return None,
                Role::Call(_) | Role::TailCall(_) => return Some(insn),
                Role::Plain if is_copy(&insn.i) && register == Register::RCX => return Some(insn),
                Role::Plain if writes(&insn.i, register) => return None,
                Role::Plain | Role::Nop => {}
                _ => return None,
            }
        }
        None
    }

    /// The instructions right behind that at `index`, a bounded number of them.
    pub fn behind(&self, index: usize) -> impl Iterator<Item = &Insn> {
        let behind = index.saturating_add(1);
        self.insns.iter().skip(behind).take(AHEAD)
    }

    /// Whether the instruction is in front of all branches and calls of the function.
    pub fn at_the_beginning(&self, index: usize) -> bool {
        let before = self.insns.get(..=index).unwrap_or_default();
        before
            .iter()
            .all(|insn| !insn.joined && matches!(insn.role, Role::Plain | Role::Nop | Role::Kept))
    }

    /// Whether the instruction's operand in memory is in the function's stack frame.
    pub fn in_frame(&self, i: &Instruction) -> bool {
        match i.memory_base() {
            Register::RSP => true,
            Register::RBP => self.frame_pointer,
            _ => false,
        }
    }
}

/// A branch or call whose target is in the instruction.
pub(super) fn is_near(i: &Instruction) -> bool {
    i.op_count() > 0 && matches!(i.op0_kind(), OpKind::NearBranch64)
}

/// `rep movs` and `rep stos`: `rcx` is their length.
pub(super) fn is_copy(i: &Instruction) -> bool {
    use Mnemonic::{Movsb, Movsd, Movsq, Movsw, Stosb, Stosd, Stosq, Stosw};
    let copies = matches!(
        i.mnemonic(),
        Movsb | Movsw | Movsd | Movsq | Stosb | Stosw | Stosd | Stosq
    );
    copies && i.has_rep_prefix()
}

/// Whether the instruction writes any part of the register.
pub(super) fn writes(i: &Instruction, register: Register) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let used = factory.info(i).used_registers();
    used.iter()
        .any(|used| used.register().full_register() == register && is_write(used.access()))
}

/// What becomes of the first operand.
pub(super) fn op0_access(i: &Instruction) -> OpAccess {
    InstructionInfoFactory::new().info(i).op0_access()
}

pub(super) fn is_write(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}
