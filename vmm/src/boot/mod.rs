//! Loads what the guest starts with: a Linux kernel with its initramfs and command line, or flat
//! machine code.
//!
//! Linux is entered by its 64-bit boot protocol (Documentation/arch/x86/boot.rst): long mode,
//! paging on with the first GiB mapped one to one, RSI pointing at the zero page.

#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod image;
mod params;

use std::fs::File;
use std::path::{Path, PathBuf};

use devices::dma::GuestMemory;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, bootparam};
use vm_memory::{Bytes, GuestAddress};

use crate::layout;
use crate::memory::GuestRam;
use image::ImageKind;

/// Default kernel command line.
///
/// - `console=ttyS0`: the only console there is.
/// - `panic=-1`: a panic restarts at once; the host sees it as a reset.
/// - `quiet`: every character of the boot log costs a VM exit.
/// - `reboot=a`: restarts by ACPI's reset register at once. Left alone, Linux tries EFI's reset
///   first on a machine with hardware-reduced ACPI, then goes through real mode to the reset
///   vector.
/// - `8250.nr_uarts=1`: no probing of the three serial ports that are not there.
///
/// ACPI, mitigations and everything else stay at the kernel's defaults.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 panic=-1 reboot=a quiet 8250.nr_uarts=1";

/// Why the guest cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file cannot be opened or read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is something else.
    #[error("{} is not a Linux kernel: give an x86-64 bzImage (vmlinuz) or ELF vmlinux", .0.display())]
    NotAKernel(PathBuf),
    /// The file is compressed as a whole.
    #[error("{} is compressed: unpack it first", .0.display())]
    Compressed(PathBuf),
    /// The kernel is for another architecture.
    #[error("{} is a kernel for another machine ({machine}): give an x86-64 one", path.display())]
    OtherMachine {
        /// The file.
        path: PathBuf,
        /// What it is for.
        machine: String,
    },
    /// The file ends before its headers say.
    #[error("{} is cut short ({have} of {need} bytes): copy it again", path.display())]
    CutShort {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        have: u64,
        /// The length it should have at least.
        need: u64,
    },
    /// The kernel's headers make no sense.
    #[error("{} is a damaged kernel: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The kernel needs more memory than the guest has.
    #[error("{} needs {} MiB of guest memory, the guest has {} MiB: give it more", path.display(), (.end >> 20) + 1, .memory >> 20)]
    KernelTooLarge {
        /// The file.
        path: PathBuf,
        /// First address behind what it needs.
        end: u64,
        /// Bytes of guest memory.
        memory: u64,
    },
    /// The initramfs does not fit behind the kernel.
    #[error("the initramfs {} of {} MiB does not fit into the guest's memory with the kernel ({} MiB are free): give it more", path.display(), .size.div_ceil(1 << 20), .free >> 20)]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        size: u64,
        /// Bytes there is room for.
        free: u64,
    },
    /// The initramfs is empty.
    #[error("the initramfs {} is empty", .0.display())]
    InitrdEmpty(PathBuf),
    /// The command line is too long.
    #[error("the kernel command line has {0} bytes; Linux takes {max}: shorten it", max = layout::COMMAND_LINE_MAX_BYTES - 1)]
    CommandLineTooLong(usize),
    /// The command line contains a zero byte.
    #[error("the kernel command line contains a zero byte")]
    CommandLineZero,
    /// Flat code does not fit where it should be.
    #[error("code of {len} bytes at {address:#x} does not fit into guest memory")]
    CodeOutside {
        /// Where it should be.
        address: u64,
        /// Its length.
        len: usize,
    },
    /// Guest memory cannot be written where everything should be inside it.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What a guest starts with.
#[derive(Debug, Clone)]
pub enum Payload {
    /// A Linux kernel.
    Linux {
        /// bzImage or ELF `vmlinux`.
        kernel: PathBuf,
        /// Initial file system, as the kernel takes it.
        initrd: Option<PathBuf>,
        /// Command line, see [`DEFAULT_COMMAND_LINE`].
        cmdline: String,
    },
    /// Machine code, entered in long mode as Linux is.
    Code {
        /// The code.
        code: Vec<u8>,
        /// Guest physical address that it is put at and entered at.
        address: GuestAddress,
    },
}

/// Registers that differ from one payload to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EntryPoint {
    pub rip: u64,
    pub rsi: u64,
}

/// A payload with its files open: what they contain is loaded again at each reset, even if the
/// paths lead elsewhere by then.
#[derive(Debug)]
pub(crate) struct OpenPayload {
    source: Source,
}

#[derive(Debug)]
enum Source {
    Linux {
        kernel: OpenFile,
        initrd: Option<OpenFile>,
        cmdline: Vec<u8>,
    },
    Code {
        code: Vec<u8>,
        address: GuestAddress,
    },
}

#[derive(Debug)]
struct OpenFile {
    file: File,
    path: PathBuf,
    len: u64,
}

impl OpenFile {
    fn open(path: &Path) -> Result<Self, BootError> {
        let read = |source| BootError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(read)?;
        let metadata = file.metadata().map_err(read)?;
        if !metadata.is_file() {
            let kind = std::io::ErrorKind::InvalidInput;
            return Err(read(std::io::Error::new(kind, "it is no regular file")));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            len: metadata.len(),
        })
    }

    fn read_error(&self, source: std::io::Error) -> BootError {
        BootError::Read {
            path: self.path.clone(),
            source,
        }
    }
}

