//! The file behind a disk: raw, that is sector `n` at byte `512 * n`.

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// Bytes of a sector, the unit of everything in virtio-blk.
pub const SECTOR_BYTES: u64 = 512;
/// Zeros written at a time where the file system cannot make them.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Nothing there.
    #[error("disk {0} does not exist; make one by `truncate -s 1G {0}`")]
    NotFound(PathBuf),
    /// Not a file.
    #[error("disk {0} is a directory; give an image file or a block device")]
    Directory(PathBuf),
    /// Not writable for this user.
    #[error("disk {0} cannot be opened with the rights you have; change them, or add `,ro`")]
    Permission(PathBuf),
    /// In use.
    #[error("disk {0} is in use by another VM; end that, or give both `,ro`")]
    Locked(PathBuf),
    /// No disk has this size.
    #[error(
        "disk {path} has {bytes} bytes; a raw disk has a multiple of 512, and at least one sector"
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// Anything else.
    #[error("disk {path}: {source}")]
    Io {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// An open disk. Everybody who writes has it alone; readers may share it.
#[derive(Debug)]
pub struct Disk {
    file: File,
    bytes: u64,
    read_only: bool,
}

impl Disk {
    /// Opens and locks the raw image or block device at `path`.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let io = |source| DiskError::Io {
            path: path.to_owned(),
            source,
        };
        let mut file = File::options()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(|error| match error.kind() {
                ErrorKind::NotFound => DiskError::NotFound(path.to_owned()),
                ErrorKind::IsADirectory => DiskError::Directory(path.to_owned()),
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                    DiskError::Permission(path.to_owned())
                }
                _ => io(error),
            })?;
        if file.metadata().map_err(io)?.is_dir() {
            return Err(DiskError::Directory(path.to_owned()));
        }
        let locked = if read_only {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DiskError::Locked(path.to_owned())),
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        // A block device's metadata does not tell its size.
        let bytes = file.seek(SeekFrom::End(0)).map_err(io)?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::Size {
                path: path.to_owned(),
                bytes,
            });
        }
        Ok(Self {
            file,
            bytes,
            read_only,
        })
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.bytes / SECTOR_BYTES
    }

    /// Whether it may not be written.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Makes what was written survive a crash of the host.
    pub(super) fn flush(&self) -> std::io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the space of a range back, where the backing can; it may then read as zeros or not.
    pub(super) fn discard(&self, offset: u64, bytes: u64) -> std::io::Result<()> {
        match self.allocate(FallocateFlags::PUNCH_HOLE, offset, bytes) {
            Err(error) if cannot(error) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Makes a range read as zeros, keeping its space unless `unmap`.
    pub(super) fn write_zeroes(&self, offset: u64, bytes: u64, unmap: bool) -> std::io::Result<()> {
        let how = if unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        match self.allocate(how, offset, bytes) {
            Err(error) if cannot(error) => {}
            other => return Ok(other?),
        }
        let mut at = offset;
        let end = offset + bytes;
        while at < end {
            let length = (end - at).min(ZEROS.len() as u64) as usize;
            self.file.write_all_at(&ZEROS[..length], at)?;
            at += length as u64;
        }
        Ok(())
    }

    fn allocate(&self, how: FallocateFlags, offset: u64, bytes: u64) -> Result<(), Errno> {
        loop {
            match rustix::fs::fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, bytes)
            {
                Err(Errno::INTR) => {}
                other => return other,
            }
        }
    }
}

/// Whether a backing says that it cannot do this, or not for such a range: a block device of larger
/// sectors answers EINVAL for a part of one. Nothing has changed then.
fn cannot(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::INVAL)
}
