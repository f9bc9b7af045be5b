//! Trampolines: the ways by which the driver calls kernel functions without an exit, and with two
//! where calls are journalled.
//!
//! ```text
//!   driver ─► mov [scratch], r11 ─► kernel root ─► call ─► driver root ─► ret ─► driver
//!             out if journalled                                           out if journalled
//!             inc [counter], jmp to a function that needs no more than the driver's rights
//!             jmp to what notes the call down, of a function that can wait ([`super::handed_over`])
//! ```
//!
//! A function that needs no other rights than the driver's is reached on the root that is loaded,
//! unless its calls are journalled.

use std::collections::HashSet;

use iced_x86::code_asm::{CodeAssembler, cr3, qword_ptr, r11, rsp};
use iced_x86::{Decoder, DecoderOptions};

use super::{
    CROSSINGS, DIRECT_CALLS, FRAME_BYTES, Monitor, MonitorError, PORT_JOURNAL, RETURN_STACK,
    SCRATCH, TOP, TRAMPOLINE_PAGES, TRAMPOLINE_SLOT_BYTES, TRAMPOLINES, out,
};
use crate::domain::view::PAGE_SIZE;

/// `ret`.
const RET: u8 = 0xc3;
/// Opcode of `jmp rel32`.
const JMP: u8 = 0xe9;
/// Length of that.
const JMP_BYTES: usize = 5;
/// `inc qword [disp32]` without the displacement: REX.W, opcode, ModRM, SIB. Flags are nobody's at
/// a call (System V ABI, section 3.2.1).
const INC: [u8; 4] = [0x48, 0xff, 0x04, 0x25];
/// Length of these two, which are put in the place of what is usual.
const HEAD_BYTES: usize = 13;

/// A trampoline.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trampoline {
    target: u64,
    /// Length of its first instruction, which keeps `r11` in the scratch word.
    first: u64,
    /// Offset of its last instruction, the return to the driver.
    last: u64,
    /// Its calls are journalled.
    journalled: bool,
    /// Its arguments are looked at.
    looked_at: bool,
    /// What the function answers is told.
    answers: bool,
    /// The function runs with the driver's rights.
    direct: bool,
    /// What notes the call down behind it, as an offset, if the function can wait.
    notes: Option<u64>,
    /// How it begins where it changes roots.
    usual: [u8; HEAD_BYTES],
}

impl Trampoline {
    /// How it, which is at `va`, begins, with what counts calls with the driver's rights at
    /// `counter`, and `handing` if functions wait that can.
    fn head(self, va: u64, counter: u64, handing: bool) -> [u8; HEAD_BYTES] {
        let mut head = self.usual;
        if self.journalled || self.looked_at || self.answers {
            head[..2].copy_from_slice(&out(PORT_JOURNAL));
        } else if self.direct {
            // Within reach, or the call in it could not have been assembled.
            let displacement = self.target.wrapping_sub(va + HEAD_BYTES as u64) as u32;
            head[..4].copy_from_slice(&INC);
            head[4..8].copy_from_slice(&(counter as u32).to_le_bytes());
            head[8] = JMP;
            head[9..].copy_from_slice(&displacement.to_le_bytes());
        } else if let Some(notes) = self.notes.filter(|_| handing) {
            // In the same slot.
            let displacement = notes as u32 - JMP_BYTES as u32;
            head[0] = JMP;
            head[1..JMP_BYTES].copy_from_slice(&displacement.to_le_bytes());
        }
        head
    }

    /// How it ends.
    fn tail(self) -> [u8; 2] {
        match self.journalled || self.answers {
            true => out(PORT_JOURNAL),
            false => [RET, 0],
        }
    }
}

/// An end of a trampoline that exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JournalPoint {
    /// The driver is about to call the function; the trampoline goes on at `resume`.
    Enter {
        /// Guest virtual address.
        resume: u64,
        /// The function's calls are journalled, and not only looked at.
        journalled: bool,
    },
    /// The function has returned, and the driver root is loaded.
    Leave {
        /// Its calls are journalled, and not only its answers told.
        journalled: bool,
    },
}

