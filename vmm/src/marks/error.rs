//! Why there is no mark.

use crate::error::Error;
use crate::refused::QuiesceError;

/// Most marks of a machine.
pub const MAX_MARKS: usize = 64;

/// Why there is no mark.
#[derive(Debug, thiserror::Error)]
pub enum MarkError {
    /// The machine did not come to rest.
    #[error(transparent)]
    Rest(#[from] QuiesceError),
    /// Not a name.
    #[error(
        "{0:?} is no name of a mark: use 1 to 64 letters, digits, '-', '_' and '.', the first a letter or digit"
    )]
    Name(String),
    /// There is one.
    #[error("there is a mark {0} already: forget it first, or use another name")]
    Exists(String),
    /// There is none.
    #[error("there is no mark {0}")]
    NoSuchMark(String),
    /// The guest was at another one since.
    #[error("the guest has not gone on from mark {0}: rewind it there first")]
    NotFrom(String),
    /// There is none at all.
    #[error("the guest has no mark: set one first")]
    NoMark,
    /// Too many.
    #[error("there are {MAX_MARKS} marks already: forget one first")]
    TooMany,
    /// They would keep too much.
    #[error("marks would keep more than {} MiB of memory: forget some, or allow more", .limit >> 20)]
    TooMuch {
        /// Most bytes that they may keep.
        limit: u64,
    },
    /// The host has no memory.
    #[error("the host has no memory for the mark: forget others, or stop other programs")]
    NoMemory,
    /// What the guest has not touched yet cannot be read.
    #[error("a page of the file that the guest's memory begins as cannot be read: {0}")]
    Untouched(#[source] std::io::Error),
    /// A page that is none.
    #[error("page {0:#x} is outside guest memory")]
    NoPage(u32),
    /// A state cannot be taken, or changes not be followed.
    #[error(transparent)]
    State(#[from] Error),
    /// Devices came or went.
    #[error(
        "at the mark there were PCI functions in slots {had:?}, now there are in {has:?}: take out what came, or put back what went"
    )]
    Devices {
        /// Slots now.
        has: Vec<u8>,
        /// Slots at the mark.
        had: Vec<u8>,
    },
    /// Devices were exchanged.
    #[error(
        "since the mark the PCI functions in slots {slots:?} were taken out and others put there: forget the mark and set another"
    )]
    Exchanged {
        /// Slots with another function.
        slots: Vec<u8>,
    },
    /// Who writes guest memory beside this process does not stand still.
    #[error("{0}")]
    Others(String),
    /// A participant refuses.
    #[error("{who} cannot be marked now: {reason}")]
    Participant {
        /// Who.
        who: String,
        /// Why.
        reason: String,
    },
}
