//! Whatever a file says that is given as a kernel or an initramfs: it is loaded into guest memory or
//! refused. An input is changes to the heads of an ELF or a bzImage, or a whole file; the first byte
//! says which.

use vmm::boot_fuzzing::Loader;

/// Guest memory, in bytes.
const MEMORY: u64 = 64 << 20;
const FILE_BYTES: usize = 16 << 10;

/// One input.
pub fn run(input: &[u8]) {
    let Some((which, data)) = input.split_first() else {
        return;
    };
    let file = match which % 3 {
        0 => changed(elf(), data),
        1 => changed(bzimage(), data),
        _ => data.to_vec(),
    };
    let loader = Loader::new(MEMORY).expect("there is memory");
    let Some(entry) = loader.load(&file) else {
        return;
    };
    assert!(entry < MEMORY, "it is entered at {entry:#x}");
}

/// A change is a place and the byte that stands there then.
fn changed(mut file: Vec<u8>, changes: &[u8]) -> Vec<u8> {
    for change in changes.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % file.len();
        file[at] = change[2];
    }
    // The last byte may cut it.
    let left = changes.len() % 3;
    if let (1.., Some(cut)) = (left, changes.last()) {
        file.truncate(file.len() * usize::from(*cut) / 255);
    }
    file
}

/// Puts a value at a place.
fn put(file: &mut [u8], at: usize, value: u64, bytes: usize) {
    file[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
}

/// An ELF with two segments (System V ABI, chapter 4).
fn elf() -> Vec<u8> {
    let mut file = vec![0; FILE_BYTES];
    file[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    for (at, value, bytes) in [
        (16, 2, 2),          // e_type: executable
        (18, 62, 2),         // e_machine: x86-64
        (20, 1, 4),          // e_version
        (24, 0x100_0000, 8), // e_entry
        (32, 64, 8),         // e_phoff
        (52, 64, 2),         // e_ehsize
        (54, 56, 2),         // e_phentsize
        (56, 2, 2),          // e_phnum
    ] {
        put(&mut file, at, value, bytes);
    }
    for (number, address) in [(0, 0x100_0000), (1, 0x110_0000)] {
        let at = 64 + 56 * number;
        put(&mut file, at, 1, 4);
        put(&mut file, at + 8, 0x1000 * (number as u64 + 1), 8);
        put(&mut file, at + 24, address, 8);
        put(&mut file, at + 32, 0x1000, 8);
        put(&mut file, at + 40, 0x2000, 8);
    }
    file
}

/// A bzImage with a 64-bit entry (boot.rst, "The Real-Mode Kernel Header").
fn bzimage() -> Vec<u8> {
    let mut file = vec![0; FILE_BYTES];
    for (at, value, bytes) in [
        (0x1f1, 1, 1),           // setup_sects
        (0x1f4, 0x300, 4),       // syssize, of 16 bytes
        (0x1fe, 0xaa55, 2),      // boot_flag
        (0x202, 0x5372_6448, 4), // "HdrS"
        (0x206, 0x20f, 2),       // version
        (0x211, 1, 1),           // loadflags: LOADED_HIGH
        (0x214, 0x10_0000, 4),   // code32_start
        (0x234, 1, 1),           // relocatable_kernel
        (0x236, 1, 2),           // xloadflags: XLF_KERNEL_64
        (0x258, 0x100_0000, 8),  // pref_address
        (0x260, 0x10_0000, 4),   // init_size
    ] {
        put(&mut file, at, value, bytes);
    }
    file
}