impl Monitor {
    /// The trampoline that calls `target` in the kernel root, made at the first request.
    pub fn trampoline(&mut self, target: u64) -> Result<u64, MonitorError> {
        if let Some(va) = self.trampolines.get(&target) {
            return Ok(*va);
        }
        let per_page = PAGE_SIZE / TRAMPOLINE_SLOT_BYTES;
        let index = self.trampolines.len() as u64;
        if index >= TRAMPOLINE_PAGES * per_page {
            return Err(MonitorError::TooManyImports);
        }
        let va = self.va + TRAMPOLINES * PAGE_SIZE + index * TRAMPOLINE_SLOT_BYTES;
        let code = self.assemble_trampoline(va, target)?;
        // Both ends have room for an `out`.
        let behind = code.len() as u64 + 1;
        let notes = self.assemble_notes(va + behind, target, index)?;
        let notes_bytes = notes.as_ref().map_or(0, Vec::len) as u64;
        if behind + notes_bytes > TRAMPOLINE_SLOT_BYTES {
            return Err(MonitorError::Assemble(
                "trampoline longer than its slot".into(),
            ));
        }
        self.put_code(va, &code);
        if let Some(notes) = &notes {
            self.put_code(va + behind, notes);
        }
        self.trampolines.insert(target, va);
        let mut first = Decoder::with_ip(64, &code, va, DecoderOptions::NONE);
        let mut usual = [0; HEAD_BYTES];
        usual.copy_from_slice(&code[..HEAD_BYTES]);
        let slot = Trampoline {
            target,
            first: first.decode().len() as u64,
            last: code.len() as u64 - 1,
            journalled: false,
            looked_at: self.looked_at.contains(&target),
            answers: self.answering.contains(&target),
            direct: self.direct.contains(&target),
            notes: notes.map(|_| behind),
            usual,
        };
        self.slots.push(slot);
        self.put_ends(self.slots.len() - 1);
        Ok(va)
    }

