//! Snapshots as directories: a machine's whole state on disk, to go on from in this process or
//! another.
//!
//! ```text
//!  DIR/
//!   ├── manifest.json   what this is, in JSON: version, identity, parent, sizes and checksums of the rest
//!   ├── machine.state   vCPUs, interrupt controllers, clocks       (state::MachineState)
//!   ├── devices.state   everything that is plugged in              (device_states::DeviceStates)
//!   ├── memory.map      which pages the image holds, with checksums (MemoryMap)
//!   ├── memory.image    the pages, each at its offset; the rest are holes
//!   └── working.set     not of the snapshot: what who goes on lazily touches first (WorkingSet)
//! ```
//!
//! A *full* snapshot has every page that is not zero. A *diff* has the pages that changed since its
//! parent was taken, and names the parent; a page is looked for in the diff, then in its parent,
//! and so on.
//!
//! A snapshot is written beside its name and renamed when it is whole: a directory that has a
//! manifest is complete. It comes from outside when it is read, and is not trusted: every size is
//! bounded, every byte is under a checksum, and what this version does not understand is refused.

mod capture;
mod capture_error;
mod chain;
mod copier;
mod directory;
mod go_back;
mod image;
mod manifest;
mod memory_map;
mod merge;
mod restore;
mod sums;
mod working_set;
mod writer;

use std::path::PathBuf;

pub use crate::memory::PAGE_BYTES;
pub use capture::{Beside, SnapshotRequest, Taken};
pub use capture_error::CaptureError;
pub use chain::Chain;
pub use directory::Snapshot;
pub use go_back::GoBackError;
pub use image::Loaded;
pub use manifest::{CpuModel, FORMAT_VERSION, Manifest, ParentSnapshot, SnapshotId, StoredFile};
pub use memory_map::{MemoryMap, PageRun};
pub use restore::RestoreError;
pub use sums::PageSums;
pub use working_set::{Recorder, WORKING_SET_FILE, WorkingSet};
use writer::DirectoryWriter;
pub use writer::ImageWriter;

/// Name of the manifest in a snapshot's directory.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Name of the machine's state.
pub const MACHINE_FILE: &str = "machine.state";
/// Name of the devices' states.
pub const DEVICES_FILE: &str = "devices.state";
/// Name of the list of pages.
pub const MAP_FILE: &str = "memory.map";
/// Name of the pages.
pub const IMAGE_FILE: &str = "memory.image";

/// Hears what is done of long work, and says whether it is still wanted.
pub type Tell<'a> = &'a mut dyn FnMut(&str) -> bool;

/// Why a snapshot cannot be read or written. Each message is one line that says what to do, or what
/// is wrong with which file.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// There is no snapshot.
    #[error("{0} is no snapshot: it has no {MANIFEST_FILE}")]
    NoSnapshot(PathBuf),
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
    /// The directory that it is to be written to has something in it.
    #[error("{0} is not empty: name a new directory")]
    NotEmpty(PathBuf),
    /// The name stands for something else.
    #[error("{0} is not a directory: name a new one")]
    NotADirectory(PathBuf),
    /// A file is not what the manifest says.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// A file is another one than when it was opened.
    #[error("{0} was changed while it was opened: a snapshot's files must stay as they are")]
    ChangedMeanwhile(PathBuf),
    /// Whoever wanted it does not any more.
    #[error("given up, nothing of it is left")]
    GivenUp,
    /// It was written by another version.
    #[error(
        "{path} has version {found}, this program reads versions 1 to {FORMAT_VERSION}: use the one that wrote it"
    )]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// The parent of a diff is another snapshot, or none.
    #[error("{path} is not the parent of {child}: {what}")]
    Parent {
        /// What is there.
        path: PathBuf,
        /// The diff.
        child: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A chain of diffs is longer than any that is written here.
    #[error("{0} has more than {limit} parents: merge some of them", limit = chain::MAX_CHAIN)]
    ChainTooLong(PathBuf),
    /// What the guest has not touched yet cannot be read.
    #[error("a page of the file that the guest's memory begins as cannot be read: {0}")]
    Untouched(#[source] std::io::Error),
    /// The guest's memory cannot be reached.
    #[error("guest memory cannot be reached at {0:#x}")]
    GuestMemory(u64),
}

impl SnapshotError {
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

#[cfg(test)]
mod tests;
