//! Changes of calls: left out, or with a result of their own.

use std::collections::HashSet;

use iced_x86::{ConditionCode, Mnemonic, OpKind, Register};

use super::change::Change;
use super::listing::{Insn, Listing, Role, writes};
use super::names::{self, Lock};
use super::operands::constant;

const RET: u8 = 0xc3;
const CLI: u8 = 0xfa;
/// `xor %eax,%eax`
const ZERO: &[u8] = &[0x31, 0xc0];
/// `mov $1,%eax`
const ONE: &[u8] = &[0xb8, 0x01, 0x00, 0x00, 0x00];
/// `mov %rdi,%rax`
const ARGUMENT: &[u8] = &[0x48, 0x89, 0xf8];
/// `pushf; pop %rax`. The kernel has no red zone below the stack pointer (`-mno-red-zone`).
const FLAGS: &[u8] = &[0x9c, 0x58];
/// `push $-12; pop %rax`: a negative number of 64 bits in three bytes.
const ENOMEM: &[u8] = &[0x6a, 0xf4, 0x58];
/// `push $-5; pop %rax`
const EIO: &[u8] = &[0x6a, 0xfb, 0x58];

/// Instructions behind a call in which its result is looked at, at most.
const LOOKED_AT: usize = 4;

/// The name of the function that is called.
fn named(insn: &Insn) -> Option<&str> {
    match &insn.role {
        Role::Call(name) | Role::TailCall(name) => name.as_deref(),
        _ => None,
    }
}

/// What is called, if anything is.
fn called(insn: &Insn) -> Option<&str> {
    let calls = matches!(insn.role, Role::Call(_) | Role::TailCall(_));
    calls.then(|| named(insn).unwrap_or("the function that a pointer leads to"))
}

/// In place of the call, code that sets its result. Who goes there for good returns at once.
fn instead(insn: &Insn, code: &[u8], says: String) -> Vec<Change> {
    let mut bytes = code.to_vec();
    if matches!(insn.role, Role::TailCall(_)) {
        bytes.push(RET);
    }
    vec![Change::whole(&bytes, says)]
}

pub(super) fn missing_call(insn: &Insn) -> Vec<Change> {
    called(insn).map_or_else(Vec::new, |name| {
        instead(insn, &[], format!("{name} is not called"))
    })
}

pub(super) fn memory_leak(insn: &Insn) -> Vec<Change> {
    match named(insn) {
        Some(name) if names::is_free(name) => instead(
            insn,
            &[],
            format!("{name} is not called: what it gives back is lost"),
        ),
        _ => Vec::new(),
    }
}

pub(super) fn missing_reference(insn: &Insn) -> Vec<Change> {
    match named(insn) {
        Some(name) if names::is_getter(name) => instead(
            insn,
            ARGUMENT,
            format!("{name} returns the object and does not count the reference"),
        ),
        _ => Vec::new(),
    }
}

pub(super) fn unbalanced_lock(insn: &Insn) -> Vec<Change> {
    let Some(name) = named(insn) else {
        return Vec::new();
    };
    let (code, says): (&[u8], &str) = match names::lock(name) {
        None => return Vec::new(),
        Some(Lock::Take) => (&[], "the lock is not taken"),
        Some(Lock::TakeSaving) => (
            FLAGS,
            "the lock is not taken, and interrupts stay as they are",
        ),
        Some(Lock::TakeOrError) => (ZERO, "the lock is not taken, and seems to be"),
        Some(Lock::Try) => (ONE, "the lock is not taken, and seems to be"),
        Some(Lock::Give) => (&[], "the lock is not given back"),
    };
    instead(insn, code, format!("{name} is not called: {says}"))
}

pub(super) fn interrupts_left_off(insn: &Insn) -> Vec<Change> {
    if insn.i.mnemonic() == Mnemonic::Sti {
        return vec![
            Change::whole(&[], "sti is left out"),
            Change::whole(&[CLI], "cli in place of sti"),
        ];
    }
    match named(insn) {
        Some(name) if names::enables_interrupts(name) => instead(
            insn,
            &[CLI],
            format!("cli in place of {name}: interrupts stay off, and so does a lock"),
        ),
        _ => Vec::new(),
    }
}

pub(super) fn failed_allocation(insn: &Insn) -> Vec<Change> {
    match named(insn) {
        Some(name) if names::is_allocator(name) => instead(
            insn,
            ZERO,
            format!("{name} is not called, and seems to return NULL"),
        ),
        _ => Vec::new(),
    }
}

/// How a result is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Looked {
    /// As a number, of which the negative ones or all but 0 are errors, or as a pointer that may be
    /// an error.
    Number,
    /// As a pointer that may be NULL.
    Pointer,
}

pub(super) fn error_return(listing: &Listing<'_>, index: usize, insn: &Insn) -> Vec<Change> {
    let (Role::Call(_), Some(name)) = (&insn.role, called(insn)) else {
        return Vec::new();
    };
    match looked_at(listing, index) {
        None => Vec::new(),
        Some(Looked::Pointer) => instead(
            insn,
            ZERO,
            format!("{name} is not called, and seems to return NULL"),
        ),
        Some(Looked::Number) => [(ENOMEM, "-12 (ENOMEM)"), (EIO, "-5 (EIO)")]
            .into_iter()
            .flat_map(|(code, value)| {
                let says = format!("{name} is not called, and seems to return {value}");
                instead(insn, code, says)
            })
            .collect(),
    }
}

/// How the result of the call at `index` is looked at right behind it, in `rax` or in a register
/// that it is copied to.
fn looked_at(listing: &Listing<'_>, index: usize) -> Option<Looked> {
    let mut holds = HashSet::from([Register::RAX]);
    let mut behind = listing.behind(index).take(LOOKED_AT);
    for insn in behind.by_ref() {
        let i = &insn.i;
        if insn.joined || !matches!(insn.role, Role::Plain | Role::Nop) {
            return None;
        }
        let (into, from) = (i.op0_register(), i.op1_register());
        let of_result = i.op0_kind() == OpKind::Register && holds.contains(&into.full_register());
        match i.mnemonic() {
            Mnemonic::Test if of_result && into == from => {
                let long = into.size() == 8;
                let next = behind.find(|insn| insn.role != Role::Nop)?;
                let zero = matches!(
                    next.i.condition_code(),
                    ConditionCode::e | ConditionCode::ne
                );
                return Some(if long && zero {
                    Looked::Pointer
                } else if into.size() >= 4 {
                    Looked::Number
                } else {
                    return None;
                });
            }
            Mnemonic::Cmp if of_result && into.size() >= 4 && constant(i).is_some() => {
                return Some(Looked::Number);
            }
            Mnemonic::Mov
                if i.op1_kind() == OpKind::Register && holds.contains(&from.full_register()) =>
            {
                holds.insert(into.full_register());
            }
            _ => holds.retain(|register| !writes(i, *register)),
        }
    }
    None
}
