//! What is known of a vCPU that stopped for good, in words for the log: where it was, with what in
//! its registers, and what it had last asked of the machine.

use std::fmt::Write;

use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::exits::ExitCounters;
use crate::memory::GuestRam;

/// Longest instruction (Intel SDM volume 2, section 2.3.11).
const INSTRUCTION_BYTES: usize = 15;
/// RIP after INIT.
const RESET_RIP: u64 = 0xfff0;

/// Registers, events and last exits of a vCPU that is out of the guest, in a few lines.
pub(crate) fn describe(vcpu: &VcpuFd, exits: &ExitCounters, ram: &GuestRam) -> String {
    let mut words = String::new();
    // Writing to a string does not fail.
    let _ = registers(vcpu, ram, &mut words);
    let _ = write!(words, "last exits: {}", exits.last());
    words
}

fn registers(vcpu: &VcpuFd, ram: &GuestRam, words: &mut String) -> std::fmt::Result {
    let (regs, sregs) = match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => (regs, sregs),
        (Err(error), _) | (_, Err(error)) => {
            return writeln!(words, "its registers cannot be read: {error}");
        }
    };
    if regs.rip == RESET_RIP && sregs.cr0 & 1 == 0 {
        // KVM does so at the shutdown of an AMD processor, whose state is undefined then.
        return writeln!(words, "its registers are gone: KVM has reset it");
    }
    writeln!(
        words,
        "rip {:#x} rsp {:#x} rflags {:#x} cs {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
        regs.rip,
        regs.rsp,
        regs.rflags,
        sregs.cs.selector,
        sregs.cr0,
        sregs.cr2,
        sregs.cr3,
        sregs.cr4,
        sregs.efer
    )?;
    writeln!(
        words,
        "rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} rsi {:#x} rdi {:#x} rbp {:#x} r8 {:#x} r9 {:#x} r10 {:#x} \
         r11 {:#x} r12 {:#x} r13 {:#x} r14 {:#x} r15 {:#x}",
        regs.rax,
        regs.rbx,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        regs.rbp,
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15
    )?;
    writeln!(
        words,
        "gs {:#x} gdt {:#x} idt {:#x}+{:#x} tr {:#x}",
        sregs.gs.base, sregs.gdt.base, sregs.idt.base, sregs.idt.limit, sregs.tr.base
    )?;
    if let Ok(events) = vcpu.get_vcpu_events() {
        let exception = &events.exception;
        if exception.injected | exception.pending != 0 {
            write!(
                words,
                "exception {} ({:#x}) ",
                exception.nr, exception.error_code
            )?;
        }
        if events.interrupt.injected != 0 {
            write!(words, "interrupt {:#x} ", events.interrupt.nr)?;
        }
        if events.nmi.injected | events.nmi.pending != 0 {
            write!(words, "NMI ")?;
        }
    }
    let mut code = [0; INSTRUCTION_BYTES];
    let readable = vcpu.translate_gva(regs.rip).is_ok_and(|at| {
        let place = GuestAddress(at.physical_address);
        at.valid != 0 && ram.memory().read_slice(&mut code, place).is_ok()
    });
    match readable {
        true => writeln!(words, "code {code:02x?}"),
        false => writeln!(words, "code cannot be read"),
    }
}
