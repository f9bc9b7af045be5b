//! What lies behind a module's variables and in them. No type tells: BTF has no variables of
//! modules but the per-CPU ones. What the module's own code does with them does.
//!
//! ```text
//!   mov  var(%rip), %rdi ; call kfree        what the variable points at is the module's own
//!   mov  var(%rip), %rdi ; call kmem_cache_free    what it points at is a slab cache of the module's
//!   lea  var(%rip), %rdi ; call idr_find     the variable is what idr_find takes: a struct idr
//! ```
//!
//! Only first arguments are looked at, and only those that are loaded in front of the call with no
//! branch taken.

use std::collections::BTreeSet;

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register,
};

use crate::guest::addr::{Gva, GvaRange};
use crate::guest::btf::{Btf, TypeId};
use crate::guest::module_text::TextPart;
use crate::guest::symbols::SymbolTable;
use crate::policy::reach::{Rules, Start};

/// Functions that free what their first argument is.
const FREES: &[&str] = &[
    "free_percpu",
    "kfree",
    "kfree_sensitive",
    "kvfree",
    "kvfree_sensitive",
    "vfree",
];

/// Functions that give up a slab cache, or an object of one, which is their first argument.
const OF_CACHES: &[&str] = &["kmem_cache_destroy", "kmem_cache_free"];

/// Most variables of each kind.
const MAX_VARIABLES: usize = 256;

/// What is known of a module's variables.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct OwnVariables {
    /// Variables that point at memory that the module frees.
    pub freed: BTreeSet<Gva>,
    /// Variables that point at slab caches of the module's.
    pub caches: BTreeSet<Gva>,
    /// Where structures of the kernel's are that lead to what is the module's.
    pub structures: Vec<Start>,
    /// Structures in which it keeps things by number, with their types.
    pub arrays: Vec<(Gva, TypeId)>,
    /// Queues of packets.
    pub queues: Vec<Gva>,
}

/// The first argument of a function that the module calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Argument {
    /// The address of a variable.
    Address(Gva),
    /// What a variable has.
    Content(Gva),
}

impl OwnVariables {
    /// By the code of the module, `text`; its variables are in `data`.
    pub fn new(
        text: &[TextPart<'_>],
        data: &[GvaRange],
        types: &Btf,
        symbols: &SymbolTable,
        rules: &Rules,
    ) -> Self {
        let mut own = Self::default();
        let mut seen = BTreeSet::new();
        for_each_call(text, symbols, &mut |function, argument| {
            let (Argument::Address(at) | Argument::Content(at)) = argument;
            let is_variable = data.iter().any(|range| range.contains(at));
            if is_variable && seen.len() < MAX_VARIABLES * 4 && seen.insert((function, argument)) {
                let names = symbols.at(function).map(|symbol| symbol.name);
                names.for_each(|name| own.note(name, argument, types, rules));
            }
        });
        own
    }

    fn note(&mut self, function: &str, argument: Argument, types: &Btf, rules: &Rules) {
        match argument {
            Argument::Content(at) => {
                if FREES.contains(&function) && self.freed.len() < MAX_VARIABLES {
                    self.freed.insert(at);
                }
                if OF_CACHES.contains(&function) && self.caches.len() < MAX_VARIABLES {
                    self.caches.insert(at);
                }
            }
            Argument::Address(at) => {
                let function = types.find_function(function);
                let first = function.and_then(|function| function.params.iter().next());
                let to = first.and_then(|first| types.pointee(first.type_id));
                if let Some((id, _)) = to.and_then(|to| types.resolve(to)) {
                    self.structure(at, id, types, rules);
                }
            }
        }
    }

    fn structure(&mut self, at: Gva, id: TypeId, types: &Btf, rules: &Rules) {
        let name = types.name(id);
        let known = self.structures.len() + self.arrays.len() + self.queues.len();
        if known >= MAX_VARIABLES {
            return;
        }
        if rules.arrays.iter().any(|rule| rule.of == name) {
            if !self.arrays.contains(&(at, id)) {
                self.arrays.push((at, id));
            }
        } else if rules.queues.contains(&name) {
            if !self.queues.contains(&at) {
                self.queues.push(at);
            }
        } else if rules.followed.iter().any(|rule| rule.of == name)
            && !self.structures.iter().any(|start| start.at == at)
        {
            self.structures.push(Start {
                at,
                type_id: id,
                name: "variable of the driver's".into(),
            });
        }
    }
}

/// Calls `found` with each function outside that is called with a first argument that is known, and
/// that argument.
fn for_each_call(
    text: &[TextPart<'_>],
    symbols: &SymbolTable,
    found: &mut dyn FnMut(Gva, Argument),
) {
    for part in text {
        let Some(whole) = GvaRange::new(part.at, part.bytes.len() as u64) else {
            continue;
        };
        let mut at = whole.first();
        while let Some(function) = symbols.extent(at, whole) {
            let from = (at.0 - whole.first().0) as usize;
            let to = from.saturating_add(function.len_bytes() as usize);
            if let Some(code) = part.bytes.get(from..to) {
                calls_of(code, at, found);
            }
            match function.last().checked_add(1) {
                Some(next) => at = next,
                None => break,
            }
        }
    }
}

fn calls_of(code: &[u8], at: Gva, found: &mut dyn FnMut(Gva, Argument)) {
    let mut info = InstructionInfoFactory::new();
    let mut argument = None;
    for instruction in &mut Decoder::with_ip(64, code, at.0, DecoderOptions::NONE) {
        let target = Gva(instruction.near_branch_target());
        match instruction.flow_control() {
            FlowControl::Next => {
                if let Some(loaded) = first_argument(&instruction) {
                    argument = Some(loaded);
                } else if argument.is_some() && writes_first_argument(&mut info, &instruction) {
                    argument = None;
                }
            }
            // It goes on behind it, too.
            FlowControl::ConditionalBranch => {}
            // The last thing that a function does may be to call another.
            FlowControl::Call | FlowControl::UnconditionalBranch => {
                if let (Some(argument), true) = (argument.take(), target.0 != 0) {
                    found(target, argument);
                }
            }
            _ => argument = None,
        }
    }
}

/// What an instruction loads into RDI that does nothing else.
fn first_argument(instruction: &Instruction) -> Option<Argument> {
    if instruction.op0_kind() != OpKind::Register
        || instruction.op0_register() != Register::RDI
        || instruction.segment_prefix() != Register::None
    {
        return None;
    }
    let memory = || match (instruction.memory_base(), instruction.memory_index()) {
        (Register::RIP | Register::None, Register::None) => {
            Some(Gva(instruction.memory_displacement64()))
        }
        _ => None,
    };
    match (instruction.mnemonic(), instruction.op1_kind()) {
        (Mnemonic::Lea, OpKind::Memory) => memory().map(Argument::Address),
        (Mnemonic::Mov, OpKind::Memory) => memory().map(Argument::Content),
        (Mnemonic::Mov, OpKind::Immediate64 | OpKind::Immediate32to64) => {
            Some(Argument::Address(Gva(instruction.immediate(1))))
        }
        _ => None,
    }
}

fn writes_first_argument(info: &mut InstructionInfoFactory, instruction: &Instruction) -> bool {
    let used = info.info(instruction).used_registers();
    used.iter().any(|used| {
        used.register().full_register() == Register::RDI
            && !matches!(
                used.access(),
                OpAccess::None | OpAccess::Read | OpAccess::CondRead
            )
    })
}

#[cfg(test)]
#[path = "own_variables_tests.rs"]
mod tests;
