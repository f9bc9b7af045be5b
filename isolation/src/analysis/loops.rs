//! Loops that only a device ends.
//!
//! A loop is found where a block jumps back to one that it cannot be reached without. It waits for
//! the device without bound if each way out of it is decided by comparing what was loaded from a
//! register of the device, in the loop, with what does not change in it. One other way out, as for
//! a counter or the time, is taken for a bound.

use std::collections::BTreeSet;

use iced_x86::{InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::code::{Block, Code, Goes};
use super::flow::Flow;
use super::values::Value;

/// Most blocks of a function whose loops are looked for.
const MAX_BLOCKS: usize = 4096;
/// Most steps until the dominators are settled.
const MAX_ROUNDS: usize = 64;

/// A loop: the block that it begins with, and all of its blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loop {
    /// Where it begins.
    pub head: usize,
    /// Its blocks.
    pub body: BTreeSet<usize>,
}

/// The loops of a function, those with one head as one.
pub fn loops(code: &Code) -> Vec<Loop> {
    let blocks = &code.blocks;
    if blocks.len() > MAX_BLOCKS {
        return Vec::new();
    }
    let mut before: Vec<Vec<usize>> = vec![Vec::new(); blocks.len()];
    for (index, block) in blocks.iter().enumerate() {
        for next in &block.next {
            if let Some(before) = before.get_mut(*next) {
                before.push(index);
            }
        }
    }
    let Some(above) = dominators(blocks, &before) else {
        return Vec::new();
    };
    let dominates = |head: usize, mut block: usize| {
        for _ in 0..=blocks.len() {
            if block == head {
                return true;
            }
            match above.get(block).copied().flatten() {
                Some(up) if up != block => block = up,
                _ => return false,
            }
        }
        false
    };
    let mut found: Vec<Loop> = Vec::new();
    for (index, block) in blocks.iter().enumerate() {
        for head in block
            .next
            .iter()
            .copied()
            .filter(|head| dominates(*head, index))
        {
            let known = found.iter().position(|known| known.head == head);
            let at = known.unwrap_or_else(|| {
                found.push(Loop {
                    head,
                    body: BTreeSet::from([head]),
                });
                found.len() - 1
            });
            let Some(known) = found.get_mut(at) else {
                continue;
            };
            let mut todo = vec![index];
            while let Some(inside) = todo.pop() {
                if known.body.insert(inside) {
                    todo.extend(before.get(inside).into_iter().flatten());
                }
            }
        }
    }
    found
}

/// The immediate dominator of each block that is reached (K. D. Cooper, T. J. Harvey, K. Kennedy,
/// *A Simple, Fast Dominance Algorithm*). `None` if it does not settle.
fn dominators(blocks: &[Block], before: &[Vec<usize>]) -> Option<Vec<Option<usize>>> {
    let (mut order, mut rank) = (Vec::new(), vec![usize::MAX; blocks.len()]);
    let mut seen = vec![false; blocks.len()];
    let mut stack = vec![(0, 0)];
    *seen.first_mut()? = true;
    while let Some((block, child)) = stack.pop() {
        match blocks.get(block)?.next.get(child) {
            Some(next) => {
                stack.push((block, child + 1));
                if let Some(seen) = seen.get_mut(*next).filter(|seen| !**seen) {
                    *seen = true;
                    stack.push((*next, 0));
                }
            }
            None => order.push(block),
        }
    }
    order.reverse();
    for (place, block) in order.iter().enumerate() {
        *rank.get_mut(*block)? = place;
    }
    let mut above: Vec<Option<usize>> = vec![None; blocks.len()];
    *above.first_mut()? = Some(0);
    for _ in 0..MAX_ROUNDS {
        let mut changed = false;
        for block in order.iter().copied().skip(1) {
            let mut common: Option<usize> = None;
            for from in before
                .get(block)?
                .iter()
                .copied()
                .filter(|from| above.get(*from).is_some_and(Option::is_some))
            {
                common = Some(match common {
                    None => from,
                    Some(mut a) => {
                        let mut b = from;
                        while a != b {
                            let up = |block: usize| above.get(block).copied().flatten();
                            if rank.get(a)? > rank.get(b)? {
                                a = up(a)?
                            } else {
                                b = up(b)?
                            }
                        }
                        a
                    }
                });
            }
            let slot = above.get_mut(block)?;
            if *slot != common {
                *slot = common;
                changed = true;
            }
        }
        if !changed {
            return Some(above);
        }
    }
    None
}

