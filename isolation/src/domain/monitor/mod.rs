//! The monitor area: the few pages that only P has, above guest memory.
//!
//! ```text
//!  page                     driver root   kernel root
//!  0        stubs           execute       execute      entry, exit and call-back return
//!  1        VECTORS         execute       execute      256 exception stubs of 16 bytes
//!  2..66    TRAMPOLINES     execute       execute      one for each imported function
//!  66       TABLES_RO       read          read         IDT
//!  67       SEGMENTS        read          read         GDT and TSS
//!  68       EXCEPTION_STACK write         write        IST1; every exception frame lands here
//!  69       SCRATCH         write         write        a register while roots are switched, one for stubs, one for trampolines;
//!                                                     a counter
//!  70..74   HANDED_OVER     write         write        calls of kernel functions that wait for the driver's to end
//!  74       ASKED           read          write        how much memory the driver asked for
//!  75       RETURN_STACK    read          write        where kernel functions return to; top first
//!  76..     page tables     -             -            roots and their tables; no virtual address
//! ```
//!
//! All pages but the page tables are mapped at consecutive virtual addresses; the one after
//! `RETURN_STACK` is unmapped, so crossings nested too deep fault instead of running on.
//!
//! What the driver can do to it: run the stubs at a wrong place, which no check here prevents, and
//! overwrite the exception stack and the scratch word, which hold nothing across an instruction
//! that could be interrupted, the counter, for which its bytes are not looked at one by one then,
//! and the calls that wait, which are looked at as if the driver had made them.

use std::collections::{HashMap, HashSet};
use std::ptr::NonNull;

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, cr3, qword_ptr, r11};

use super::view::{PAGE_SIZE, Page};
use asked::Measured;
use handed_over::Handing;
use trampolines::Trampoline;

pub use asked::{Asked, MAX_ASKED, Measure};
pub use exceptions::ExceptionFrame;
pub use handed_over::MAX_HANDED_OVER;
pub use trampolines::JournalPoint;

mod asked;
mod exceptions;
mod handed_over;
mod trampolines;

const VECTORS: u64 = 1;
const TRAMPOLINES: u64 = 2;
const TRAMPOLINE_PAGES: u64 = 64;
const IDT: u64 = TRAMPOLINES + TRAMPOLINE_PAGES;
const SEGMENTS: u64 = IDT + 1;
const EXCEPTION_STACK: u64 = SEGMENTS + 1;
const SCRATCH: u64 = EXCEPTION_STACK + 1;
const HANDED_OVER: u64 = SCRATCH + 1;
const HANDED_OVER_PAGES: u64 = 4;
const ASKED: u64 = HANDED_OVER + HANDED_OVER_PAGES;
const RETURN_STACK: u64 = ASKED + 1;
/// Pages that have a virtual address.
pub const MAPPED_PAGES: u64 = RETURN_STACK + 1;
/// Pages for page tables.
pub const TABLE_PAGES: u64 = 1024;
/// All pages of the area.
pub const AREA_PAGES: u64 = MAPPED_PAGES + TABLE_PAGES;

const _: () = assert!(
    AREA_PAGES * PAGE_SIZE <= vmm::layout::UNUSED.1 - vmm::layout::UNUSED.0,
    "the area does not fit where the machine leaves room for it"
);

/// Port of the exit by which an isolated function returns.
pub const PORT_RETURN: u16 = 0xF1;
/// Port of the exit by which an exception is told.
pub const PORT_EXCEPTION: u16 = 0xF0;
/// Port of the exit by which a call-back of the kernel into the driver returns.
pub const PORT_CALLBACK_RETURN: u16 = 0xF2;

/// Port of the exit at a kernel function that only the guest may run.
pub const PORT_TRAPPED: u16 = 0xF3;

/// Port of the exit at a kernel function that waits for time to pass.
pub const PORT_SLEEP: u16 = 0xF5;

/// Port of the exit at a kernel function that means that something is broken for good.
pub const PORT_FATAL: u16 = 0xF4;

/// Port of the exits at both ends of a trampoline whose calls are journalled or whose answers are
/// told, and at the beginning of one whose arguments are looked at.
pub const PORT_JOURNAL: u16 = 0xF6;

/// Port of the exit at a fault that waits in the driver's copy, see [`super::strike`].
pub const PORT_STRIKE: u16 = 0xF7;

/// Kernel code segment selector of 64-bit Linux (`__KERNEL_CS`), which exceptions run on.
pub const KERNEL_CS: u16 = 0x10;
/// Kernel data segment selector (`__KERNEL_DS`).
pub const KERNEL_DS: u16 = 0x18;

