//! Calls of kernel functions that wait until the driver's function has ended: what they are given
//! is not the driver's any more, so the guest may have them when the call is in it.
//!
//! ```text
//!   trampoline ─► note down: which trampoline, rdi, rsi, rdx ─► mov eax, answer ─► ret ─► driver
//! ```
//!
//! There is no exit and no change of roots. The notes are in pages that the driver could write, so
//! they are worth no more than if it had made these calls itself.

use std::collections::HashMap;

use iced_x86::code_asm::{CodeAssembler, eax, ecx, qword_ptr, rax, rcx, rdi, rdx, rsi};

use super::{
    DIRECT_CALLS, HANDED_OVER, HANDED_OVER_PAGES, Monitor, MonitorError, PAGE_SIZE, SCRATCH,
};
use crate::domain::effects::KernelCall;

/// Offset of the number of calls that were noted down, or would have been had there been room.
const COUNT: u64 = 0;
/// Offset of the first note.
const FIRST: u64 = 32;
/// Length of a note, a power of 2: the number of the trampoline and three arguments.
const NOTE_BYTES: u64 = 1 << NOTE_SHIFT;
const NOTE_SHIFT: u32 = 5;

/// Most calls of one call of the driver that wait.
pub const MAX_HANDED_OVER: u64 = (HANDED_OVER_PAGES * PAGE_SIZE - FIRST) / NOTE_BYTES;

/// Functions that wait, and whether they do now.
#[derive(Debug, Default)]
pub(super) struct Handing {
    /// Functions that can, with what their callers are told meanwhile.
    answers: HashMap<u64, u32>,
    pub(super) on: bool,
}

impl Monitor {
    /// Has these functions, to be told before the trampolines for them are made, wait while
    /// [`Monitor::hand_over`] says so; their callers are told what is given with each.
    pub fn let_wait(&mut self, answers: HashMap<u64, u32>) {
        self.handing.answers = answers;
    }

    /// Whether functions that can wait do so from now on. P does not run meanwhile.
    pub fn hand_over(&mut self, on: bool) {
        self.put(HANDED_OVER, COUNT, 0);
        if self.handing.on != on {
            self.handing.on = on;
            self.put_heads_that_note();
        }
    }

    /// Whether there are any that can wait.
    pub fn can_hand_over(&self) -> bool {
        !self.handing.answers.is_empty()
    }

    /// How many calls wait.
    pub fn handed_over_count(&self) -> u64 {
        self.get(HANDED_OVER, COUNT)
    }

    /// The calls that wait, in their order, with their first three arguments. `None` if there were
    /// more than there is room for, or if what is noted down are none.
    pub fn handed_over(&self) -> Option<Vec<KernelCall>> {
        let count = self.handed_over_count();
        let notes = (count <= MAX_HANDED_OVER).then_some(0..count)?;
        notes.map(|index| self.note(index)).collect()
    }

    fn note(&self, index: u64) -> Option<KernelCall> {
        let word = |word: u64| {
            let offset = FIRST + index * NOTE_BYTES + word * 8;
            self.get(HANDED_OVER + offset / PAGE_SIZE, offset % PAGE_SIZE)
        };
        let function = self.target_of(word(0))?;
        self.handing.answers.contains_key(&function).then_some(())?;
        Some(KernelCall {
            function,
            arguments: [word(1), word(2), word(3), 0, 0, 0],
        })
    }

