//! The guest of the stress test: tables, a kernel of a few functions, and a driver that fails at
//! random.
//!
//! ```text
//!   every vCPU, for ever:  write own word ─► call the driver ─┬─ 1: one more has succeeded ─┬─► check all own words
//!                                                             └─ -EIO: one more has failed ─┘
//!   the driver's function: own word, everybody's word, a second page, a kernel function, a device register,
//!                          then by chance a device load, a wait in the guest, a fault
//! ```

use devices::dma::GuestMemory;
use iced_x86::code_asm::*;
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

const PAGE: u64 = 4096;
pub const DRIVER_TEXT: u64 = 0xffff_ffff_c000_1000;
pub const DRIVER_DATA: u64 = 0xffff_ffff_c000_3000;
const KERNEL_TEXT: u64 = 0xffff_ffff_8100_0000;
pub const KERNEL_FUNCTION: u64 = KERNEL_TEXT;
pub const WAITS: u64 = KERNEL_TEXT + 0x100;
pub const SCHEDULER: u64 = KERNEL_TEXT + 0x200;
pub const TIMER_HANDLER: u64 = KERNEL_TEXT + 0x300;
const DEVICE_HANDLER: u64 = KERNEL_TEXT + 0x380;
const CALLER: u64 = KERNEL_TEXT + 0x400;
const EXCEPTIONS: u64 = KERNEL_TEXT + 0x1000;
pub const KERNEL_DATA: u64 = 0xffff_ffff_8200_0000;
/// GDT, and IDT behind it.
const TABLES: u64 = 0xffff_ffff_8200_2000;
/// Each vCPU's own words, at its GS base.
pub const PER_CPU: u64 = 0xffff_8880_0000_0000;
const PER_CPU_BYTES: u64 = 128;
const STACKS: u64 = 0xffff_c900_0000_0000;
const STACK_BYTES: u64 = 4 * PAGE;
/// The device's registers, one of 8 bytes for each vCPU.
const DEVICE: u64 = 0xffff_c900_0100_0000;
pub const DEVICE_GPA: u64 = 0xd000_0000;

/// Words of [`DRIVER_DATA`]: each vCPU's calls that ended well, all of them together, the kernel's
/// own count of calls, whether faults are allowed.
const OWN: u64 = 0;
pub const TOGETHER: u64 = 0x100;
const BY_KERNEL: u64 = 0x200;
pub const MODE: u64 = 0x300;
/// Words that only the device writes, in pages that calls write.
pub const BY_DEVICE: [u64; 4] = [
    DRIVER_DATA + 0x808,
    DRIVER_DATA + PAGE + 0x808,
    KERNEL_DATA + 0x808,
    STACKS + STACK_BYTES - 8,
];
/// Words of [`KERNEL_DATA`].
pub const TOGETHER_BY_KERNEL: u64 = 0x100;
pub const STOP: u64 = 0x200;
/// A vCPU's own words: timer interrupts taken, kernel functions called by the driver, its first
/// stack pointer, calls that ended well, and that failed.
pub const TICKS: u64 = 0;
const CALLED: u64 = 8;
const STACK_POINTER: u64 = 24;
pub const SUCCEEDED: u64 = 32;
pub const FAILED: u64 = 40;

pub const REPORT_PORT: u16 = 0x500;
pub const ACKNOWLEDGE_PORT: u16 = 0x510;
/// Reports.
pub const DONE: u32 = 1;
const BAD_RETURN: u32 = 2;
const LOST_OWN: u32 = 3;
const LOST_SECOND: u32 = 4;
const LOST_KERNEL: u32 = 5;
const LOST_PER_CPU: u32 = 6;
const BAD_REGISTER: u32 = 7;
const EXCEPTION: u32 = 0x100;

const TIMER_VECTOR: u64 = 0x31;
pub const DEVICE_VECTOR: u64 = 0x32;

const PML4: u64 = 0x20_0000;
const MARKS: [u64; 2] = [0x1414_1414_1414, 0x1515_1515_1515];
const X2APIC_EOI: u32 = 0x80b;

/// What the report of a guest means.
pub fn meaning(report: u32) -> String {
    match report {
        BAD_RETURN => "a call returned neither success nor its error".into(),
        LOST_OWN => "a vCPU's count of its calls is wrong".into(),
        LOST_SECOND => "that on a second page is wrong".into(),
        LOST_KERNEL => "a word that the kernel wrote beside it is wrong".into(),
        LOST_PER_CPU => "a count that a kernel function keeps for each vCPU is wrong".into(),
        BAD_REGISTER => "a register is not what it was before the call".into(),
        vector if vector & EXCEPTION != 0 => format!("exception {}", vector & 0xff),
        other => format!("report {other}"),
    }
}

