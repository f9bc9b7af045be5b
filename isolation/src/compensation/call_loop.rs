//! A loop in the guest that calls several kernel functions without leaving it.
//!
//! ```text
//!   stack of the thread                        loop, behind the module's text
//!   top-8    return gate   ◄── last            next:  note the row
//!   top-40   rax, rbx, rbp, r12 of the caller         rdi .. r9 from the table
//!   top-48   row that runs                            call the function
//!            last call: function, rdi .. r9           next row; again as long as there are any
//!            ...                                      caller's registers back, return
//!   rsp      first call
//! ```
//!
//! A call of a kernel function through the return gate costs an exit and an entry of the guest;
//! taking back an `open` that has filled a ring takes five hundred of them. Functions that sleep
//! may be among them: the loop keeps all it needs on the thread's stack. Rows of their own switch
//! interrupts off and on. Where nothing is to be done behind the last one it returns to the caller
//! itself, with what that is to be told in `rax`, and no exit.
//!
//! The kernel rounds a module's text up to whole pages and clears what is left (`layout_sections`,
//! `move_module`, kernel/module/main.c). The loop stands at the end of the last page; where there
//! is no room for it, functions are called one by one.

use devices::dma::GuestMemory;
use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress};

use crate::guest::addr::{Gva, GvaRange};
use crate::guest::modules::ModuleLayout;
use crate::guest::paging::VirtMemory;
use crate::guest::stack::THREAD_SIZE;

/// Most rows of a table: for so long interrupts may wait.
pub const MAX_ROWS: usize = 128;

/// Bytes of stack that must be left for functions that give something back.
pub const LITTLE_STACK: u64 = THREAD_SIZE / 4;
/// Bytes that must be left for those that do the driver's work in its place: all of the network
/// stack, with the interrupts that come meanwhile.
pub const MUCH_STACK: u64 = THREAD_SIZE / 4 * 3;

/// Bytes that have to be free in front of the loop: an instruction may end in a few zeros.
const GAP: usize = 32;

/// A function, and what it is called with in `rdi`, `rsi`, `rdx`, `rcx`, `r8`, `r9`.
pub type Row = [u64; 7];

/// Bytes of a [`Row`].
const ROW_BYTES: u64 = size_of::<Row>() as u64;

/// Registers that the loop needs for itself, kept above its table, and its return address.
const SAVED_BYTES: u64 = 5 * 8;

/// The row that runs, between these and the table.
const PROGRESS_BYTES: u64 = 8;

/// The loop. `rbx`: row of the table; `r12d`: rows that are left; `rbp`: what is kept.
///
/// Functions are entered by a return and not by an indirect call, which a processor with branch
/// tracking allows to marked functions only.
const CODE: [u8; 61] = [
    0x48, 0x89, 0x5d, 0xf8, // mov [rbp-8], rbx
    0x48, 0x8b, 0x7b, 0x08, // mov rdi, [rbx+8]
    0x48, 0x8b, 0x73, 0x10, // mov rsi, [rbx+16]
    0x48, 0x8b, 0x53, 0x18, // mov rdx, [rbx+24]
    0x48, 0x8b, 0x4b, 0x20, // mov rcx, [rbx+32]
    0x4c, 0x8b, 0x43, 0x28, // mov r8, [rbx+40]
    0x4c, 0x8b, 0x4b, 0x30, // mov r9, [rbx+48]
    0x48, 0x8d, 0x05, 0x04, 0x00, 0x00, 0x00, // lea rax, [rip+4]
    0x50, // push rax
    0xff, 0x33, // push qword ptr [rbx]
    0xc3, // ret
    0x48, 0x83, 0xc3, 0x38, // add rbx, 56
    0x41, 0xff, 0xcc, // dec r12d
    0x75, 0xd0, // jne to the first instruction
    0x48, 0x89, 0xec, // mov rsp, rbp
    0x41, 0x5c, // pop r12
    0x5d, // pop rbp
    0x5b, // pop rbx
    0x58, // pop rax
    0xc3, // ret
    0xfa, 0xc3, // cli; ret
    0xfb, 0xc3, // sti; ret
];

/// Function in it that switches interrupts off.
const OFF: u64 = 57;
/// Function in it that switches them on.
const ON: u64 = 59;

/// Return in it.
const RETURN: u64 = 60;

/// The loop of a module.
#[derive(Debug, Clone, Copy)]
pub struct CallLoop {
    at: Gva,
    gpa: GuestAddress,
    was_there: bool,
}

