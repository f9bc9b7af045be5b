//! What a function reaches by calls within its module: kernel functions, those that wait, and calls
//! that are not followed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use iced_x86::{InstructionInfoFactory, Mnemonic, OpKind, Register};
use serde::Serialize;

use super::code::{Callee, Code};
use super::facts;
use super::image::Ko;
use super::kernel::{Class, Kernel, Sleeps};

/// Most names in a list that is shown.
pub const MAX_NAMES: usize = 12;

/// Registers of arguments, from the first (System V ABI, section 3.2.3).
pub const ARGUMENTS: [Register; 6] = [
    Register::RDI,
    Register::RSI,
    Register::RDX,
    Register::RCX,
    Register::R8,
    Register::R9,
];

/// Whether a function can run from its start to its end without waiting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Atomic {
    /// Nothing that it calls waits, as far as calls go that say what they call; and all do.
    Yes,
    /// It calls what waits.
    No {
        /// The functions of the module on the way, the first one the entry itself.
        way: Vec<String>,
        /// What is called at its end.
        calls: String,
    },
    /// Not known.
    Unclear {
        /// Calls through pointers.
        indirect: usize,
        /// Functions some ways through which wait.
        may: Vec<String>,
        /// Functions of which it is not known.
        unknown: Vec<String>,
    },
}

/// What a function does itself.
#[derive(Debug, Default)]
struct Own {
    /// Imports that it calls, and whether that call waits.
    calls: BTreeMap<usize, Option<Sleeps>>,
    inner: BTreeSet<usize>,
    indirect: usize,
}

/// What all functions of a module call.
#[derive(Debug)]
pub struct Calls<'k> {
    own: Vec<Own>,
    names: Vec<String>,
    imports: Vec<&'k str>,
    kernel: &'k Kernel,
}

/// Everything that a function reaches.
#[derive(Debug, Default)]
pub struct Reached {
    /// Functions of the module, and from which each was reached first.
    pub functions: BTreeMap<usize, Option<usize>>,
    /// Imports, with whether some call of it waits.
    pub imports: BTreeMap<usize, Option<Sleeps>>,
    /// Calls through pointers.
    pub indirect: usize,
    /// The first call that waits: in which function, and of what.
    sleeping: Option<(usize, usize)>,
}

impl<'k> Calls<'k> {
    /// Of a module's functions.
    pub fn of(ko: &Ko<'k>, codes: &[Code], kernel: &'k Kernel) -> Self {
        let own = codes.iter().map(|code| {
            let mut own = Own::default();
            for (at, callee) in code.calls() {
                match callee {
                    Callee::Function(index) | Callee::Inside(index) => {
                        own.inner.insert(index);
                    }
                    Callee::Import(import) => {
                        let name = ko.imports.get(import).copied().unwrap_or_default();
                        let sleeps = call_sleeps(kernel, code, at, name);
                        let worst = own.calls.entry(import).or_insert(sleeps);
                        *worst = (*worst).max(sleeps);
                    }
                    Callee::Indirect => own.indirect += 1,
                    Callee::Elsewhere => {}
                }
            }
            own
        });
        Self {
            own: own.collect(),
            names: ko
                .functions
                .iter()
                .map(|function| function.name.to_owned())
                .collect(),
            imports: ko.imports.clone(),
            kernel,
        }
    }

    /// What is reached from a function.
    pub fn from(&self, entry: usize) -> Reached {
        let mut reached = Reached::default();
        reached.functions.insert(entry, None);
        let mut todo = VecDeque::from([entry]);
        while let Some(index) = todo.pop_front() {
            let Some(own) = self.own.get(index) else {
                continue;
            };
            reached.indirect += own.indirect;
            for (import, sleeps) in &own.calls {
                if *sleeps == Some(Sleeps::Yes) && reached.sleeping.is_none() {
                    reached.sleeping = Some((index, *import));
                }
                let worst = reached.imports.entry(*import).or_insert(*sleeps);
                *worst = (*worst).max(*sleeps);
            }
            for inner in &own.inner {
                if !reached.functions.contains_key(inner) {
                    reached.functions.insert(*inner, Some(index));
                    todo.push_back(*inner);
                }
            }
        }
        reached
    }

    /// Whether what was reached waits.
    pub fn atomic(&self, reached: &Reached) -> Atomic {
        if let Some((function, import)) = reached.sleeping {
            let mut way = Vec::new();
            let mut at = Some(function);
            while let Some(index) = at.filter(|_| way.len() < MAX_NAMES) {
                way.push(self.names.get(index).cloned().unwrap_or_default());
                at = reached.functions.get(&index).copied().flatten();
            }
            way.reverse();
            return Atomic::No {
                way,
                calls: self.import(import).to_owned(),
            };
        }
        let named = |wanted: Option<Sleeps>| -> Vec<String> {
            let imports = reached
                .imports
                .iter()
                .filter(|(_, sleeps)| **sleeps == wanted);
            imports
                .map(|(import, _)| self.import(*import).to_owned())
                .collect()
        };
        let (may, unknown) = (named(Some(Sleeps::May)), named(None));
        if reached.indirect == 0 && may.is_empty() && unknown.is_empty() {
            return Atomic::Yes;
        }
        Atomic::Unclear {
            indirect: reached.indirect,
            may,
            unknown,
        }
    }

    /// The imports of a class that were reached.
    pub fn of_class(&self, reached: &Reached, class: Class) -> Vec<String> {
        let names = reached.imports.keys().map(|import| self.import(*import));
        names
            .filter(|name| self.kernel.class(name) == class)
            .map(str::to_owned)
            .collect()
    }

    fn import(&self, import: usize) -> &str {
        self.imports.get(import).copied().unwrap_or_default()
    }
}

/// Whether this call waits: an allocator does only if it is asked to.
fn call_sleeps(kernel: &Kernel, code: &Code, at: usize, name: &str) -> Option<Sleeps> {
    let Some(argument) = facts::LINUX.allocators.get(name) else {
        return kernel.sleeps(name);
    };
    match constant_argument(code, at, *argument) {
        Some(flags) if flags & facts::MAY_RECLAIM == 0 => Some(Sleeps::No),
        Some(_) => Some(Sleeps::Yes),
        None => Some(Sleeps::May),
    }
}

/// The number that an argument is set to right before a call, in the same block.
fn constant_argument(code: &Code, call: usize, argument: usize) -> Option<u64> {
    let register = *ARGUMENTS.get(argument)?;
    let block = code
        .blocks
        .iter()
        .find(|block| (block.first..block.behind).contains(&call))?;
    let mut factory = InstructionInfoFactory::new();
    for index in (block.first..call).rev() {
        let insn = code.insns.get(index)?;
        if matches!(insn.goes, super::code::Goes::Call(_)) {
            return None;
        }
        let written = factory.info(&insn.i).used_registers().iter().any(|used| {
            used.register().full_register() == register
                && !matches!(
                    used.access(),
                    iced_x86::OpAccess::Read | iced_x86::OpAccess::CondRead
                )
        });
        if !written {
            continue;
        }
        let i = &insn.i;
        let immediate = matches!(
            i.op1_kind(),
            OpKind::Immediate32 | OpKind::Immediate32to64 | OpKind::Immediate64
        );
        return match i.mnemonic() {
            Mnemonic::Mov if immediate && insn.refers.is_none() => {
                Some(i.immediate(1) & 0xffff_ffff)
            }
            Mnemonic::Xor if i.op0_register() == i.op1_register() => Some(0),
            _ => None,
        };
    }
    None
}