pub fn gpa_of(va: u64) -> u64 {
    match va {
        DRIVER_TEXT..0xffff_ffff_c000_2000 => 0x30_0000 + (va - DRIVER_TEXT),
        DRIVER_DATA..0xffff_ffff_c000_5000 => 0x31_0000 + (va - DRIVER_DATA),
        KERNEL_TEXT..0xffff_ffff_8100_2000 => 0x32_0000 + (va - KERNEL_TEXT),
        KERNEL_DATA..0xffff_ffff_8200_4000 => 0x33_0000 + (va - KERNEL_DATA),
        PER_CPU..0xffff_8880_0000_1000 => 0x34_0000 + (va - PER_CPU),
        STACKS..0xffff_c900_0002_0000 => 0x35_0000 + (va - STACKS),
        _ => panic!("{va:#x} is not mapped"),
    }
}

/// Address of word `word` of vCPU `index`.
pub fn per_cpu(index: u8, word: u64) -> u64 {
    PER_CPU + u64::from(index) * PER_CPU_BYTES + word
}

/// Writes everything but registers into guest memory.
pub fn write(memory: &GuestMemory) {
    let mut tables = PageTables {
        memory,
        next: PML4 + PAGE,
    };
    const WRITE: u64 = 2;
    const NX: u64 = 1 << 63;
    let mut map = |start: u64, pages: u64, flags: u64| {
        for va in (0..pages).map(|page| start + page * PAGE) {
            tables.map(va, gpa_of(va), flags);
        }
    };
    map(DRIVER_TEXT, 1, 0);
    map(DRIVER_DATA, 2, WRITE | NX);
    map(KERNEL_TEXT, 2, 0);
    map(KERNEL_DATA, 4, WRITE | NX);
    map(PER_CPU, 1, WRITE | NX);
    map(STACKS, 32, WRITE | NX);
    tables.map(DEVICE, DEVICE_GPA, WRITE | NX);
    let put = |va: u64, bytes: &[u8]| {
        memory.write_slice(bytes, GuestAddress(gpa_of(va))).unwrap();
    };
    let code = |va: u64, build: &dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>| {
        let mut assembler = CodeAssembler::new(64).unwrap();
        build(&mut assembler).unwrap();
        put(va, &assembler.assemble(va).unwrap());
    };
    put(DRIVER_TEXT, &[0xcc; PAGE as usize]);
    code(DRIVER_TEXT, &driver);
    code(KERNEL_FUNCTION, &|a| {
        a.inc(qword_ptr(CALLED as i32).gs())?;
        a.mov(rax, KERNEL_DATA + TOGETHER_BY_KERNEL)?;
        a.lock().inc(qword_ptr(rax))?;
        a.ret()
    });
    code(WAITS, &|a| {
        a.call(SCHEDULER)?;
        a.ret()
    });
    code(SCHEDULER, &|a| {
        a.pause()?;
        a.ret()
    });
    code(TIMER_HANDLER, &|a| {
        a.inc(qword_ptr(TICKS as i32).gs())?;
        end_of_interrupt(a)
    });
    code(DEVICE_HANDLER, &|a| {
        a.push(rdx)?;
        a.mov(edx, u32::from(ACKNOWLEDGE_PORT))?;
        a.out(dx, al)?;
        a.pop(rdx)?;
        end_of_interrupt(a)
    });
    code(CALLER, &caller);
    for vector in 0..32 {
        code(EXCEPTIONS + vector * 32, &|a| {
            report(a, EXCEPTION | vector as u32)
        });
        gate(memory, vector, EXCEPTIONS + vector * 32);
    }
    gate(memory, TIMER_VECTOR, TIMER_HANDLER);
    gate(memory, DEVICE_VECTOR, DEVICE_HANDLER);
    put(TABLES + 0x10, &0x00af_9b00_0000_ffffu64.to_le_bytes());
    put(TABLES + 0x18, &0x00cf_9300_0000_ffffu64.to_le_bytes());
}

