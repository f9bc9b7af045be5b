//! Which branches go on with a loop or leave one.

use std::collections::HashSet;

use super::listing::{Listing, Role, is_near};

/// Most instructions of a loop that are followed.
const LONGEST: usize = 512;
/// Most jumps backwards that are taken for the end of the loop that a branch leaves.
const ENDS: usize = 2;

/// Whether the branch at `index` is the one by which a loop goes on or ends: it goes back to where
/// it comes from, or it goes behind a jump that does.
pub(super) fn decides(listing: &Listing<'_>, index: usize) -> bool {
    let Some(to) = target(listing, index) else {
        return false;
    };
    if to <= index {
        return reaches(listing, to, index, to, index);
    }
    let behind = index.saturating_add(1);
    (behind..to)
        .filter_map(|end| {
            let head = target(listing, end)?;
            (head <= index).then_some((head, end))
        })
        .take(ENDS)
        .any(|(head, end)| {
            reaches(listing, behind, end, head, end) && reaches(listing, head, index, head, end)
        })
}

/// The index of the instruction that a branch or jump leads to, if it is in the function.
fn target(listing: &Listing<'_>, index: usize) -> Option<usize> {
    let insn = listing.insns.get(index)?;
    let goes = matches!(insn.role, Role::Jump | Role::Branch) && is_near(&insn.i);
    let target = goes.then(|| insn.i.near_branch_target())?;
    let offset = target.checked_sub(listing.function.start)?;
    let offset = usize::try_from(offset).ok()?;
    listing
        .insns
        .binary_search_by_key(&offset, |insn| insn.offset)
        .ok()
}

/// Whether execution comes from one instruction to another without leaving those from `low` to
/// `high`.
fn reaches(listing: &Listing<'_>, from: usize, to: usize, low: usize, high: usize) -> bool {
    let mut seen = HashSet::new();
    let mut left = vec![from];
    while let Some(at) = left.pop() {
        if at == to {
            return true;
        }
        if at < low || at > high || seen.len() >= LONGEST || !seen.insert(at) {
            continue;
        }
        let role = listing.insns.get(at).map(|insn| &insn.role);
        let next = at.saturating_add(1);
        match role {
            Some(Role::Jump) => left.extend(target(listing, at)),
            Some(Role::Branch) => left.extend(target(listing, at).into_iter().chain([next])),
            Some(Role::Plain | Role::Nop | Role::Call(_) | Role::Kept) => left.push(next),
            Some(Role::TailCall(_) | Role::Return | Role::Dead) | None => {}
        }
    }
    false
}