    /// What notes a call of `target` through trampoline `index` down; `None` if it does not wait.
    pub(super) fn assemble_notes(
        &self,
        va: u64,
        target: u64,
        index: u64,
    ) -> Result<Option<Vec<u8>>, MonitorError> {
        let Some(answer) = self.handing.answers.get(&target) else {
            return Ok(None);
        };
        let count = qword_ptr(self.data(HANDED_OVER, COUNT));
        let mut a = CodeAssembler::new(64)?;
        let mut no_room = a.create_label();
        a.inc(qword_ptr(self.data(SCRATCH, DIRECT_CALLS)))?;
        a.mov(rcx, count)?;
        a.inc(count)?;
        a.cmp(rcx, MAX_HANDED_OVER as i32)?;
        a.jae(no_room)?;
        a.shl(ecx, NOTE_SHIFT)?;
        // The area is within the last 2 GiB, which displacements reach.
        a.lea(rax, qword_ptr(self.data(HANDED_OVER, FIRST)))?;
        a.add(rax, rcx)?;
        a.mov(qword_ptr(rax), index as i32)?;
        a.mov(qword_ptr(rax + 8), rdi)?;
        a.mov(qword_ptr(rax + 16), rsi)?;
        a.mov(qword_ptr(rax + 24), rdx)?;
        a.set_label(&mut no_room)?;
        a.mov(eax, *answer)?;
        a.ret()?;
        Ok(Some(a.assemble(va)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    const VA: u64 = 0xffff_ffff_fee0_0000;
    const WAITS: u64 = 0xffff_ffff_8123_4560;
    const OTHER: u64 = 0xffff_ffff_8123_5000;

    fn monitor() -> Monitor {
        let mut monitor = Monitor::new(1 << 38, VA, 0x1000, 0x2000).unwrap();
        monitor.let_wait([(WAITS, 3)].into());
        monitor
    }

    fn first(monitor: &Monitor, va: u64) -> iced_x86::Instruction {
        let (page, at) = ((va - VA) / PAGE_SIZE, ((va - VA) % PAGE_SIZE) as usize);
        let code = &monitor.page(page)[at..at + 16];
        Decoder::with_ip(64, code, va, DecoderOptions::NONE).decode()
    }

    fn note(monitor: &mut Monitor, index: u64, words: [u64; 4]) {
        for (word, value) in (0..).zip(words) {
            let offset = FIRST + index * NOTE_BYTES + word * 8;
            monitor.put(HANDED_OVER + offset / PAGE_SIZE, offset % PAGE_SIZE, value);
        }
    }

    #[test]
    fn functions_wait_only_while_they_are_told_to_and_others_never_do() {
        let mut monitor = monitor();
        let [other, waits] = [OTHER, WAITS].map(|target| monitor.trampoline(target).unwrap());
        let usual = [other, waits].map(|va| first(&monitor, va));
        monitor.hand_over(true);
        assert_eq!(first(&monitor, other), usual[0]);
        let jump = first(&monitor, waits);
        assert_eq!(jump.mnemonic(), Mnemonic::Jmp);
        assert_eq!(
            first(&monitor, jump.near_branch_target()).mnemonic(),
            Mnemonic::Inc
        );
        // A journal sees them all the same.
        monitor.journal(|target| target == WAITS);
        assert_eq!(first(&monitor, waits).mnemonic(), Mnemonic::Out);
        monitor.journal(|_| false);
        assert_eq!(first(&monitor, waits), jump);
        monitor.hand_over(false);
        assert_eq!([other, waits].map(|va| first(&monitor, va)), usual);
    }

    #[test]
    fn calls_are_read_in_order_and_what_is_none_is_not_believed() {
        let mut monitor = monitor();
        for target in [OTHER, WAITS] {
            monitor.trampoline(target).unwrap();
        }
        monitor.hand_over(true);
        assert_eq!(monitor.handed_over(), Some(Vec::new()));
        for index in 0..MAX_HANDED_OVER {
            note(&mut monitor, index, [1, index, 7, 8]);
        }
        monitor.put(HANDED_OVER, COUNT, MAX_HANDED_OVER);
        let calls = monitor.handed_over().unwrap();
        assert_eq!(calls.len() as u64, MAX_HANDED_OVER);
        for (index, call) in (0..).zip(calls) {
            assert_eq!(
                (call.function, call.arguments),
                (WAITS, [index, 7, 8, 0, 0, 0])
            );
        }
        monitor.put(HANDED_OVER, COUNT, MAX_HANDED_OVER + 1);
        assert_eq!(monitor.handed_over(), None);
        monitor.put(HANDED_OVER, COUNT, 1);
        // One that does not wait, and none.
        for trampoline in [0, 2, u64::MAX] {
            note(&mut monitor, 0, [trampoline, 0, 0, 0]);
            assert_eq!(monitor.handed_over(), None, "{trampoline}");
        }
        // Each call begins with none.
        monitor.hand_over(true);
        assert_eq!(monitor.handed_over(), Some(Vec::new()));
    }
}
