//! Error returns that nobody looks at: behind the call, on no way is what it returned read before
//! it is overwritten.

use iced_x86::{InstructionInfoFactory, OpAccess, Register};

use super::code::{Callee, Code, Goes};
use super::facts;
use super::image::Ko;
use crate::guest::btf::{Btf, Kind};

/// Most blocks that are looked at behind one call.
const MAX_BLOCKS: usize = 256;

/// The calls of a function whose errors are not looked at, with what is called.
pub fn ignored<'a>(
    ko: &Ko<'a>,
    code: &Code,
    function: usize,
    types: Option<&Btf>,
) -> Vec<(usize, &'a str)> {
    let calls = code
        .insns
        .iter()
        .enumerate()
        .filter_map(|(at, insn)| match insn.goes {
            Goes::Call(Callee::Import(import)) => Some((at, ko.imports.get(import).copied()?)),
            _ => None,
        });
    let matter: Vec<(usize, &str)> = calls
        .filter(|(_, name)| facts::LINUX.errors_matter.contains(name))
        .collect();
    if matter.is_empty() {
        return matter;
    }
    let name = ko
        .functions
        .get(function)
        .map_or("", |function| function.name);
    // What returns nothing need not leave anything in `rax`.
    let returns_nothing = types.is_some_and(|types| {
        let known = types.find_function(name);
        known.is_some_and(|known| matches!(types.resolve(known.returns), Some((_, Kind::Void))))
    });
    matter
        .into_iter()
        .filter(|(at, _)| !is_read(code, *at, returns_nothing))
        .collect()
}

/// Whether `rax` may be read behind a call. Where a way leaves the function, or cannot be followed,
/// it is taken for read.
fn is_read(code: &Code, call: usize, returns_nothing: bool) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let Some(block) = code
        .blocks
        .iter()
        .position(|block| (block.first..block.behind).contains(&call))
    else {
        return true;
    };
    let mut todo = vec![(block, call + 1)];
    let mut seen = vec![false; code.blocks.len()];
    let mut left = MAX_BLOCKS;
    while let Some((block, from)) = todo.pop() {
        let Some(rest) = left.checked_sub(1) else {
            return true;
        };
        left = rest;
        let Some(block) = code.blocks.get(block) else {
            return true;
        };
        let mut over = false;
        for at in from..block.behind {
            let Some(insn) = code.insns.get(at) else {
                return true;
            };
            match accesses(&mut factory, insn) {
                Access::None => {}
                Access::Read => return true,
                Access::Overwritten => {
                    over = true;
                    break;
                }
            }
            match insn.goes {
                // `al` counts vector registers for functions with `...`, and is set for that.
                Goes::Call(Callee::Import(_) | Callee::Function(_)) => {
                    over = true;
                    break;
                }
                Goes::Call(_)
                | Goes::TailCall(Callee::Inside(_) | Callee::Elsewhere | Callee::Indirect)
                | Goes::BranchOut(_) => return true,
                Goes::TailCall(_) => over = true,
                Goes::Return if !returns_nothing => return true,
                Goes::Return | Goes::Stop => over = true,
                Goes::Next | Goes::Jump(_) | Goes::Branch(_) => {}
            }
        }
        if over {
            continue;
        }
        for next in &block.next {
            let Some(first) = code.blocks.get(*next).map(|block| block.first) else {
                return true;
            };
            if let Some(seen) = seen.get_mut(*next).filter(|seen| !**seen) {
                *seen = true;
                todo.push((*next, first));
            }
        }
    }
    false
}

enum Access {
    None,
    Read,
    Overwritten,
}

fn accesses(factory: &mut InstructionInfoFactory, insn: &super::code::Insn) -> Access {
    // Its operand is not what is called, but the thunk's register: found as an indirect call.
    let i = &insn.i;
    let same = i.op_count() == 2
        && i.op0_register() == i.op1_register()
        && i.op0_register() != Register::None;
    let clears = same
        && matches!(
            i.mnemonic(),
            iced_x86::Mnemonic::Xor | iced_x86::Mnemonic::Sub
        );
    let mut access = Access::None;
    for used in factory.info(i).used_registers() {
        if used.register().full_register() != Register::RAX {
            continue;
        }
        match used.access() {
            OpAccess::Write if used.register().size() >= 4 => access = Access::Overwritten,
            // The upper part is lost, the lower one is new: neither is what was returned.
            OpAccess::Write => {}
            _ if clears => access = Access::Overwritten,
            OpAccess::NoMemAccess | OpAccess::None => {}
            _ => return Access::Read,
        }
    }
    access
}