/// Registers with which vCPU `index` begins, from those of a boot processor in long mode.
pub fn registers(index: u8, boot: &kvm_sregs) -> (kvm_regs, kvm_sregs) {
    let mut sregs = *boot;
    sregs.cr3 = PML4;
    // PAE, PGE, OSFXSR, OSXMMEXCPT; SCE, LME, LMA, NXE.
    (sregs.cr4, sregs.efer) = (0x6a0, 0xd01);
    (sregs.gdt.base, sregs.gdt.limit) = (TABLES, 0x1f);
    (sregs.idt.base, sregs.idt.limit) = (TABLES + PAGE, 0xfff);
    sregs.gs.base = per_cpu(index, 0);
    // x2APIC mode; one boot processor.
    sregs.apic_base = 0xfee0_0c00 | if index == 0 { 0x100 } else { 0 };
    let regs = kvm_regs {
        rip: CALLER,
        rsp: STACKS + (u64::from(index) + 1) * STACK_BYTES - 0x100,
        rflags: 2,
        rbx: index.into(),
        r12: 0x9e37_79b9_7f4a_7c15 ^ u64::from(index) << 40,
        r14: MARKS[0],
        r15: MARKS[1],
        ..Default::default()
    };
    (regs, sregs)
}

/// An isolated function: RDI is the vCPU's number, RSI a random number of 31 bits.
fn driver(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut labels = [(); 7].map(|()| a.create_label());
    let [no_device, no_wait, good, stray, null, end, bad] = &mut labels;
    a.db(&[0x0f, 0x1f, 0x44, 0x00, 0x00])?;
    a.sub(rsp, 0x20)?;
    a.mov(qword_ptr(rsp), rdi)?;
    a.mov(qword_ptr(rsp + 8), rsi)?;
    a.mov(rcx, DRIVER_DATA)?;
    a.mov(rax, qword_ptr(rcx + MODE))?;
    a.mov(qword_ptr(rsp + 16), rax)?;
    a.inc(qword_ptr(rcx + rdi * 8 + OWN))?;
    a.lock().inc(qword_ptr(rcx + TOGETHER))?;
    a.inc(qword_ptr(rcx + rdi * 8 + PAGE))?;
    a.call(KERNEL_FUNCTION)?;
    a.mov(rdi, qword_ptr(rsp))?;
    a.mov(rsi, qword_ptr(rsp + 8))?;
    a.cmp(qword_ptr(rsp + 16), 0)?;
    a.je(*no_device)?;
    a.mov(rcx, DEVICE)?;
    a.mov(dword_ptr(rcx + rdi * 8), esi)?;
    a.test(esi, 1)?;
    a.jz(*no_device)?;
    // What was done so far is published for it.
    a.mov(eax, dword_ptr(rcx + rdi * 8))?;
    a.cmp(eax, esi)?;
    a.jne(*bad)?;
    a.set_label(no_device)?;
    a.test(esi, 6)?;
    a.jnz(*no_wait)?;
    a.call(WAITS)?;
    a.jmp(*good)?;
    a.set_label(no_wait)?;
    a.cmp(qword_ptr(rsp + 16), 0)?;
    a.je(*good)?;
    // A fault of one of four kinds in three of four of the others.
    a.mov(eax, esi)?;
    a.shr(eax, 3)?;
    a.and(eax, 3)?;
    a.jz(*good)?;
    a.cmp(eax, 1)?;
    a.je(*stray)?;
    a.cmp(eax, 2)?;
    a.je(*null)?;
    a.shr(esi, 5)?;
    a.and(esi, 0xff)?;
    a.jnz(*end)?;
    let mut forever = a.create_label();
    a.set_label(&mut forever)?;
    a.jmp(forever)?;
    a.set_label(end)?;
    a.ud2()?;
    a.set_label(stray)?;
    a.mov(rcx, KERNEL_DATA)?;
    a.mov(qword_ptr(rcx + TOGETHER_BY_KERNEL), rcx)?;
    a.set_label(null)?;
    a.xor(ecx, ecx)?;
    a.mov(qword_ptr(rcx), rcx)?;
    a.set_label(good)?;
    a.add(rsp, 0x20)?;
    a.mov(eax, 1)?;
    a.ret()?;
    a.set_label(bad)?;
    a.add(rsp, 0x20)?;
    a.mov(eax, 2)?;
    a.ret()
}

