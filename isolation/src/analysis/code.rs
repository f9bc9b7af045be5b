//! The instructions of one function of a module's file, where they go, and its basic blocks.
//!
//! The file is not what runs: calls of the tracer are still there, alternatives are not applied. An
//! address is an offset in the function's section. A branch that a relocation leads elsewhere is a
//! call, or a jump for good, of what is there.

use std::collections::BTreeMap;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind};

use super::facts;
use super::image::{Applied, Function, Ko, Place, Relocation};

/// What is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Callee {
    /// A function of the module, by its index in [`Ko::functions`].
    Function(usize),
    /// A symbol of the kernel or of another module, by its index in [`Ko::imports`].
    Import(usize),
    /// What a register or memory says.
    Indirect,
    /// The middle of a function, by its index: a cold part, or the way back from it.
    Inside(usize),
    /// No function.
    Elsewhere,
}

/// Where execution goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goes {
    /// Behind the instruction.
    Next,
    /// To a function, and then behind the instruction.
    Call(Callee),
    /// To a function, and not back.
    TailCall(Callee),
    /// To an instruction of the function, by its index.
    Jump(usize),
    /// There, or behind the instruction.
    Branch(usize),
    /// Out of the function, or behind the instruction.
    BranchOut(Callee),
    /// To the caller.
    Return,
    /// Nowhere: a trap, a call of what does not return, or no instruction.
    Stop,
}

/// An operand that a relocation fills in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refers {
    /// It is the displacement of the memory operand, not the immediate.
    pub displacement: bool,
    /// What it is the address of.
    pub to: Place,
}

/// An instruction.
#[derive(Debug, Clone, Copy)]
pub struct Insn {
    /// Decoded; `ip` is the offset in the section.
    pub i: Instruction,
    /// Where it goes.
    pub goes: Goes,
    /// What a relocation made of an operand.
    pub refers: Option<Refers>,
}

/// Instructions that run one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Block {
    /// Index of its first instruction.
    pub first: usize,
    /// Index behind its last one.
    pub behind: usize,
    /// Blocks that may follow; at most two.
    pub next: Vec<usize>,
}

/// A function's code.
#[derive(Debug, Default)]
pub struct Code {
    /// Its instructions by address.
    pub insns: Vec<Insn>,
    /// Its blocks by address; the first one is where it begins.
    pub blocks: Vec<Block>,
    /// It begins with a call of the tracer, which the kernel makes a NOP: a gate fits in.
    pub traced: bool,
}

impl Code {
    /// Decodes a function. What cannot be decoded ends the block that it is in.
    pub fn of(ko: &Ko<'_>, function: &Function<'_>) -> Self {
        let bytes = ko.code(function);
        let relocations = ko.relocations_in(function.section, function.start, function.len);
        let mut decoder = Decoder::with_ip(64, bytes, function.start, DecoderOptions::NONE);
        let mut code = Self::default();
        let mut index_at = BTreeMap::new();
        let mut i = Instruction::default();
        while decoder.can_decode() {
            let position = decoder.position();
            decoder.decode_out(&mut i);
            if i.is_invalid() {
                // One byte on: what follows may be sense again.
                i = Instruction::default();
                i.set_ip(function.start.wrapping_add(position as u64));
                i.set_len(1);
                code.insns.push(Insn {
                    i,
                    goes: Goes::Stop,
                    refers: None,
                });
                if decoder.set_position(position + 1).is_err() {
                    break;
                }
                decoder.set_ip(function.start.wrapping_add(position as u64 + 1));
                continue;
            }
            index_at.insert(i.ip(), code.insns.len());
            let offsets = decoder.get_constant_offsets(&i);
            let field = |from: usize, has: bool| has.then(|| i.ip().wrapping_add(from as u64));
            let displacement = field(offsets.displacement_offset(), offsets.has_displacement());
            let immediate = field(offsets.immediate_offset(), offsets.has_immediate());
            let here = relocation_in(relocations, i.ip(), i.len() as u64);
            let refers = here.and_then(|relocation| {
                let displaced = displacement == Some(relocation.at);
                let fits = displaced || immediate == Some(relocation.at);
                let to = resolved(relocation, i.next_ip());
                fits.then_some(to).flatten().map(|to| Refers {
                    displacement: displaced,
                    to,
                })
            });
            code.insns.push(Insn {
                i,
                goes: Goes::Next,
                refers,
            });
        }
        code.flow(ko, function, &index_at);
        code.cut();
        code
    }

    /// Says where each instruction goes.
    fn flow(&mut self, ko: &Ko<'_>, function: &Function<'_>, index_at: &BTreeMap<u64, usize>) {
        for index in 0..self.insns.len() {
            let Some(insn) = self.insns.get(index).copied() else {
                break;
            };
            if insn.goes == Goes::Stop {
                continue;
            }
            let goes = goes(ko, function, index_at, &insn);
            let tracer = matches!(goes, Goes::Call(Callee::Import(import)) if ko.imports.get(import) == Some(&"__fentry__"));
            // Behind `endbr64` at most.
            if tracer && index <= 1 {
                self.traced = true;
            }
            if let Some(insn) = self.insns.get_mut(index) {
                insn.goes = if tracer { Goes::Next } else { goes };
            }
        }
    }

