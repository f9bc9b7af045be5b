//! Whether what a description says of an image's answers goes with the rest of it.

use std::ops::Range;

use super::answers::Answers;
use super::{Checked, Description, PHY_REGISTERS, wrong};

/// Most words of non-volatile memory.
const MAX_NVM_WORDS: u32 = 1 << 14;
/// Most entries of one kind.
const MAX_ENTRIES: usize = 64;
/// Bits of a register.
const BITS: u32 = 32;

/// Whether this goes with the rest of the description.
pub(super) fn check(answers: &Answers, description: &Description) -> Checked {
    let many = [
        answers.reset.len(),
        answers.remainder.len(),
        answers.register.len(),
    ];
    let more = answers.interrupts.message.len();
    if many
        .into_iter()
        .chain([more])
        .any(|length| length > MAX_ENTRIES)
    {
        return wrong("parked", "too many entries");
    }
    let saved = |offset: u32| description.saves(offset);
    let interrupts = &answers.interrupts;
    let state = [Some(interrupts.mask), interrupts.auto_clear];
    let mut state = state.into_iter().chain([interrupts.vectors]).flatten();
    if !state.all(saved) {
        return wrong("parked.interrupts", "a register is not saved");
    }
    for message in &interrupts.message {
        let field = message.vector | message.valid;
        let fits = message.shift < BITS && field.leading_zeros() >= message.shift;
        if !fits || interrupts.vectors.is_none() {
            return wrong("parked.interrupts", "no such field of vectors");
        }
    }
    for reset in &answers.reset {
        if !saved(reset.offset) {
            return wrong(&reset.register, "it is not saved");
        }
    }
    for remainder in &answers.remainder {
        if !saved(remainder.offset) {
            return wrong(&remainder.register, "it is not saved");
        }
    }
    check_others(answers, description)?;
    check_behind(answers, description)
}

/// Those that are not part of the state have one meaning each.
fn check_others(answers: &Answers, description: &Description) -> Checked {
    let interrupts = &answers.interrupts;
    let mut single = vec![interrupts.causes, interrupts.raise, interrupts.block];
    single.extend(answers.nvm.iter().map(|nvm| nvm.offset));
    single.extend(description.mdio.iter().map(|mdio| mdio.register));
    let single = single
        .into_iter()
        .map(|offset| ("parked, a register", offset, 1));
    let others = answers.register.iter();
    let others = others.map(|one| (one.name.as_str(), one.offset, one.count));
    let mut taken: Vec<Range<u32>> = Vec::new();
    for (name, offset, count) in single.chain(others) {
        if count == 0 || !description.has(offset, count) {
            return wrong(name, "no aligned registers of this device");
        }
        let range = offset..offset + 4 * count;
        let mut each = range.clone().step_by(4);
        if each.any(|offset| description.saves(offset)) {
            return wrong(name, "it is part of the state");
        }
        if taken
            .iter()
            .any(|other| range.start < other.end && other.start < range.end)
        {
            return wrong(name, "it has another meaning too");
        }
        taken.push(range);
    }
    if !answers
        .register
        .iter()
        .any(|one| one.has(answers.link.offset))
    {
        return wrong("parked.link", "it is none of the registers there");
    }
    Ok(())
}

/// What is reached through registers.
fn check_behind(answers: &Answers, description: &Description) -> Checked {
    if let Some(phy) = &answers.phy {
        let links = phy.link.iter().map(|link| link.number);
        let mut numbers = links.chain(phy.read_only.iter().copied()).chain([phy.page]);
        if description.mdio.is_none() || numbers.any(|number| number >= PHY_REGISTERS) {
            return wrong("parked.phy", "there is none, or it has no such register");
        }
    }
    if let Some(nvm) = &answers.nvm {
        let fits = nvm.words <= MAX_NVM_WORDS
            && nvm.summed <= nvm.words
            && nvm.address.saturating_add(3) < nvm.summed;
        let number = nvm.words.saturating_sub(1);
        let shifts = nvm.word_shift <= BITS / 2
            && nvm.number_shift < BITS
            && number.leading_zeros() >= nvm.number_shift;
        if !fits || !shifts || nvm.done == 0 || nvm.start == 0 {
            return wrong("parked.nvm", "words or bits lie outside");
        }
    }
    Ok(())
}
