//! Loads files that are in memory, for fuzzing.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};

use super::{OpenPayload, Payload};
use crate::memory::{GuestRam, MemoryError};

/// A guest that is only loaded into.
#[derive(Debug)]
pub struct Loader(GuestRam);

impl Loader {
    /// With so many bytes of memory.
    ///
    /// # Errors
    /// The host has not as much.
    pub fn new(memory_bytes: u64) -> Result<Self, MemoryError> {
        GuestRam::new(memory_bytes).map(Self)
    }

    /// Loads the file, which is the initramfs too. The address that it would be entered at, if it
    /// is a kernel.
    pub fn load(&self, file: &[u8]) -> Option<u64> {
        let memfd = memfd_create("kernel", MemfdFlags::CLOEXEC).ok()?;
        let mut memfd = File::from(memfd);
        memfd.write_all(file).ok()?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", memfd.as_raw_fd()));
        let payload = Payload::Linux {
            kernel: path.clone(),
            initrd: Some(path),
            cmdline: String::new(),
        };
        let entry = OpenPayload::open(payload).ok()?.load(&self.0).ok()?;
        Some(entry.rip)
    }
}