const VECTOR_STUB_BYTES: u64 = 16;
const TRAMPOLINE_SLOT_BYTES: u64 = 256;
/// Offset in the scratch page of the stubs' word. That of the trampolines, at 0, may be in use when
/// a stub runs: one that is interrupted by a page fault goes on by way of a stub if the roots were
/// built anew.
const STUB_SCRATCH: u64 = 8;
/// Offset there of the number of calls of kernel functions that ran with the driver's rights.
const DIRECT_CALLS: u64 = 16;
// Offsets in the return stack's page.
const TOP: u64 = 0;
const CROSSINGS: u64 = 8;
const TARGET: u64 = 16;
const FIRST_FRAME: u64 = 32;
/// Return address, RSP, and two words of what is noted behind the call ([`asked`]).
const FRAME_BYTES: u64 = 32;

/// What the guest may do with a mapped monitor page in each root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MonitorAccess {
    /// Executable in both roots.
    pub execute: bool,
    /// Writable in the driver root.
    pub driver_write: bool,
    /// Writable in the kernel root.
    pub kernel_write: bool,
}

/// Access to mapped page `page` of the area.
pub fn access(page: u64) -> MonitorAccess {
    let execute = page < IDT;
    let handed_over = HANDED_OVER..HANDED_OVER + HANDED_OVER_PAGES;
    let both = page == EXCEPTION_STACK || page == SCRATCH || handed_over.contains(&page);
    MonitorAccess {
        execute,
        driver_write: both,
        kernel_write: both || page == RETURN_STACK || page == ASKED,
    }
}

/// Where a kernel function that the driver called will return to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrossingFrame {
    /// Return address in the driver (or a stub, for a tail call).
    pub return_address: u64,
    /// RSP after the return, before stack arguments are popped.
    pub rsp: u64,
}

/// Why the area could not be built.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// Host memory for it could not be had.
    #[error("cannot map the monitor area: {0}")]
    Map(#[source] std::io::Error),
    /// Code did not assemble.
    #[error("cannot assemble monitor code: {0}")]
    Assemble(String),
    /// More functions are imported than there is room for.
    #[error("the driver imports more kernel functions than the monitor area has trampolines for")]
    TooManyImports,
}

impl From<IcedError> for MonitorError {
    fn from(error: IcedError) -> Self {
        Self::Assemble(error.to_string())
    }
}

/// The area: host memory, guest addresses and what was put into it.
#[derive(Debug)]
pub struct Monitor {
    memory: NonNull<Page>,
    gpa: u64,
    va: u64,
    driver_root: u64,
    kernel_root: u64,
    trampolines: HashMap<u64, u64>,
    /// In the order of their slots.
    slots: Vec<Trampoline>,
    /// Functions whose arguments are looked at.
    looked_at: HashSet<u64>,
    /// Functions whose answers are told.
    answering: HashSet<u64>,
    /// Functions that run with the driver's rights.
    direct: HashSet<u64>,
    handing: Handing,
    /// Functions whose calls tell how much memory is asked for.
    measured: Measured,
}

// SAFETY: the mapping belongs to this value alone; P, the only other party that writes it, runs on
// the thread that owns the value.
unsafe impl Send for Monitor {}

impl Monitor {
    /// An area at guest physical `gpa` that will be mapped at guest virtual `va`, with code that
    /// switches between page-table roots at guest physical `driver_root` and `kernel_root`.
    pub fn new(
        gpa: u64,
        va: u64,
        driver_root: u64,
        kernel_root: u64,
    ) -> Result<Self, MonitorError> {
        // SAFETY: a new anonymous mapping, nothing is replaced.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                (AREA_PAGES * PAGE_SIZE) as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let memory = (address != libc::MAP_FAILED)
            .then_some(address)
            .and_then(|address| NonNull::new(address.cast::<Page>()))
            .ok_or_else(|| MonitorError::Map(std::io::Error::last_os_error()))?;
        // Most of the area is never touched, and a huge page of it would be half of what a VM takes.
        // SAFETY: the range is the mapping that was just made, and only how large its pages are
        // changes. Where the host's kernel has none there is nothing to be asked for.
        unsafe {
            libc::madvise(
                memory.as_ptr().cast(),
                (AREA_PAGES * PAGE_SIZE) as usize,
                libc::MADV_NOHUGEPAGE,
            )
        };
        let mut monitor = Self {
            memory,
            gpa,
            va,
            driver_root,
            kernel_root,
            trampolines: HashMap::new(),
            slots: Vec::new(),
            looked_at: HashSet::new(),
            answering: HashSet::new(),
            direct: HashSet::new(),
            handing: Handing::default(),
            measured: Measured::default(),
        };
        monitor.write_stubs()?;
        monitor.write_vectors()?;
        monitor.write_idt();
        monitor.write_segments();
        monitor.begin_call(0);
        Ok(monitor)
    }