/// The loop of a vCPU: RBX is its number, R12 its random numbers, RBP and R13 count calls.
fn caller(a: &mut CodeAssembler) -> Result<(), IcedError> {
    // APIC on; its timer divides by 1 and interrupts periodically.
    for (register, value) in [
        (0x80f, 0x1ff),
        (0x832, 0x2_0000 | TIMER_VECTOR as u32),
        (0x83e, 0xb),
        (0x838, 1_500_000),
    ] {
        a.mov(ecx, register)?;
        a.mov(eax, value)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
    }
    a.mov(qword_ptr(STACK_POINTER as i32).gs(), rsp)?;
    a.sti()?;
    let mut labels = [(); 11].map(|()| a.create_label());
    let [top, good, check, done, stop, faults @ ..] = &mut labels;
    a.set_label(top)?;
    a.mov(rcx, KERNEL_DATA + STOP)?;
    a.cmp(qword_ptr(rcx), 0)?;
    a.jne(*done)?;
    a.mov(rax, 6_364_136_223_846_793_005u64)?;
    a.imul_2(r12, rax)?;
    a.mov(rax, 1_442_695_040_888_963_407u64)?;
    a.add(r12, rax)?;
    a.mov(rcx, DRIVER_DATA)?;
    a.inc(qword_ptr(rcx + rbx * 8 + BY_KERNEL))?;
    a.mov(rdi, rbx)?;
    a.mov(rsi, r12)?;
    a.shr(rsi, 33)?;
    a.call(DRIVER_TEXT)?;
    a.cmp(rax, 1)?;
    a.je(*good)?;
    a.cmp(rax, -5)?;
    a.jne(faults[0])?;
    a.inc(r13)?;
    a.jmp(*check)?;
    a.set_label(good)?;
    a.inc(rbp)?;
    a.set_label(check)?;
    a.mov(rcx, DRIVER_DATA)?;
    a.cmp(qword_ptr(rcx + rbx * 8 + OWN), rbp)?;
    a.jne(faults[1])?;
    a.cmp(qword_ptr(rcx + rbx * 8 + PAGE), rbp)?;
    a.jne(faults[2])?;
    a.mov(rax, rbp)?;
    a.add(rax, r13)?;
    a.cmp(qword_ptr(rcx + rbx * 8 + BY_KERNEL), rax)?;
    a.jne(faults[3])?;
    a.cmp(qword_ptr(CALLED as i32).gs(), rbp)?;
    a.jne(faults[4])?;
    a.cmp(qword_ptr(STACK_POINTER as i32).gs(), rsp)?;
    a.jne(faults[5])?;
    for (register, mark) in [(r14, MARKS[0]), (r15, MARKS[1])] {
        a.mov(rax, mark)?;
        a.cmp(register, rax)?;
        a.jne(faults[5])?;
    }
    a.mov(qword_ptr(SUCCEEDED as i32).gs(), rbp)?;
    a.mov(qword_ptr(FAILED as i32).gs(), r13)?;
    a.jmp(*top)?;
    a.set_label(done)?;
    report(a, DONE)?;
    a.set_label(stop)?;
    a.jmp(*stop)?;
    let reports = [
        BAD_RETURN,
        LOST_OWN,
        LOST_SECOND,
        LOST_KERNEL,
        LOST_PER_CPU,
        BAD_REGISTER,
    ];
    for (label, value) in faults.iter_mut().zip(reports) {
        a.set_label(label)?;
        report(a, value)?;
    }
    Ok(())
}

/// Reports and stays there.
fn report(a: &mut CodeAssembler, value: u32) -> Result<(), IcedError> {
    a.mov(edx, u32::from(REPORT_PORT))?;
    a.mov(eax, value)?;
    a.out(dx, eax)?;
    let mut here = a.create_label();
    a.set_label(&mut here)?;
    a.jmp(here)
}

fn end_of_interrupt(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for register in [rax, rcx, rdx] {
        a.push(register)?;
    }
    a.mov(ecx, X2APIC_EOI)?;
    a.xor(eax, eax)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    for register in [rdx, rcx, rax] {
        a.pop(register)?;
    }
    a.iretq()
}

/// An interrupt gate.
fn gate(memory: &GuestMemory, vector: u64, handler: u64) {
    let low = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    let at = gpa_of(TABLES + PAGE + vector * 16);
    memory.write_obj(low, GuestAddress(at)).unwrap();
    memory
        .write_obj(handler >> 32, GuestAddress(at + 8))
        .unwrap();
}

struct PageTables<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl PageTables<'_> {
    fn map(&mut self, va: u64, gpa: u64, flags: u64) {
        let mut table = PML4;
        for shift in [39, 30, 21] {
            let at = GuestAddress(table + (va >> shift & 511) * 8);
            let entry: u64 = self.memory.read_obj(at).unwrap();
            table = match entry {
                0 => {
                    let new = self.next;
                    self.next += PAGE;
                    self.memory.write_obj(new | 3, at).unwrap();
                    new
                }
                entry => entry & 0x000f_ffff_ffff_f000,
            };
        }
        let at = GuestAddress(table + (va >> 12 & 511) * 8);
        self.memory.write_obj(gpa | 1 | flags, at).unwrap();
    }
}
