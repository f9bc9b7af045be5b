//! Which kinds fit an instruction, and all ways to change it by one of them.

use super::change::Change;
use super::kinds::Kind;
use super::listing::{Insn, Listing};
use super::{calls, flow, operands, text};

/// All ways to change the instruction at `index` by the kind; none if it does not fit.
pub(super) fn changes(listing: &Listing<'_>, index: usize, kind: Kind) -> Vec<Change> {
    let mut changes: Vec<Change> = Vec::new();
    for change in fitting(listing, index, kind) {
        // Two ways may come to the same.
        if changes.iter().all(|other| other.bytes != change.bytes) {
            changes.push(change);
        }
    }
    changes
}

/// The kinds that fit the instruction at `index`.
pub(super) fn kinds(listing: &Listing<'_>, index: usize) -> Vec<Kind> {
    let fits = |kind: &Kind| fitting(listing, index, *kind).next().is_some();
    Kind::ALL.iter().copied().filter(fits).collect()
}

/// Ways to change the instruction at `index` by the kind that keep to its length and change
/// something.
fn fitting(listing: &Listing<'_>, index: usize, kind: Kind) -> impl Iterator<Item = Change> {
    let insn = listing.site(index);
    let all = insn.map(|insn| all(listing, index, insn, kind));
    all.into_iter()
        .flatten()
        .filter_map(move |change| change.fitted(listing, insn?))
}

/// Ways to change the instruction by the kind, among them some that do not fit.
fn all(listing: &Listing<'_>, index: usize, insn: &Insn, kind: Kind) -> Vec<Change> {
    match kind {
        Kind::LengthOverrun => operands::length_overrun(listing, index, insn),
        Kind::LoopBound => flow::loop_bound(listing, index, insn),
        Kind::OffByOne => flow::off_by_one(listing, insn),
        Kind::MissingAssignment => operands::missing_assignment(listing, insn),
        Kind::MissingCall => calls::missing_call(insn),
        Kind::CorruptedParameter => operands::corrupted_parameter(listing, index, insn),
        Kind::FlippedCondition => flow::flipped_condition(insn),
        Kind::TextBitFlip => bit_flips(listing.bytes(insn)),
        Kind::WrongSource => operands::wrong_source(insn),
        Kind::WrongDestination => operands::wrong_destination(insn),
        Kind::Pointer => operands::pointer(listing, insn),
        Kind::Initialisation => operands::initialisation(listing, index, insn),
        Kind::Branch => flow::branch(insn),
        Kind::Nop => vec![Change::whole(
            &[],
            format!("{} is left out", text::of(listing, &insn.i)),
        )],
        Kind::StackFlip => operands::stack_flip(listing, insn),
        Kind::InterruptsLeftOff => calls::interrupts_left_off(insn),
        Kind::UnbalancedLock => calls::unbalanced_lock(insn),
        Kind::MemoryLeak => calls::memory_leak(insn),
        Kind::MissingReference => calls::missing_reference(insn),
        Kind::FailedAllocation => calls::failed_allocation(insn),
        Kind::ErrorReturn => calls::error_return(listing, index, insn),
        Kind::WildJump => flow::wild_jump(insn),
        Kind::SmashedReturn => flow::smashed_return(listing, index, insn),
        Kind::DeepRecursion => flow::deep_recursion(listing, insn),
        // xor %eax,%eax; mov (%rax),%eax
        Kind::NullDereference => stops(&[0x31, 0xc0, 0x8b, 0x00], "a load through a NULL pointer"),
        // ud2
        Kind::UndefinedInstruction => stops(&[0x0f, 0x0b], "an undefined instruction"),
        // xor %ecx,%ecx; div %ecx
        Kind::DivisionByZero => stops(&[0x31, 0xc9, 0xf7, 0xf1], "a division by zero"),
        // jmp .
        Kind::EndlessLoop => stops(&[0xeb, 0xfe], "an endless loop"),
        Kind::Halt => stops(&[0xf4], "the processor is halted"),
    }
}

/// Code that the call does not go on behind.
fn stops(code: &[u8], says: &str) -> Vec<Change> {
    vec![Change::whole(code, says)]
}

/// The instruction with each of its bits flipped.
fn bit_flips(old: &[u8]) -> Vec<Change> {
    let flips = (0..old.len()).flat_map(|at| (0..8_u8).map(move |bit| (at, bit)));
    flips
        .filter_map(|(at, bit)| {
            let mut bytes = old.to_vec();
            *bytes.get_mut(at)? ^= 1 << bit;
            Some(Change {
                bytes,
                says: format!("bit {bit} of byte {at} is flipped"),
                whole: false,
            })
        })
        .collect()
}
