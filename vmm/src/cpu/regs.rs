//! Registers of the boot processor at entry, and what all processors' local APICs start with.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::boot::EntryPoint;
use crate::error::Error;
use crate::layout;
use crate::memory::GuestRam;

const CR0: u64 = 1 // PE
    | 1 << 1 // MP
    | 1 << 4 // ET
    | 1 << 5 // NE
    | 1 << 16 // WP
    | 1 << 18 // AM
    | 1 << 31; // PG
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// 64-bit code segment, present, ring 0, readable.
const GDT_CODE: u64 = 0x00af_9b00_0000_ffff;
/// Data segment, present, ring 0, writable.
const GDT_DATA: u64 = 0x00cf_9300_0000_ffff;

/// Writes the GDT and the page tables that the boot processor starts with: the first GiB, one to
/// one.
pub(crate) fn write_boot_tables(ram: &GuestRam) -> Result<(), Error> {
    let memory = ram.memory();
    let write = |value: u64, address: u64| {
        memory
            .write_obj(value, GuestAddress(address))
            .map_err(|error| Error::Boot(error.into()))
    };
    write(GDT_CODE, layout::BOOT_GDT.0 + 0x10)?;
    write(GDT_DATA, layout::BOOT_GDT.0 + 0x18)?;
    let (pml4, pdpt) = (layout::BOOT_PML4.0, layout::BOOT_PML4.0 + 0x1000);
    let directory = pdpt + 0x1000;
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    write(pdpt | PRESENT_WRITABLE, pml4)?;
    write(directory | PRESENT_WRITABLE, pdpt)?;
    for i in 0..512 {
        write(i << 21 | PRESENT_WRITABLE | LARGE, directory + 8 * i)?;
    }
    Ok(())
}

/// Sets the boot processor's registers for `entry`. The vCPU is in its power-on state.
pub(crate) fn set_entry(vcpu: &VcpuFd, entry: EntryPoint) -> Result<(), Error> {
    let mut sregs = vcpu
        .get_sregs()
        .map_err(Error::kvm("read special registers"))?;
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 0b1011,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 0x18,
        type_: 0b0011,
        l: 0,
        db: 1,
        ..code
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = layout::BOOT_GDT.0;
    sregs.gdt.limit = 0x1f;
    sregs.cr0 = CR0;
    sregs.cr3 = layout::BOOT_PML4.0;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME_LMA;
    vcpu.set_sregs(&sregs)
        .map_err(Error::kvm("set special registers"))?;
    let regs = kvm_regs {
        rip: entry.rip,
        rsi: entry.rsi,
        rsp: layout::BOOT_STACK,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(Error::kvm("set registers"))
}

/// Connects a local APIC as PC firmware does: LINT0 takes the 8259's interrupts, LINT1 is the NMI.
pub(crate) fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), Error> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const DELIVERY_EXTINT: u32 = 0x700;
    const DELIVERY_NMI: u32 = 0x400;
    let mut lapic = vcpu.get_lapic().map_err(Error::kvm("read a local APIC"))?;
    for (register, value) in [(LVT_LINT0, DELIVERY_EXTINT), (LVT_LINT1, DELIVERY_NMI)] {
        for (byte, value) in lapic.regs[register..register + 4]
            .iter_mut()
            .zip(value.to_le_bytes())
        {
            *byte = value as _;
        }
    }
    vcpu.set_lapic(&lapic)
        .map_err(Error::kvm("set a local APIC"))
}
