//! Tells kernel files apart and checks their headers before anything is loaded, so that what cannot
//! work is refused with a reason.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::{BootError, OpenFile};
use crate::layout::HIGH_MEMORY;

/// What a kernel file is, and which memory it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ImageKind {
    /// ELF `vmlinux`, loaded at the physical addresses of its segments.
    Elf {
        /// First address behind the last segment.
        end: u64,
    },
    /// bzImage with a 64-bit entry.
    BzImage {
        /// Where its protected-mode part goes.
        load_address: u64,
        /// First address behind what it needs while it unpacks itself.
        end: u64,
    },
}

/// Offsets in the setup header of a bzImage (boot.rst, "The Real-Mode Kernel Header").
mod setup {
    pub const SETUP_SECTS: usize = 0x1f1;
    pub const SYSSIZE: usize = 0x1f4;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const RELOCATABLE_KERNEL: usize = 0x234;
    pub const XLOADFLAGS: usize = 0x236;
    pub const PREF_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
    /// Bytes of the file that contain all of the above.
    pub const END: usize = 0x264;
    /// There is a 64-bit entry at 0x200.
    pub const XLF_KERNEL_64: u16 = 1;
}

const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;

/// Fields of a header that was read whole; offsets are constants inside it.
struct Header<'a>(&'a [u8]);

impl Header<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut value = [0; N];
        value.copy_from_slice(&self.0[at..at + N]);
        value
    }
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}

/// Finds out what `kernel` is and whether it is whole.
pub(super) fn identify(kernel: &OpenFile) -> Result<ImageKind, BootError> {
    let mut head = [0; setup::END];
    let have = read_at(kernel, &mut head, 0)?;
    let path = || kernel.path.clone();
    if have >= 4 && head.starts_with(b"\x7fELF") {
        return elf(kernel, &head[..have]);
    }
    if have >= setup::MAGIC + 4 && &head[setup::MAGIC..setup::MAGIC + 4] == b"HdrS" {
        return bzimage(kernel, &head[..have]);
    }
    if have >= 0x3c && &head[0x38..0x3c] == b"ARM\x64" {
        return Err(BootError::OtherMachine {
            path: path(),
            machine: "AArch64".into(),
        });
    }
    let packed: [&[u8]; 5] = [
        b"\x1f\x8b",
        b"\xfd7zXZ",
        b"\x28\xb5\x2f\xfd",
        b"BZh",
        b"\x04\x22\x4d\x18",
    ];
    if packed.iter().any(|magic| head.starts_with(magic)) {
        return Err(BootError::Compressed(path()));
    }
    Err(BootError::NotAKernel(path()))
}

/// Fills as much of `buffer` as the file has; gives how much that is.
fn read_at(kernel: &OpenFile, buffer: &mut [u8], offset: u64) -> Result<usize, BootError> {
    let mut have = 0;
    while have < buffer.len() {
        match kernel
            .file
            .read_at(&mut buffer[have..], offset + have as u64)
        {
            Ok(0) => break,
            Ok(count) => have += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(kernel.read_error(error)),
        }
    }
    Ok(have)
}

fn cut_short(kernel: &OpenFile, need: u64) -> BootError {
    BootError::CutShort {
        path: kernel.path.clone(),
        have: kernel.len,
        need,
    }
}

fn elf(kernel: &OpenFile, head: &[u8]) -> Result<ImageKind, BootError> {
    if head.len() < ELF_HEADER_BYTES {
        return Err(cut_short(kernel, ELF_HEADER_BYTES as u64));
    }
    let header = Header(head);
    let path: PathBuf = kernel.path.clone();
    let damaged = |what: &str| BootError::Damaged {
        path: path.clone(),
        what: what.into(),
    };
    let (class, data, machine) = (head[4], head[5], header.u16(18));
    if class != 2 || data != 1 || machine != EM_X86_64 {
        let machine = match (class, machine) {
            (2, 183) => "AArch64".to_owned(),
            (2, 243) => "RISC-V".to_owned(),
            (1, 3) => "32-bit x86".to_owned(),
            (class, machine) => format!("ELF class {class}, machine {machine}"),
        };
        return Err(BootError::OtherMachine { path, machine });
    }
    let (entry, table, entry_bytes, count) = (
        header.u64(24),
        header.u64(32),
        header.u16(54),
        header.u16(56),
    );
    if usize::from(entry_bytes) != PROGRAM_HEADER_BYTES || count == 0 {
        return Err(damaged("it has no program headers"));
    }
    let table_bytes = usize::from(count) * PROGRAM_HEADER_BYTES;
    let table_end = table
        .checked_add(table_bytes as u64)
        .ok_or_else(|| damaged("overflow"))?;
    if table_end > kernel.len {
        return Err(cut_short(kernel, table_end));
    }
    let mut headers = vec![0; table_bytes];
    if read_at(kernel, &mut headers, table)? < table_bytes {
        return Err(cut_short(kernel, table_end));
    }
    let (mut end, mut entered) = (0, false);
    for segment in headers.chunks_exact(PROGRAM_HEADER_BYTES).map(Header) {
        if segment.u32(0) != PT_LOAD {
            continue;
        }
        let (offset, address, in_file, in_memory) = (
            segment.u64(8),
            segment.u64(24),
            segment.u64(32),
            segment.u64(40),
        );
        let file_end = offset
            .checked_add(in_file)
            .ok_or_else(|| damaged("overflow"))?;
        if file_end > kernel.len {
            return Err(cut_short(kernel, file_end));
        }
        let segment_end = address
            .checked_add(in_memory.max(in_file))
            .ok_or_else(|| damaged("overflow"))?;
        if address < HIGH_MEMORY.0 {
            return Err(damaged("a segment is below 1 MiB"));
        }
        end = end.max(segment_end);
        entered |= (address..segment_end).contains(&entry);
    }
    if !entered {
        return Err(damaged("its entry point is outside of it"));
    }
    Ok(ImageKind::Elf { end })
}

fn bzimage(kernel: &OpenFile, head: &[u8]) -> Result<ImageKind, BootError> {
    if head.len() < setup::END {
        return Err(cut_short(kernel, setup::END as u64));
    }
    let header = Header(head);
    let path: PathBuf = kernel.path.clone();
    if header.u16(setup::VERSION) < 0x020c
        || header.u16(setup::XLOADFLAGS) & setup::XLF_KERNEL_64 == 0
    {
        return Err(BootError::OtherMachine {
            path,
            machine: "32-bit x86".into(),
        });
    }
    let sectors = match head[setup::SETUP_SECTS] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let need = (sectors + 1) * 512 + u64::from(header.u32(setup::SYSSIZE)) * 16;
    if need > kernel.len {
        return Err(cut_short(kernel, need));
    }
    let preferred = header.u64(setup::PREF_ADDRESS);
    let damaged = |what: &str| BootError::Damaged {
        path: path.clone(),
        what: what.into(),
    };
    if head[setup::RELOCATABLE_KERNEL] == 0 || preferred < HIGH_MEMORY.0 {
        return Err(damaged("it cannot be loaded at its preferred address"));
    }
    let end = preferred
        .checked_add(u64::from(header.u32(setup::INIT_SIZE)).max(kernel.len))
        .ok_or_else(|| damaged("overflow"))?;
    Ok(ImageKind::BzImage {
        load_address: preferred,
        end,
    })
}