impl CallLoop {
    /// Puts the loop behind the module's text; `None` if there is no room.
    pub fn place(layout: &ModuleLayout, virt: &VirtMemory<'_, GuestMemory>) -> Option<Self> {
        let last = layout.text().map(|section| section.range.last()).max()?;
        let page = Gva(last.0 & !0xfff);
        // The next section begins in this page.
        if last.0 & 0xfff != 0xfff {
            return None;
        }
        let found = virt.space.walk(virt.memory, page).ok()?;
        let mut bytes = [0; 0x1000];
        virt.memory.read_slice(&mut bytes, found.gpa).ok()?;
        let start = bytes.len() - CODE.len();
        // Left there by a release that could not wait, or because a thread may be in it.
        let was_there = bytes[start..] == CODE;
        if was_there {
            bytes[start..].fill(0);
        }
        if bytes[start - GAP..].iter().any(|byte| *byte != 0) {
            return None;
        }
        let gpa = GuestAddress(found.gpa.0.checked_add(start as u64)?);
        virt.memory.write_slice(&CODE, gpa).ok()?;
        let at = page.checked_add(start as u64)?;
        Some(Self { at, gpa, was_there })
    }

    /// Whether it had been left there, and a thread may be in it.
    pub fn was_there(self) -> bool {
        self.was_there
    }

    /// Takes the loop out again. No thread may be in it.
    pub fn remove(self, memory: &GuestMemory) {
        let mut now = [0; CODE.len()];
        // The module may be gone and its memory another's.
        let there = memory.read_slice(&mut now, self.gpa).is_ok() && now == CODE;
        if there && memory.write_slice(&[0; CODE.len()], self.gpa).is_err() {
            tracing::error!(
                "cannot take a loop out of guest memory at {:#x}",
                self.gpa.0
            );
        }
    }

    /// Guest virtual address of a return instruction in it.
    pub fn returns(self) -> u64 {
        self.at.0.wrapping_add(RETURN)
    }

    /// Where it is, and what was there before it.
    pub fn place_without(self) -> (GuestAddress, Vec<u8>) {
        (self.gpa, vec![0; CODE.len()])
    }

    /// How many rows there is room for on `stack` below `top`, in one go, where `reserve` bytes are
    /// left for the functions.
    pub fn room(top: u64, stack: GvaRange, reserve: u64) -> usize {
        let above_bottom = top.wrapping_sub(8).saturating_sub(stack.first().0);
        let above_bottom = above_bottom.min(THREAD_SIZE);
        let bytes = above_bottom.saturating_sub(reserve + SAVED_BYTES + PROGRESS_BYTES);
        usize::try_from(bytes / ROW_BYTES).map_or(MAX_ROWS, |rows| rows.min(MAX_ROWS))
    }

    /// The row that switches interrupts off, or on again.
    pub fn interrupts(self, off: bool) -> Row {
        let function = self.at.0.wrapping_add(if off { OFF } else { ON });
        [function, 0, 0, 0, 0, 0, 0]
    }

    /// Registers that call `rows` one after the other on the stack below that of `caller`, as whom
    /// it then goes on at `back`. `None` if the stack is not there.
    pub fn begin(
        self,
        rows: &[Row],
        caller: &kvm_regs,
        back: u64,
        virt: VirtMemory<'_, GuestMemory>,
    ) -> Option<(kvm_regs, Progress)> {
        let kept = caller.rsp.wrapping_sub(SAVED_BYTES);
        let noted = kept.wrapping_sub(PROGRESS_BYTES);
        let table = noted.wrapping_sub(rows.len() as u64 * ROW_BYTES);
        let words = rows.iter().flatten().copied();
        let words = words.chain([table, caller.r12, caller.rbp, caller.rbx, caller.rax, back]);
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        write(virt, table, &bytes)?;
        let progress = Progress {
            at: virt.space.walk(virt.memory, Gva(noted)).ok()?.gpa,
            table,
            functions: rows.iter().map(|row| row[0]).collect(),
        };
        let regs = kvm_regs {
            rip: self.at.0,
            rsp: table,
            rax: 0,
            rbx: table,
            rbp: kept,
            r12: u64::try_from(rows.len()).ok()?,
            ..*caller
        };
        Some((regs, progress))
    }
}

/// Where a thread in the loop is.
#[derive(Debug, Clone)]
pub struct Progress {
    /// Where the row that runs is noted.
    at: GuestAddress,
    table: u64,
    functions: Vec<u64>,
}

impl Progress {
    /// The function that runs now, as the guest has noted it.
    pub fn function(&self, memory: &GuestMemory) -> u64 {
        let row = memory.read_obj::<u64>(self.at).unwrap_or(self.table);
        let index = row.wrapping_sub(self.table) / ROW_BYTES;
        let noted = usize::try_from(index).ok();
        let noted = noted.and_then(|index| self.functions.get(index));
        noted.or(self.functions.first()).copied().unwrap_or(0)
    }
}

/// Writes to a stack, page by page.
fn write(virt: VirtMemory<'_, GuestMemory>, at: u64, bytes: &[u8]) -> Option<()> {
    let mut at = at;
    let mut rest = bytes;
    while !rest.is_empty() {
        let in_page = usize::try_from(0x1000 - (at & 0xfff)).ok()?;
        let (part, later) = rest.split_at(in_page.min(rest.len()));
        let found = virt.space.walk(virt.memory, Gva(at)).ok()?;
        virt.memory.write_slice(part, found.gpa).ok()?;
        at = at.checked_add(part.len() as u64)?;
        rest = later;
    }
    Some(())
}
