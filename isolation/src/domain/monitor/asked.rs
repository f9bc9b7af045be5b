//! How much memory the driver asked for: what it calls its allocators with, noted by their
//! trampolines, without an exit.
//!
//! ```text
//!   kmalloc_trace(cache, flags, 40)    object, 40, flags
//!   kfree(object)                      object, forgotten
//! ```
//!
//! An allocator hands out more than it was asked for: its caches have a few sizes, and areas are
//! whole pages. What is behind the bytes that were asked for is nobody's. The notes are those of one
//! call, on a page that the driver cannot write.

use std::collections::HashMap;

use iced_x86::code_asm::registers::gpr64::{r11, rax, rcx, rdi, rdx, rsi};
use iced_x86::code_asm::{AsmRegister64, CodeAssembler, qword_ptr};

use super::{ASKED, Monitor, MonitorError, PAGE_SIZE};

/// Where the next note goes.
const NEXT: u64 = 0;
/// Offset of the first.
const FIRST: u64 = 32;
const NOTE_BYTES: u64 = 32;
/// Most notes of a call; one that has as many may have more, and none counts.
pub const MAX_ASKED: usize = ((PAGE_SIZE - FIRST) / NOTE_BYTES) as usize;
/// In place of a size: how much was asked for is not known any more. In place of flags: there are
/// none, and what is handed out is zeroed.
const NONE: u64 = u64::MAX;

/// Registers of a function's first arguments (System V ABI, section 3.2.3).
const ARGUMENTS: [AsmRegister64; 4] = [rdi, rsi, rdx, rcx];

/// What a kernel function does to what is known of how much was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// It hands out what it returns.
    HandsOut {
        /// Number of the argument that says how many bytes, from 0.
        size: u8,
        /// Number of the one with the flags (`gfp_t`); without one what is handed out is zeroed.
        flags: Option<u8>,
    },
    /// It gives what its first argument points at back, or makes it longer, or tells how long it
    /// really is.
    Forgets,
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// Guest virtual address of the object.
    pub at: u64,
    /// Its bytes; `None` if that is not known any more.
    pub bytes: Option<u64>,
    /// With these flags (`gfp_t`); `None` if it has none and what it hands out is zeroed.
    pub flags: Option<u64>,
}

/// Functions that are measured.
#[derive(Debug, Default)]
pub(super) struct Measured(HashMap<u64, Measure>);

impl Monitor {
    /// Has the calls of these functions noted, which is to be told before the trampolines for them
    /// are made.
    pub fn measure(&mut self, functions: HashMap<u64, Measure>) {
        self.measured = Measured(functions);
    }

    /// Forgets what was noted.
    pub(super) fn forget_asked(&mut self) {
        let first = self.data(ASKED, FIRST);
        self.put(ASKED, NEXT, first);
    }

    /// How many notes there are.
    pub fn asked_count(&self) -> usize {
        let bytes = self.get(ASKED, NEXT).wrapping_sub(self.data(ASKED, FIRST));
        usize::try_from(bytes / NOTE_BYTES).map_or(MAX_ASKED, |count| count.min(MAX_ASKED))
    }

    /// The notes of this call from number `from` on, in their order.
    pub fn asked(&self, from: usize) -> impl Iterator<Item = Asked> {
        (from..self.asked_count()).map(|index| {
            let word = |word: u64| self.get(ASKED, FIRST + index as u64 * NOTE_BYTES + word * 8);
            let known = |value| (value != NONE).then_some(value);
            let bytes = known(word(1));
            Asked {
                at: word(0),
                bytes,
                flags: bytes.and_then(|_| known(word(2))),
            }
        })
    }

    /// Before the call in the trampoline of `target`, with the frame in R11: keeps there what is to
    /// be noted.
    pub(super) fn assemble_asking(
        &self,
        a: &mut CodeAssembler,
        target: u64,
    ) -> Result<(), MonitorError> {
        let argument = |number: u8| ARGUMENTS.get(usize::from(number)).copied();
        match self.measured.0.get(&target) {
            None => {}
            Some(Measure::HandsOut { size, flags }) => {
                if let Some(size) = argument(*size) {
                    a.mov(qword_ptr(r11 + 16), size)?;
                }
                match flags.and_then(argument) {
                    Some(flags) => a.mov(qword_ptr(r11 + 24), flags)?,
                    None => a.mov(qword_ptr(r11 + 24), -1)?,
                }
            }
            Some(Measure::Forgets) => a.mov(qword_ptr(r11 + 16), rdi)?,
        }
        Ok(())
    }

    /// Behind the call, with the frame in R11, which is not kept: makes the note. Flags are nobody's
    /// when a function has returned (System V ABI, section 3.2.1).
    pub(super) fn assemble_noting(
        &self,
        a: &mut CodeAssembler,
        target: u64,
    ) -> Result<(), MonitorError> {
        let Some(measure) = self.measured.0.get(&target) else {
            return Ok(());
        };
        let next = qword_ptr(self.data(ASKED, NEXT));
        let (mut full, mut done) = (a.create_label(), a.create_label());
        let forgets = *measure == Measure::Forgets;
        a.push(qword_ptr(r11 + 16))?;
        if !forgets {
            a.push(qword_ptr(r11 + 24))?;
        }
        a.mov(r11, next)?;
        // The area is within the last 2 GiB, which sign-extended immediates reach.
        a.cmp(r11, self.data(ASKED, PAGE_SIZE) as i32)?;
        a.jae(full)?;
        if forgets {
            a.pop(qword_ptr(r11))?;
            a.mov(qword_ptr(r11 + 8), -1)?;
        } else {
            a.mov(qword_ptr(r11), rax)?;
            a.pop(qword_ptr(r11 + 16))?;
            a.pop(qword_ptr(r11 + 8))?;
        }
        a.lea(r11, qword_ptr(r11 + NOTE_BYTES as i32))?;
        a.mov(next, r11)?;
        a.jmp(done)?;
        a.set_label(&mut full)?;
        a.pop(r11)?;
        if !forgets {
            a.pop(r11)?;
        }
        a.set_label(&mut done)?;
        a.nop()?;
        Ok(())
    }
}
