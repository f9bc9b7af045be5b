//! Functions of the kernel by what a fault makes of a call of them: the reader of
//! `models/mutation.toml`.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use iced_x86::Register;
use serde::Deserialize;

use crate::analysis::reached::ARGUMENTS;
use crate::models::built_in;

/// All that are known.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, bound(deserialize = "'de: 'static"))]
pub(crate) struct Names {
    /// Copies and fills, and the argument, from 0, that is their length.
    copies: BTreeMap<&'static str, usize>,
    /// Allocators that return a pointer, and NULL if there is no memory.
    allocators: Vec<&'static str>,
    /// Functions that give back memory, or a reference to it.
    frees: Vec<&'static str>,
    /// Functions that take a reference to their argument, and return it.
    getters: Vec<&'static str>,
}

/// Those of Linux.
pub(crate) static LINUX: LazyLock<Names> =
    LazyLock::new(|| built_in(include_str!("../../models/mutation.toml")));

/// What a call does to a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lock {
    /// Takes it and returns nothing.
    Take,
    /// Takes it, disables interrupts, and returns the flags of before.
    TakeSaving,
    /// Takes it, and returns 0, or an error if a signal came.
    TakeOrError,
    /// Takes it if it is free, and returns whether it did.
    Try,
    /// Gives it back.
    Give,
}

/// The register of a copy's length.
pub(super) fn length_register(name: &str) -> Option<Register> {
    let name = plain(name);
    let argument = *LINUX.copies.get(name)?;
    ARGUMENTS.get(argument).copied()
}

pub(super) fn is_allocator(name: &str) -> bool {
    LINUX.allocators.contains(&plain(name))
}

pub(super) fn is_free(name: &str) -> bool {
    LINUX.frees.contains(&plain(name))
}

pub(super) fn is_getter(name: &str) -> bool {
    LINUX.getters.contains(&name)
}

/// What a call of the function does to a lock, by the words of its name.
pub(super) fn lock(name: &str) -> Option<Lock> {
    let has = |word: &str| name.split('_').any(|part| part == word);
    match name {
        "down" | "down_read" | "down_write" => return Some(Lock::Take),
        "down_interruptible"
        | "down_killable"
        | "down_read_interruptible"
        | "down_read_killable"
        | "down_write_killable" => return Some(Lock::TakeOrError),
        "up" | "up_read" | "up_write" | "release_sock" => return Some(Lock::Give),
        // Of semaphores it returns 0 if it did.
        "down_trylock" => return Some(Lock::TakeOrError),
        _ => {}
    }
    if ["init", "class", "lockdep", "slowpath", "destroy"]
        .into_iter()
        .any(has)
    {
        return None;
    }
    if has("trylock") {
        return Some(Lock::Try);
    }
    if has("unlock") {
        return Some(Lock::Give);
    }
    if !has("lock") {
        return None;
    }
    Some(if has("interruptible") || has("killable") {
        Lock::TakeOrError
    } else if has("irqsave") {
        Lock::TakeSaving
    } else {
        Lock::Take
    })
}

/// Whether the function enables interrupts that another one disabled.
pub(super) fn enables_interrupts(name: &str) -> bool {
    let has = |word: &str| name.split('_').any(|part| part == word);
    has("irqrestore") || has("unlock") && has("irq")
}

/// The name without what newer kernels add to allocators that are profiled.
fn plain(name: &str) -> &str {
    name.strip_suffix("_noprof").unwrap_or(name)
}
