//! Hand-made kernels for tests that need a VM but no Linux.

#![allow(dead_code, reason = "each test program uses its part")]

pub mod module;
pub mod place;

/// ELF machine.
pub const EM_X86_64: u16 = 62;
/// ELF machine.
pub const EM_AARCH64: u16 = 183;

/// A 64-bit ELF executable for `machine` with one segment of `code`, at 16 MiB.
pub fn elf(machine: u16, code: &[u8]) -> Vec<u8> {
    const ADDRESS: u64 = 16 << 20;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes());
    file.extend(machine.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    for offset in [ADDRESS, 64, 0] {
        file.extend(offset.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend([1u32, 5].map(u32::to_le_bytes).concat());
    let length = code.len() as u64;
    for word in [64 + 56, ADDRESS, ADDRESS, length, length, 4096] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

/// Does nothing for ever: `hlt` and a jump back to it.
pub const IDLE_CODE: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// Sends back over the first serial port whatever it receives.
pub const ECHO_CODE: [u8; 17] = [
    0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd (line status)
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xf7, // jz to the start
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0xee, // out dx, al
    0xeb, 0xef, // jmp to the start
];

/// Waits for the power button (`vmm::power`), and turns the machine off then.
pub const OBEDIENT_CODE: [u8; 19] = [
    0x66, 0xba, 0x04, 0x06, // mov dx, 0x604 (events)
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1 (power button)
    0x74, 0xf7, // jz to the start
    0x66, 0xba, 0x00, 0x06, // mov dx, 0x600 (sleep control)
    0xb0, 0x34, // mov al, SLP_EN and S5
    0xee, // out dx, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp to hlt
];