    /// Cuts the instructions into blocks.
    fn cut(&mut self) {
        let mut begins = vec![false; self.insns.len() + 1];
        if let Some(first) = begins.first_mut() {
            *first = true;
        }
        for (index, insn) in self.insns.iter().enumerate() {
            let mut begin = |at: usize| {
                begins
                    .get_mut(at)
                    .into_iter()
                    .for_each(|begins| *begins = true)
            };
            match insn.goes {
                Goes::Next | Goes::Call(_) => {}
                Goes::Jump(to) | Goes::Branch(to) => {
                    begin(to);
                    begin(index + 1);
                }
                _ => begin(index + 1),
            }
        }
        let firsts: Vec<usize> = (0..self.insns.len())
            .filter(|at| begins.get(*at) == Some(&true))
            .collect();
        let block_at = |at: usize| firsts.binary_search(&at).ok();
        for (number, first) in firsts.iter().enumerate() {
            let behind = firsts.get(number + 1).copied().unwrap_or(self.insns.len());
            let last = self
                .insns
                .get(behind - 1)
                .map_or(Goes::Stop, |insn| insn.goes);
            let (to, on) = match last {
                Goes::Jump(to) => (block_at(to), None),
                Goes::Branch(to) => (block_at(to), block_at(behind)),
                Goes::Next | Goes::Call(_) | Goes::BranchOut(_) => (None, block_at(behind)),
                Goes::TailCall(_) | Goes::Return | Goes::Stop => (None, None),
            };
            let next = to.into_iter().chain(on).collect();
            self.blocks.push(Block {
                first: *first,
                behind,
                next,
            });
        }
    }

    /// The instructions of a block, with their indices.
    pub fn block(&self, block: &Block) -> impl DoubleEndedIterator<Item = (usize, &Insn)> {
        let insns = self
            .insns
            .get(block.first..block.behind)
            .unwrap_or_default();
        insns
            .iter()
            .enumerate()
            .map(|(offset, insn)| (block.first + offset, insn))
    }

    /// What is called, once for each call.
    pub fn calls(&self) -> impl Iterator<Item = (usize, Callee)> {
        self.insns
            .iter()
            .enumerate()
            .filter_map(|(index, insn)| match insn.goes {
                Goes::Call(callee) | Goes::TailCall(callee) | Goes::BranchOut(callee) => {
                    Some((index, callee))
                }
                _ => None,
            })
    }
}

fn relocation_in(relocations: &[Relocation], ip: u64, len: u64) -> Option<&Relocation> {
    let first = relocations.partition_point(|relocation| relocation.at < ip);
    relocations
        .get(first)
        .filter(|relocation| relocation.at < ip.saturating_add(len))
}

/// What the relocation leads to, for an instruction that ends at `next_ip`.
fn resolved(relocation: &Relocation, next_ip: u64) -> Option<Place> {
    let added = match relocation.applied {
        Applied::Relative => relocation
            .addend
            .checked_add(i64::try_from(next_ip.checked_sub(relocation.at)?).ok()?)?,
        Applied::Absolute => relocation.addend,
    };
    Some(match relocation.to {
        Place::Here { section, offset } => Place::Here {
            section,
            offset: offset.checked_add_signed(added)?,
        },
        import => import,
    })
}

fn goes(
    ko: &Ko<'_>,
    function: &Function<'_>,
    index_at: &BTreeMap<u64, usize>,
    insn: &Insn,
) -> Goes {
    let i = &insn.i;
    let near = matches!(
        i.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    );
    let target = match insn.refers {
        Some(refers) => Some(refers.to),
        None if near => Some(Place::Here {
            section: function.section,
            offset: i.near_branch_target(),
        }),
        None => None,
    };
    // A call of its own start is recursion, a jump there a loop.
    let inner = match target {
        Some(Place::Here { section, offset }) if section == function.section => {
            index_at.get(&offset).copied()
        }
        _ => None,
    };
    let import = match target {
        Some(Place::Import(import)) => ko.imports.get(import).copied(),
        _ => None,
    };
    let callee = match target {
        _ if import.is_some_and(|name| name.starts_with("__x86_indirect_")) => Callee::Indirect,
        Some(Place::Import(import)) => Callee::Import(import),
        Some(Place::Here { section, offset }) => {
            let start = ko.function_at(section, offset).map(Callee::Function);
            let inside = || ko.function_around(section, offset).map(Callee::Inside);
            start.or_else(inside).unwrap_or(Callee::Elsewhere)
        }
        None => Callee::Elsewhere,
    };
    let returns = import.is_some_and(|name| name.ends_with("_return_thunk"));
    match i.flow_control() {
        FlowControl::Next => Goes::Next,
        FlowControl::Call if import.is_some_and(|name| facts::LINUX.no_return.contains(&name)) => {
            Goes::Stop
        }
        FlowControl::Call => Goes::Call(callee),
        FlowControl::UnconditionalBranch if returns => Goes::Return,
        FlowControl::UnconditionalBranch => inner.map_or(Goes::TailCall(callee), Goes::Jump),
        FlowControl::ConditionalBranch => inner.map_or(Goes::BranchOut(callee), Goes::Branch),
        FlowControl::IndirectCall => Goes::Call(Callee::Indirect),
        FlowControl::IndirectBranch => Goes::TailCall(Callee::Indirect),
        FlowControl::Return => Goes::Return,
        _ => Goes::Stop,
    }
}