    /// Host address of the area, for the memory slot.
    pub fn host_address(&self) -> u64 {
        self.memory.as_ptr() as u64
    }

    /// Guest physical address of the area's first byte.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Guest virtual address of the area's first byte.
    pub fn va(&self) -> u64 {
        self.va
    }

    /// Whether `va` is in the mapped part, the guard page included.
    pub fn contains_va(&self, va: u64) -> bool {
        va.wrapping_sub(self.va) < (MAPPED_PAGES + 1) * PAGE_SIZE
    }

    /// One page of the area.
    pub fn page(&self, index: u64) -> &Page {
        assert!(index < AREA_PAGES, "page of the monitor area");
        // SAFETY: the index is within the mapping; P does not run while the host looks (see
        // `Send`).
        unsafe { self.memory.add(index as usize).as_ref() }
    }

    /// One page of the area, to change.
    pub fn page_mut(&mut self, index: u64) -> &mut Page {
        assert!(index < AREA_PAGES, "page of the monitor area");
        // SAFETY: as in `page`, and `&mut self` makes this the only borrow.
        unsafe { self.memory.add(index as usize).as_mut() }
    }

    /// Where P starts a call: loads the driver root, which drops stale translations, and jumps to
    /// the function given to [`Monitor::begin_call`].
    pub fn entry_stub(&self) -> u64 {
        self.va
    }

    /// Where P goes on in the kernel after a call-back: loads the kernel root and jumps to the
    /// address given to [`Monitor::resume_at`].
    pub fn kernel_stub(&self) -> u64 {
        self.va + 0x60
    }

    /// Return address of the isolated function.
    pub fn exit_stub(&self) -> u64 {
        self.va + 0x40
    }

    /// Return address of a driver function that the kernel called back.
    pub fn callback_return_stub(&self) -> u64 {
        self.va + 0x50
    }

    /// Guest virtual address of the GDT and its limit.
    pub fn gdt(&self) -> (u64, u16) {
        (self.va + SEGMENTS * PAGE_SIZE, 4 * 8 - 1)
    }

    /// Guest virtual address of the TSS and its limit.
    pub fn tss(&self) -> (u64, u32) {
        (self.va + SEGMENTS * PAGE_SIZE + 0x100, 103)
    }

    /// Guest virtual address of the IDT and its limit.
    pub fn idt(&self) -> (u64, u16) {
        (self.va + IDT * PAGE_SIZE, 4095)
    }

    /// Empties the return stack and sets what the entry stub jumps to.
    pub fn begin_call(&mut self, target: u64) {
        let top = self.va + RETURN_STACK * PAGE_SIZE + FIRST_FRAME;
        self.put(RETURN_STACK, TOP, top);
        self.put(RETURN_STACK, TARGET, target);
        self.forget_asked();
    }

    /// Sets what the entry stub jumps to and leaves the return stack as it is: to go on in the
    /// driver after a root was changed behind its back.
    pub fn resume_at(&mut self, target: u64) {
        self.put(RETURN_STACK, TARGET, target);
    }

    /// Makes the return stack hold `frames`, outermost first, and sets what the entry stub jumps
    /// to: to go on with a call that was left for a while. `false` if there are more than fit.
    pub fn resume_with(&mut self, frames: &[CrossingFrame], target: u64) -> bool {
        let end = FIRST_FRAME + frames.len() as u64 * FRAME_BYTES;
        if end > PAGE_SIZE {
            return false;
        }
        for (frame, offset) in frames
            .iter()
            .zip((FIRST_FRAME..).step_by(FRAME_BYTES as usize))
        {
            self.put(RETURN_STACK, offset, frame.return_address);
            self.put(RETURN_STACK, offset + 8, frame.rsp);
            // A function that hands memory out notes that nothing is known of it.
            self.put(RETURN_STACK, offset + 16, 0);
            self.put(RETURN_STACK, offset + 24, 0);
        }
        self.forget_asked();
        self.put(RETURN_STACK, TOP, self.va + RETURN_STACK * PAGE_SIZE + end);
        self.put(RETURN_STACK, TARGET, target);
        true
    }

    /// Crossings made by trampolines since the area was made.
    pub fn crossings(&self) -> u64 {
        self.get(RETURN_STACK, CROSSINGS)
    }

    /// Calls of kernel functions since the area was made: crossings, and those with the driver's
    /// rights, whose number the driver could change.
    pub fn kernel_calls(&self) -> (u64, u64) {
        (self.crossings(), self.get(SCRATCH, DIRECT_CALLS))
    }