impl OpenPayload {
    pub fn open(payload: Payload) -> Result<Self, BootError> {
        let source = match payload {
            Payload::Linux {
                kernel,
                initrd,
                cmdline,
            } => {
                let mut cmdline = cmdline.into_bytes();
                if cmdline.len() >= layout::COMMAND_LINE_MAX_BYTES {
                    return Err(BootError::CommandLineTooLong(cmdline.len()));
                }
                if cmdline.contains(&0) {
                    return Err(BootError::CommandLineZero);
                }
                cmdline.push(0);
                let kernel = OpenFile::open(&kernel)?;
                image::identify(&kernel)?;
                let initrd = initrd.as_deref().map(OpenFile::open).transpose()?;
                if let Some(initrd) = initrd.as_ref().filter(|initrd| initrd.len == 0) {
                    return Err(BootError::InitrdEmpty(initrd.path.clone()));
                }
                Source::Linux {
                    kernel,
                    initrd,
                    cmdline,
                }
            }
            Payload::Code { code, address } => Source::Code { code, address },
        };
        Ok(Self { source })
    }

    /// Writes the payload into `ram`, all zero before.
    pub fn load(&mut self, ram: &GuestRam) -> Result<EntryPoint, BootError> {
        match &mut self.source {
            Source::Code { code, address } => {
                let len = code.len();
                ram.memory()
                    .write_slice(code, *address)
                    .map_err(|_| BootError::CodeOutside {
                        address: address.0,
                        len,
                    })?;
                Ok(EntryPoint {
                    rip: address.0,
                    rsi: 0,
                })
            }
            Source::Linux {
                kernel,
                initrd,
                cmdline,
            } => {
                let loaded = load_kernel(kernel, ram)?;
                let initrd = match initrd {
                    Some(initrd) => Some(load_initrd(initrd, ram, &loaded)?),
                    None => None,
                };
                ram.memory().write_slice(cmdline, layout::COMMAND_LINE)?;
                params::write(ram, &loaded.setup_header, initrd, cmdline.len() as u32)?;
                Ok(EntryPoint {
                    rip: loaded.entry,
                    rsi: layout::ZERO_PAGE.0,
                })
            }
        }
    }
}

/// A kernel in guest memory.
struct LoadedKernel {
    entry: u64,
    /// First byte behind everything that the kernel uses before it knows the memory map.
    end: u64,
    setup_header: bootparam::setup_header,
}

fn load_kernel(kernel: &mut OpenFile, ram: &GuestRam) -> Result<LoadedKernel, BootError> {
    let damaged = |path: &Path, error: linux_loader::loader::Error| BootError::Damaged {
        path: path.to_owned(),
        what: error.to_string(),
    };
    let fits = |path: &Path, end: u64| {
        let memory = ram.low_end();
        let path = path.to_owned();
        if end <= memory {
            Ok(())
        } else {
            Err(BootError::KernelTooLarge { path, end, memory })
        }
    };
    let memory: &GuestMemory = ram.memory();
    match image::identify(kernel)? {
        ImageKind::Elf { end } => {
            fits(&kernel.path, end)?;
            let loaded = Elf::load(memory, None, &mut kernel.file, Some(layout::HIGH_MEMORY))
                .map_err(|error| damaged(&kernel.path, error))?;
            Ok(LoadedKernel {
                entry: loaded.kernel_load.0,
                end,
                setup_header: bootparam::setup_header::default(),
            })
        }
        ImageKind::BzImage { load_address, end } => {
            fits(&kernel.path, end)?;
            let loaded = BzImage::load(
                memory,
                Some(GuestAddress(load_address)),
                &mut kernel.file,
                None,
            )
            .map_err(|error| damaged(&kernel.path, error))?;
            let setup_header = loaded
                .setup_header
                .ok_or_else(|| BootError::NotAKernel(kernel.path.clone()))?;
            // The 64-bit entry is 0x200 behind the 32-bit one.
            Ok(LoadedKernel {
                entry: load_address + 0x200,
                end,
                setup_header,
            })
        }
    }
}

/// Where the initramfs is.
#[derive(Debug, Clone, Copy)]
struct LoadedInitrd {
    address: u32,
    size: u32,
}

/// Puts the initramfs at the upper end of low memory, where the kernel does not need to move it.
fn load_initrd(
    initrd: &mut OpenFile,
    ram: &GuestRam,
    kernel: &LoadedKernel,
) -> Result<LoadedInitrd, BootError> {
    // An ELF file does not say how high is too high; all kernels of this century take 2 GiB - 1.
    let highest = match kernel.setup_header.initrd_addr_max {
        0 => 0x7fff_ffff,
        limit => u64::from(limit),
    };
    let top = ram.low_end().min(highest + 1);
    let free = top.saturating_sub(kernel.end.next_multiple_of(4096));
    let size = initrd.len;
    let too_large = || BootError::InitrdTooLarge {
        path: initrd.path.clone(),
        size,
        free,
    };
    if size > free {
        return Err(too_large());
    }
    let address = (top - size) & !0xfff;
    if address < kernel.end {
        return Err(too_large());
    }
    std::io::Seek::rewind(&mut initrd.file).map_err(|source| initrd.read_error(source))?;
    ram.memory().read_exact_volatile_from(
        GuestAddress(address),
        &mut initrd.file,
        size as usize,
    )?;
    // Both are below 4 GiB, as `top` is.
    Ok(LoadedInitrd {
        address: address as u32,
        size: size as u32,
    })
}

#[cfg(test)]
mod tests;
