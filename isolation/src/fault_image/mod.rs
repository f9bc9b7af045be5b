//! Fault images: a guest at the fault of an isolated call, as a directory, to be looked at later.
//!
//! ```text
//!  DIR/
//!   └── MODULE-FUNCTION-0001/
//!        ├── manifest.json   what failed: registers, crossings, report; sizes and checksums of the rest, in JSON
//!        ├── private.pages   pages that the call had otherwise than the guest: address and content, one after the other
//!        ├── symbols         the guest's symbols, as its /proc/kallsyms has them
//!        ├── kernel.btf      types of its kernel, and
//!        ├── module.btf      of the module, if they are known
//!        ├── memory.map      which pages the guest's memory has that are not zero, with checksums
//!        └── memory.image    these pages, each at its offset in the regions of memory one behind the other
//! ```
//!
//! An image is written beside its name and renamed when all of it is there: a directory that has a
//! manifest is complete. It comes from outside when it is read, and is not trusted: every size is
//! bounded, every byte that is looked at is under a checksum, and what this version does not
//! understand is refused.
//!
//! | file | what it is |
//! | --- | --- |
//! | `keeper` | decides whether an image is written, and where |
//! | `writer` | writes one |
//! | `manifest` | its head |
//! | `reader` | reads one: memory as the call had it, symbols, types |
//! | `trace` | who had called whom |

mod keeper;
mod manifest;
mod reader;
mod trace;
mod writer;

#[cfg(test)]
mod tests;

use std::path::PathBuf;

use vmm::snapshot::PageSums;

pub use crate::status::report::Kept;
pub use keeper::{KeepFaults, Keeper};
pub use manifest::{
    Control, FORMAT_VERSION, Files, Manifest, Region, Registers, ReturnPoint, Section,
};
pub use reader::{FaultImage, images_in};
pub use trace::{Frame, FrameKind};
pub use writer::Subject;

/// What the guest's pages are summed up by.
const PAGE_SUMS: PageSums = PageSums::Crc32;
/// Name of the manifest in an image's directory.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Name of the pages that the call had otherwise.
pub const PRIVATE_FILE: &str = "private.pages";
/// Name of the symbols.
pub const SYMBOLS_FILE: &str = "symbols";
/// Name of the kernel's types.
pub const KERNEL_TYPES_FILE: &str = "kernel.btf";
/// Name of the module's types.
pub const MODULE_TYPES_FILE: &str = "module.btf";
/// Name of the list of the guest's pages.
pub const MAP_FILE: &str = "memory.map";
/// Name of the guest's pages.
pub const MEMORY_FILE: &str = "memory.image";

/// Why an image cannot be written or read. Each message is one line that says what is wrong with
/// which file.
#[derive(Debug, thiserror::Error)]
pub enum FaultImageError {
    /// There is none.
    #[error("{0} is no image of a fault: it has no {MANIFEST_FILE}")]
    NoImage(PathBuf),
    /// It is a snapshot.
    #[error(
        "{0} is a snapshot and no image of a fault: `cofferdam run --snapshot` goes on from it"
    )]
    Snapshot(PathBuf),
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Something cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what the manifest says.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// It was written by another version.
    #[error(
        "{path} has version {found}, this program reads version {FORMAT_VERSION}: use the one that wrote it"
    )]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// Guest memory cannot be reached.
    #[error("guest memory cannot be reached at {0:#x}")]
    GuestMemory(u64),
}

impl FaultImageError {
    /// For `map_err`: `path` cannot be read.
    fn read(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Read { path, source }
    }

    /// For `map_err`: `path` cannot be written.
    fn write(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Write { path, source }
    }

    /// `path` is not what it should be.
    fn damaged(path: impl Into<PathBuf>, what: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.into(),
            what: what.into(),
        }
    }
}