    /// Kernel functions now being called by the driver, outermost first.
    pub fn crossing_frames(&self) -> Vec<CrossingFrame> {
        let base = self.va + RETURN_STACK * PAGE_SIZE;
        let top = self
            .get(RETURN_STACK, TOP)
            .wrapping_sub(base)
            .min(PAGE_SIZE);
        (FIRST_FRAME..)
            .step_by(FRAME_BYTES as usize)
            .take_while(|offset| offset + FRAME_BYTES <= top)
            .map(|offset| CrossingFrame {
                return_address: self.get(RETURN_STACK, offset),
                rsp: self.get(RETURN_STACK, offset + 8),
            })
            .collect()
    }

    fn data(&self, page: u64, offset: u64) -> u64 {
        self.va + page * PAGE_SIZE + offset
    }

    fn write_stubs(&mut self) -> Result<(), MonitorError> {
        for (at, root) in [
            (self.entry_stub(), self.driver_root),
            (self.kernel_stub(), self.kernel_root),
        ] {
            let mut a = CodeAssembler::new(64)?;
            let scratch = qword_ptr(self.data(SCRATCH, STUB_SCRATCH));
            a.mov(scratch, r11)?;
            a.mov(r11, root)?;
            a.mov(cr3, r11)?;
            a.mov(r11, scratch)?;
            a.jmp(qword_ptr(self.data(RETURN_STACK, TARGET)))?;
            let code = a.assemble(at)?;
            self.put_code(at, &code);
        }
        self.put_code(self.exit_stub(), &out_and_halt(PORT_RETURN));
        self.put_code(
            self.callback_return_stub(),
            &out_and_halt(PORT_CALLBACK_RETURN),
        );
        Ok(())
    }

    fn write_vectors(&mut self) -> Result<(), MonitorError> {
        for vector in 0..256 {
            let at = self.va + VECTORS * PAGE_SIZE + vector * VECTOR_STUB_BYTES;
            self.put_code(at, &out_and_halt(PORT_EXCEPTION));
        }
        Ok(())
    }

    /// Interrupt gates (Intel SDM volume 3, section 6.14.1) to the vectors' stubs, all on IST1.
    fn write_idt(&mut self) {
        for vector in 0..256u64 {
            let target = self.va + VECTORS * PAGE_SIZE + vector * VECTOR_STUB_BYTES;
            let low = (target & 0xffff)
                | u64::from(KERNEL_CS) << 16
                | 1 << 32
                | 0x8e << 40
                | (target >> 16 & 0xffff) << 48;
            self.put(IDT, vector * 16, low);
            self.put(IDT, vector * 16 + 8, target >> 32);
        }
    }

    /// Flat 64-bit code and data at Linux's selectors, accessed bits set so that the processor does
    /// not write them, and a TSS with IST1 (Intel SDM volume 3, section 7.7).
    fn write_segments(&mut self) {
        self.put(SEGMENTS, u64::from(KERNEL_CS), 0x00af_9b00_0000_ffff);
        self.put(SEGMENTS, u64::from(KERNEL_DS), 0x00cf_9300_0000_ffff);
        let stack_top = self.va + (EXCEPTION_STACK + 1) * PAGE_SIZE;
        let ist1 = stack_top.to_le_bytes();
        self.page_mut(SEGMENTS)[0x100 + 0x24..0x100 + 0x2c].copy_from_slice(&ist1);
    }

    fn put_code(&mut self, va: u64, code: &[u8]) {
        let offset = va - self.va;
        let (page, at) = (offset / PAGE_SIZE, (offset % PAGE_SIZE) as usize);
        self.page_mut(page)[at..at + code.len()].copy_from_slice(code);
    }

    fn put(&mut self, page: u64, offset: u64, value: u64) {
        let at = offset as usize;
        self.page_mut(page)[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn get(&self, page: u64, offset: u64) -> u64 {
        let at = offset as usize;
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.page(page)[at..at + 8]);
        u64::from_le_bytes(bytes)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`. The memory slot over it belongs to a VM that
        // is gone by now or never runs again; a failure would only mean the range is not mapped.
        unsafe {
            libc::munmap(
                self.memory.as_ptr().cast(),
                (AREA_PAGES * PAGE_SIZE) as usize,
            );
        }
    }
}

/// `out port, al` for a port below 256.
pub fn out(port: u16) -> [u8; 2] {
    [0xe6, port as u8]
}

/// `out port, al; hlt`: the `hlt` is never reached.
fn out_and_halt(port: u16) -> [u8; 3] {
    let [opcode, port] = out(port);
    [opcode, port, 0xf4]
}