    /// Has these functions run with the rights of the driver when it calls them, and no others. P
    /// does not run meanwhile.
    pub fn call_directly(&mut self, functions: HashSet<u64>) {
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            slot.direct = functions.contains(&slot.target);
            self.put_head(index);
        }
        self.direct = functions;
    }

    /// Has the calls of these functions exit when they begin, whether they are journalled or not,
    /// and no others for that. P does not run meanwhile.
    pub fn look_at(&mut self, functions: HashSet<u64>) {
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            slot.looked_at = functions.contains(&slot.target);
            self.put_head(index);
        }
        self.looked_at = functions;
    }

    /// Has the calls of these functions exit when they begin and when they return, whether they are
    /// journalled or not, and no others for that. P does not run meanwhile.
    pub fn tell_answers(&mut self, functions: HashSet<u64>) {
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            slot.answers = functions.contains(&slot.target);
            self.put_ends(index);
        }
        self.answering = functions;
    }

    /// Whether the function's answers are told.
    pub fn answers(&self, function: u64) -> bool {
        self.answering.contains(&function)
    }

    /// Has the calls of the functions that `wanted` picks exit when they begin and when they
    /// return, and no others. P does not run meanwhile.
    pub fn journal(&mut self, wanted: impl Fn(u64) -> bool) {
        for index in 0..self.slots.len() {
            let trampoline = self.slots[index];
            let journalled = wanted(trampoline.target);
            if trampoline.journalled == journalled {
                continue;
            }
            self.slots[index].journalled = journalled;
            self.put_ends(index);
        }
    }

    /// Has all calls that change roots exit when they begin and when they return. P does not run
    /// meanwhile.
    pub fn watch_crossings(&mut self) {
        let change = |slot: &&Trampoline| {
            let waits = self.handing.on && slot.notes.is_some();
            !slot.direct && !waits
        };
        let slots = self.slots.iter().filter(change);
        let crossings: HashSet<u64> = slots.map(|slot| slot.target).collect();
        self.journal(|function| crossings.contains(&function));
    }

    /// Which end of which function's trampoline that exits P stopped at with this RIP: KVM leaves
    /// it at an `out` or, in some builds, behind it.
    pub fn journal_point(&self, rip: u64) -> Option<(u64, JournalPoint)> {
        let offset = rip.checked_sub(self.va + TRAMPOLINES * PAGE_SIZE)?;
        let index = usize::try_from(offset / TRAMPOLINE_SLOT_BYTES).ok()?;
        let trampoline = self.slots.get(index)?;
        let within = offset % TRAMPOLINE_SLOT_BYTES;
        let is_at = |point: u64| within == point || within == point + 2;
        let journalled = trampoline.journalled;
        let answers = trampoline.answers;
        let point = if is_at(0) && (journalled || trampoline.looked_at || answers) {
            let resume = self.slot_va(index) + trampoline.first;
            JournalPoint::Enter { resume, journalled }
        } else if is_at(trampoline.last) && (journalled || answers) {
            JournalPoint::Leave { journalled }
        } else {
            return None;
        };
        Some((trampoline.target, point))
    }

    /// Does what the first instruction of a trampoline does, which the exit stands in the place of.
    pub fn keep_r11(&mut self, value: u64) {
        self.put(SCRATCH, 0, value);
    }

    /// Makes the trampoline of this slot begin as it is to.
    fn put_head(&mut self, index: usize) {
        let va = self.slot_va(index);
        let counter = self.data(SCRATCH, DIRECT_CALLS);
        let head = self.slots[index].head(va, counter, self.handing.on);
        self.put_code(va, &head);
    }

    /// Makes the trampoline of this slot begin and end as it is to.
    fn put_ends(&mut self, index: usize) {
        let slot = self.slots[index];
        self.put_head(index);
        self.put_code(self.slot_va(index) + slot.last, &slot.tail());
    }

    /// Makes the trampolines of functions that can wait begin as they are to.
    pub(super) fn put_heads_that_note(&mut self) {
        for index in 0..self.slots.len() {
            if self.slots[index].notes.is_some() {
                self.put_head(index);
            }
        }
    }

    /// Function of the trampoline with this number.
    pub(super) fn target_of(&self, index: u64) -> Option<u64> {
        let slot = self.slots.get(usize::try_from(index).ok()?)?;
        Some(slot.target)
    }

    fn slot_va(&self, index: usize) -> u64 {
        self.va + TRAMPOLINES * PAGE_SIZE + index as u64 * TRAMPOLINE_SLOT_BYTES
    }

    /// Kernel function that the trampoline at `va` calls.
    pub fn trampoline_target(&self, va: u64) -> Option<u64> {
        let offset = va.checked_sub(self.va + TRAMPOLINES * PAGE_SIZE)?;
        let index = usize::try_from(offset / TRAMPOLINE_SLOT_BYTES).ok()?;
        self.slots.get(index).map(|slot| slot.target)
    }

    /// `call target` on the kernel root. All registers and the stack's layout are as in a direct
    /// call: some kernel functions are called from inline assembly and must keep every register.
    fn assemble_trampoline(&self, va: u64, target: u64) -> Result<Vec<u8>, MonitorError> {
        let top = qword_ptr(self.data(RETURN_STACK, TOP));
        let crossings = qword_ptr(self.data(RETURN_STACK, CROSSINGS));
        let scratch = qword_ptr(self.data(SCRATCH, 0));
        let mut a = CodeAssembler::new(64)?;
        a.mov(scratch, r11)?;
        a.mov(r11, self.kernel_root)?;
        a.mov(cr3, r11)?;
        a.mov(r11, crossings)?;
        a.lea(r11, qword_ptr(r11 + 1))?;
        a.mov(crossings, r11)?;
        a.mov(r11, top)?;
        a.pop(qword_ptr(r11))?;
        a.mov(qword_ptr(r11 + 8), rsp)?;
        self.assemble_asking(&mut a, target)?;
        a.lea(r11, qword_ptr(r11 + FRAME_BYTES as i32))?;
        a.mov(top, r11)?;
        a.mov(r11, scratch)?;
        // Functions are entered with it clear (System V ABI, section 3.2.1), and the kernel's own
        // copy downwards otherwise.
        a.cld()?;
        a.call(target)?;
        a.mov(scratch, r11)?;
        a.mov(r11, top)?;
        a.lea(r11, qword_ptr(r11 - FRAME_BYTES as i32))?;
        a.mov(top, r11)?;
        a.push(qword_ptr(r11))?;
        self.assemble_noting(&mut a, target)?;
        a.mov(r11, self.driver_root)?;
        a.mov(cr3, r11)?;
        a.mov(r11, scratch)?;
        a.ret()?;
        Ok(a.assemble(va)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::Mnemonic;

    const VA: u64 = 0xffff_ffff_fee0_0000;
    /// First two bytes of `mov [disp32], r11`: REX.WR and the opcode.
    const MOV_FROM_R11: [u8; 2] = [0x4c, 0x89];

    fn monitor() -> Monitor {
        Monitor::new(1 << 38, VA, 0x1000, 0x2000).unwrap()
    }

    #[test]
    fn trampolines_are_made_once_and_found_again() {
        let mut monitor = monitor();
        let target = 0xffff_ffff_8123_4560;
        let va = monitor.trampoline(target).unwrap();
        assert_eq!(monitor.trampoline(target).unwrap(), va);
        assert_ne!(monitor.trampoline(target + 16).unwrap(), va);
        assert_eq!(monitor.trampoline_target(va + 20), Some(target));
        assert_eq!(monitor.trampoline_target(VA), None);
    }

    #[test]
    fn trampoline_calls_its_target_between_two_root_switches() {
        let mut monitor = monitor();
        let target = 0xffff_ffff_8123_4560;
        let va = monitor.trampoline(target).unwrap();
        let page = (va - VA) / PAGE_SIZE;
        let at = ((va - VA) % PAGE_SIZE) as usize;
        let code = &monitor.page(page)[at..at + TRAMPOLINE_SLOT_BYTES as usize];
        let mut decoder = Decoder::with_ip(64, code, va, DecoderOptions::NONE);
        let mut seen = Vec::new();
        for instruction in &mut decoder {
            match instruction.mnemonic() {
                Mnemonic::Call => seen.push(instruction.near_branch_target()),
                Mnemonic::Mov if instruction.op0_register() == iced_x86::Register::CR3 => {
                    seen.push(0);
                }
                Mnemonic::Ret => break,
                _ => {}
            }
        }
        assert_eq!(seen, [0, target, 0]);
    }

    #[test]
    fn journalled_trampolines_exit_at_both_ends_and_are_as_before_afterwards() {
        let mut monitor = monitor();
        let (seen, unseen) = (0xffff_ffff_8123_4560, 0xffff_ffff_8123_4000);
        let vas = [seen, unseen].map(|target| monitor.trampoline(target).unwrap());
        let before = *monitor.page(TRAMPOLINES);
        monitor.journal(|target| target == seen);
        let at = |va: u64| (va - VA - TRAMPOLINES * PAGE_SIZE) as usize;
        let code = |monitor: &Monitor, va: u64| monitor.page(TRAMPOLINES)[at(va)..][..2].to_vec();
        assert_eq!(code(&monitor, vas[0]), out(PORT_JOURNAL));
        assert_eq!(code(&monitor, vas[1]), MOV_FROM_R11);
        let Some((target, JournalPoint::Enter { resume, journalled })) =
            monitor.journal_point(vas[0])
        else {
            panic!("not the beginning of a trampoline")
        };
        assert!(journalled);
        assert_eq!((target, monitor.journal_point(vas[1])), (seen, None));
        // What is left out is exactly the first instruction, and the other end is the return.
        let mut decoder = Decoder::with_ip(64, &before, vas[0], DecoderOptions::NONE);
        assert_eq!(decoder.decode().next_ip(), resume);
        let last = std::iter::repeat_with(|| decoder.decode())
            .find(|instruction| instruction.mnemonic() == Mnemonic::Ret)
            .unwrap()
            .ip();
        for rip in [last, last + 2] {
            assert_eq!(
                monitor.journal_point(rip),
                Some((seen, JournalPoint::Leave { journalled: true }))
            );
        }
        monitor.journal(|_| false);
        assert!(*monitor.page(TRAMPOLINES) == before);
        assert_eq!(monitor.journal_point(vas[0]), None);
    }

    #[test]
    fn trampolines_that_are_looked_at_exit_at_their_beginning_journalled_or_not() {
        let mut monitor = monitor();
        let (before, after) = (0xffff_ffff_8123_4560, 0xffff_ffff_8123_4000);
        let first = monitor.trampoline(before).unwrap();
        monitor.look_at([before, after].into());
        let second = monitor.trampoline(after).unwrap();
        let other = monitor.trampoline(0xffff_ffff_8123_5000).unwrap();
        let enters = |monitor: &Monitor, va| match monitor.journal_point(va) {
            Some((_, JournalPoint::Enter { journalled, .. })) => Some(journalled),
            _ => None,
        };
        for (wanted, is_journalled) in [(0, false), (before, true), (0, false)] {
            monitor.journal(|target| target == wanted);
            assert_eq!(enters(&monitor, first), Some(is_journalled));
            assert_eq!(enters(&monitor, second), Some(false));
            assert_eq!(enters(&monitor, other), None);
            let at = |va: u64| (va - VA - TRAMPOLINES * PAGE_SIZE) as usize;
            let code = |va: u64| monitor.page(TRAMPOLINES)[at(va)..][..2].to_vec();
            assert_eq!(code(first), out(PORT_JOURNAL));
            assert_eq!(code(second), out(PORT_JOURNAL));
            assert_eq!(code(other), MOV_FROM_R11);
        }
    }

    #[test]
    fn modest_functions_are_reached_on_the_root_that_is_loaded_unless_they_are_journalled() {
        let mut monitor = monitor();
        let (looks, other) = (0xffff_ffff_8123_4560, 0xffff_ffff_8123_5000);
        let usual = monitor.trampoline(other).unwrap();
        monitor.call_directly([looks].into());
        let direct = monitor.trampoline(looks).unwrap();
        let first = |monitor: &Monitor, va: u64| {
            let at = (va - VA - TRAMPOLINES * PAGE_SIZE) as usize;
            let code = &monitor.page(TRAMPOLINES)[at..at + 16];
            Decoder::with_ip(64, code, va, DecoderOptions::NONE).decode()
        };
        let leads_to = |monitor: &Monitor, va| {
            let count = first(monitor, va);
            if count.mnemonic() != Mnemonic::Inc {
                return None;
            }
            assert_eq!(count.memory_displacement64(), VA + SCRATCH * PAGE_SIZE + 16);
            let jump = first(monitor, count.next_ip());
            (jump.mnemonic() == Mnemonic::Jmp).then(|| jump.near_branch_target())
        };
        assert_eq!(leads_to(&monitor, direct), Some(looks));
        assert_eq!(leads_to(&monitor, usual), None);
        monitor.journal(|target| target == looks);
        assert_eq!(first(&monitor, direct).mnemonic(), Mnemonic::Out);
        let Some((_, JournalPoint::Enter { resume, .. })) = monitor.journal_point(direct) else {
            panic!("it does not exit");
        };
        // Behind the exit it changes roots like any other.
        let change = first(&monitor, resume);
        assert_eq!(change.op0_register(), iced_x86::Register::R11);
        assert_eq!(change.immediate64(), 0x2000, "the kernel root");
        monitor.journal(|_| false);
        assert_eq!(leads_to(&monitor, direct), Some(looks));
        monitor.call_directly(HashSet::new());
        assert_eq!(leads_to(&monitor, direct), None);
        assert_eq!(first(&monitor, direct).mnemonic(), Mnemonic::Mov);
    }

    #[test]
    fn too_many_imports_are_refused() {
        let mut monitor = monitor();
        let room = TRAMPOLINE_PAGES * PAGE_SIZE / TRAMPOLINE_SLOT_BYTES;
        for index in 0..room {
            monitor.trampoline(0xffff_ffff_8000_0000 + index).unwrap();
        }
        assert!(matches!(
            monitor.trampoline(0xffff_ffff_9000_0000),
            Err(MonitorError::TooManyImports)
        ));
    }
}