/// The loops of a function that only the device ends: the instruction that decides, and the load.
pub fn waiting(code: &Code, flow: &mut Flow<'_>) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for one in loops(code) {
        let written = written(code, &one);
        let mut deciding: Option<(usize, usize)> = None;
        let exits = one
            .body
            .iter()
            .copied()
            .filter(|index| leaves(code, &one, *index));
        let exits: Vec<usize> = exits.collect();
        let all =
            exits.iter().all(
                |index| match decided_by_device(code, flow, &one, *index, &written) {
                    Some(by) => {
                        deciding = deciding.or(Some(by));
                        true
                    }
                    None => false,
                },
            );
        if let (true, Some(deciding)) = (all, deciding) {
            found.push(deciding);
        }
    }
    found
}

/// Whether a way out of the loop begins at the end of the block.
fn leaves(code: &Code, one: &Loop, index: usize) -> bool {
    let Some(block) = code.blocks.get(index) else {
        return true;
    };
    let last = block
        .behind
        .checked_sub(1)
        .and_then(|last| code.insns.get(last));
    let out = matches!(last.map(|insn| insn.goes), Some(Goes::BranchOut(_)));
    out || block.next.iter().any(|next| !one.body.contains(next))
}

/// Registers that are written in the loop.
fn written(code: &Code, one: &Loop) -> BTreeSet<Register> {
    let mut factory = InstructionInfoFactory::new();
    let blocks = one.body.iter().filter_map(|index| code.blocks.get(*index));
    let mut written = BTreeSet::new();
    for (_, insn) in blocks.flat_map(|block| code.block(block)) {
        let used = factory.info(&insn.i).used_registers().iter();
        let writes = used.filter(|used| {
            !matches!(
                used.access(),
                OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
            )
        });
        written.extend(writes.map(|used| used.register().full_register()));
        if matches!(insn.goes, Goes::Call(_)) {
            use Register::{R8, R9, R10, R11, RAX, RCX, RDI, RDX, RSI};
            written.extend([RAX, RCX, RDX, RSI, RDI, R8, R9, R10, R11]);
        }
    }
    written
}

/// The instruction that decides at the end of a block, and a load in the loop that it decides by,
/// if it is the device alone that does.
fn decided_by_device(
    code: &Code,
    flow: &mut Flow<'_>,
    one: &Loop,
    index: usize,
    written: &BTreeSet<Register>,
) -> Option<(usize, usize)> {
    let block = code.blocks.get(index)?;
    let mut state = flow.starts.get(index)?.clone()?;
    let (last, _) = code.block(block).next_back()?;
    // The last instruction that sets flags; a call that comes behind it has changed them.
    let deciding = (block.first..last).rev().find(|at| {
        code.insns
            .get(*at)
            .is_some_and(|insn| insn.i.rflags_modified() != 0 || matches!(insn.goes, Goes::Call(_)))
    })?;
    for at in block.first..deciding {
        flow.step(&mut state, at);
    }
    let i = code.insns.get(deciding)?.i;
    use Mnemonic::{And, Bt, Cmp, Sar, Shl, Shr, Test};
    if !matches!(i.mnemonic(), And | Bt | Cmp | Sar | Shl | Shr | Test) || i.op_count() != 2 {
        return None;
    }
    let mut load = None;
    for number in 0..2 {
        match flow.operand(&state, deciding, number) {
            Value::Device { sites, .. } => {
                let of_register = flow.sites.iter().enumerate().find(|(index, site)| {
                    let inside = one.body.iter().filter_map(|block| code.blocks.get(*block));
                    let mut inside = inside.map(|block| block.first..block.behind);
                    sites >> index & 1 != 0
                        && !site.memory
                        && inside.any(|range| range.contains(&site.insn))
                });
                load = load.or(of_register.map(|(_, site)| site.insn));
            }
            Value::Number(_) => {}
            _ if i.op_kind(number) == OpKind::Register => {
                if written.contains(&i.op_register(number).full_register()) {
                    return None;
                }
            }
            _ => return None,
        }
    }
    load.map(|load| (deciding, load))
}
