//! One instruction of a driver's function changed, as a fault of a programmer or of the hardware
//! would have it.
//!
//! ```text
//!   code in memory ─► listing ─► sites: which kinds fit which instruction
//!                                  └──► mutate: the bytes of one kind at one of them
//!                                         operands, flow, loops, calls: all ways; the seed chooses one
//! ```
//!
//! Nothing is run and nothing is written here. A change has exactly the bytes of the instruction
//! that it is put in place of, whole instructions filled up with NOPs: what is around it is decoded
//! as before.
//!
//! What one instruction cannot model is left out: a use after free or a double free by an added
//! call, a block that waits while it must not, a variable of the wrong size.

mod calls;
mod change;
mod flow;
mod kinds;
mod listing;
mod loops;
pub(crate) mod names;
mod operands;
mod registers;
mod sites;
mod text;

use serde::{Deserialize, Serialize};

pub use kinds::Kind;
use listing::{Insn, Listing};

/// A function as it is in the guest's memory.
#[derive(Clone, Copy)]
pub struct Function<'a> {
    /// Its name.
    pub name: &'a str,
    /// Address of its first byte.
    pub start: u64,
    /// Its bytes. Of a function longer than 64 KiB what is behind is not looked at.
    pub code: &'a [u8],
    /// The name of the function that begins at an address.
    pub callee: &'a dyn Fn(u64) -> Option<String>,
}

/// An instruction that may be changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// Bytes from the function's start.
    pub offset: u32,
    /// The kinds that fit, in the order of the table.
    pub kinds: Vec<Kind>,
    /// The instruction in words.
    pub text: String,
}

/// A change of one instruction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mutation {
    /// Bytes from the function's start.
    pub offset: u32,
    /// The instruction's bytes.
    pub old: Vec<u8>,
    /// What is put there: as many bytes.
    pub new: Vec<u8>,
    /// The instruction in words.
    pub old_text: String,
    /// What is put there in words, without the NOPs that fill it up.
    pub new_text: String,
    /// What is different.
    pub says: String,
    /// Nothing of the new bytes is derived from the old instruction's operands. They may be put in
    /// even where the old bytes differ, as in a copy of the driver whose calls lead elsewhere.
    pub replaces_whole: bool,
}

/// Why an instruction is not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoMutation {
    /// No instruction begins there.
    #[error("no instruction begins at offset {offset:#x}{}", nearest_text(.near))]
    NoInstruction {
        /// The offset that was asked for.
        offset: u32,
        /// Where the instructions in front of it and behind it begin.
        near: Vec<u32>,
    },
    /// The kind does not fit.
    #[error("{} does not fit \"{text}\" at offset {offset:#x}{}", .kind.name(), fits_text(.fits))]
    DoesNotFit {
        /// The offset that was asked for.
        offset: u32,
        /// The kind that was asked for.
        kind: Kind,
        /// The instruction there.
        text: String,
        /// The kinds that fit; none if nothing may be changed about the instruction.
        fits: Vec<Kind>,
    },
}

fn nearest_text(near: &[u32]) -> String {
    let all: Vec<String> = near.iter().map(|offset| format!("{offset:#x}")).collect();
    if all.is_empty() {
        return String::new();
    }
    format!(": the nearest begin at {}", all.join(" and "))
}

fn fits_text(kinds: &[Kind]) -> String {
    let all: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
    if all.is_empty() {
        return ": nothing of it is changed".to_owned();
    }
    format!(": what fits is {}", all.join(", "))
}

/// The instructions of a function that may be changed, by offset. Those of the tracer and what is
/// in front of it, NOPs, and what traps or is no instruction are not among them.
pub fn sites(function: &Function<'_>) -> Vec<Site> {
    let listing = Listing::of(function);
    (0..listing.insns.len())
        .filter_map(|index| {
            let insn = listing.site(index)?;
            Some(Site {
                offset: offset(insn),
                kinds: sites::kinds(&listing, index),
                text: text::of(&listing, &insn.i),
            })
        })
        .collect()
}

/// Changes the instruction at `offset`. Of several ways `seed` chooses one: seeds in a row walk
/// through all of them.
pub fn mutate(
    function: &Function<'_>,
    kind: Kind,
    offset: u32,
    seed: u64,
) -> Result<Mutation, NoMutation> {
    let listing = Listing::of(function);
    let found = listing
        .insns
        .binary_search_by_key(&offset, self::offset)
        .ok()
        .and_then(|index| Some((index, listing.insns.get(index)?)));
    let Some((index, insn)) = found else {
        return Err(NoMutation::NoInstruction {
            offset,
            near: nearest(&listing, offset),
        });
    };
    let mut changes = sites::changes(&listing, index, kind);
    let old_text = text::of(&listing, &insn.i);
    let chosen = seed.checked_rem(changes.len() as u64);
    let Some(chosen) = chosen.and_then(|chosen| usize::try_from(chosen).ok()) else {
        return Err(NoMutation::DoesNotFit {
            offset,
            kind,
            text: old_text,
            fits: sites::kinds(&listing, index),
        });
    };
    let change = changes.swap_remove(chosen);
    Ok(Mutation {
        offset,
        old: listing.bytes(insn).to_vec(),
        new_text: text::of_bytes(&listing, &change.bytes, insn.i.ip()),
        new: change.bytes,
        old_text,
        says: change.says,
        replaces_whole: change.whole,
    })
}

/// An offset fits: no more than 64 KiB are looked at.
fn offset(insn: &Insn) -> u32 {
    u32::try_from(insn.offset).unwrap_or(u32::MAX)
}

fn nearest(listing: &Listing<'_>, offset: u32) -> Vec<u32> {
    let all = || listing.insns.iter().map(self::offset);
    let before = all().take_while(|one| *one < offset).last();
    let behind = all().find(|one| *one > offset);
    before.into_iter().chain(behind).collect()
}

#[cfg(test)]
mod tests;
