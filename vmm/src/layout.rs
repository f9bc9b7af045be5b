//! Where things are in guest physical memory and I/O space. All addresses of the machine are here.
//!
//! ```text
//!   0x0000_0500  boot GDT                       ┐
//!   0x0000_7000  zero page (boot_params)        │ written by the VMM before the guest starts,
//!   0x0000_9000  boot page tables (3 pages)     │ free for the guest once it runs
//!   0x0002_0000  command line                   ┘
//!   0x0009_fc00  end of conventional memory
//!   0x000e_0000  ACPI tables, RSDP first          reserved, up to 1 MiB
//!   0x000f_e000  VM generation ID
//!   0x000f_fff0  reset vector
//!   0x0010_0000  memory: kernel; initramfs at its upper end
//!   0xc000_0000  end of low memory; 32-bit PCI window
//!   0xf000_0000  ECAM of bus 0
//!   0xf800_0000  nothing, ever
//!   0xfec0_0000  I/O APIC
//!   0xfee0_0000  local APICs
//!   0xfffb_c000  KVM's own pages (identity map, TSS; Intel only)
//! 0x1_0000_0000  memory beyond 3 GiB
//!   half of the physical address space: 64-bit PCI window, 64 GiB
//! ```

use vm_memory::GuestAddress;

/// Boot GDT: null, unused, 64-bit code (0x10), data (0x18).
pub const BOOT_GDT: GuestAddress = GuestAddress(0x500);
/// Linux's zero page, `struct boot_params`.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Initial stack pointer.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Top-level page table; its PDPT and one page directory follow.
pub const BOOT_PML4: GuestAddress = GuestAddress(0x9000);
/// Kernel command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line with its final zero: `COMMAND_LINE_SIZE` of Linux on x86.
pub const COMMAND_LINE_MAX_BYTES: usize = 2048;
/// First byte behind conventional memory.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// ACPI tables; the RSDP is at this very address, where a guest looks for it.
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// Bytes there are for ACPI tables.
pub const ACPI_TABLES_MAX_BYTES: usize = (GENERATION_ID.0 - ACPI_TABLES.0) as usize;
/// VM generation ID, 16 bytes in a page of their own, see [`crate::generation`].
pub const GENERATION_ID: GuestAddress = GuestAddress(0xf_e000);
/// Where real-mode software jumps to restart a PC, F000:FFF0.
pub const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// Memory goes on here after the reserved part below 1 MiB.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// First byte behind low memory, and the start of the PCI window.
pub const LOW_MEMORY_END: u64 = 0xc000_0000;
/// 32-bit PCI window, end exclusive.
pub const PCI_MEMORY32: (u64, u64) = (LOW_MEMORY_END, 0xf000_0000);
/// ECAM of bus 0.
pub const ECAM: u64 = 0xf000_0000;
/// Bytes of ECAM: 4 KiB for each of bus 0's 256 functions.
pub const ECAM_BYTES: u64 = 256 * 4096;
/// Nothing is ever put here, end exclusive, whatever the host's address width: room for memory that
/// another VM over the same guest's has and the guest has not.
pub const UNUSED: (u64, u64) = (0xf800_0000, 0xfc00_0000);
const _: () = assert!(
    ECAM + ECAM_BYTES <= UNUSED.0 && UNUSED.1 <= IO_APIC as u64,
    "something is put where nothing should be"
);
/// I/O APIC, as the in-kernel interrupt controller has it.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Page that KVM needs for real mode on Intel processors without unrestricted guests.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs for its TSS, behind the identity map.
pub const KVM_TSS: usize = 0xfffb_d000;
/// Memory beyond [`LOW_MEMORY_END`] is put here.
pub const MEMORY_ABOVE_4G: u64 = 1 << 32;
/// Size of the 64-bit PCI window.
pub const PCI_MEMORY64_BYTES: u64 = 64 << 30;

/// I/O window of PCI, end exclusive. Ports below are for devices at fixed places.
pub const PCI_IO: (u64, u64) = (0x1000, 0x1_0000);
/// Ports of the power device, see [`crate::power`].
pub const POWER_PORTS: u16 = 0x600;
/// Ports of PCI hot-plug, see [`crate::hotplug`].
pub const HOTPLUG_PORTS: u16 = 0x610;
/// Port of the panic device, where QEMU has it.
pub const PANIC_PORT: u16 = 0x505;

/// GSI of the power device's events: the interrupt that ACPI uses on PCs.
pub const POWER_GSI: u32 = 9;
/// First of the eight GSIs that PCI's interrupt pins are spread over, behind ISA's sixteen.
pub const PCI_GSI_BASE: u32 = 16;
/// Number of GSIs for PCI's interrupt pins.
pub const PCI_GSI_COUNT: u32 = 8;
/// Inputs of the I/O APIC; message-signalled interrupts are numbered from here.
pub const IO_APIC_PINS: u32 = 24;

/// GSI of interrupt pin `pin` (1 to 4) of the device in `slot`.
pub fn pci_gsi(slot: u8, pin: u8) -> u32 {
    PCI_GSI_BASE + (u32::from(slot) + u32::from(pin.wrapping_sub(1))) % PCI_GSI_COUNT
}
