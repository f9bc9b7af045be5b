//! Why an image could not be built. Each message says what to do.

use std::io;
use std::path::{Path, PathBuf};

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read, written or renamed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A package cannot be had.
    #[error("package {name} cannot be fetched: {reason}")]
    Fetch {
        /// The package.
        name: String,
        /// apt's word, and what to do.
        reason: String,
    },
    /// A package file is damaged.
    #[error("{path} is no usable Debian package ({reason}): delete it and build again")]
    BadPackage {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A kernel image cannot be used.
    #[error("{path} is no usable kernel: {reason}")]
    BadKernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A module is wanted that the kernel package does not have.
    #[error("the kernel package has no module {0}: correct the image's list of modules")]
    NoModule(String),
    /// A module's or program's file cannot be used.
    #[error("{path}: {reason}")]
    BadElf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that a package should have is not there.
    #[error("no package gives {0}: correct the image's list of programs")]
    NoFile(String),
    /// No package was found that has a library.
    #[error("no package was found for the library {library}, needed by {by}")]
    NoLibrary {
        /// `DT_NEEDED` name.
        library: String,
        /// The program or library that needs it.
        by: String,
    },
    /// A command failed.
    #[error("`{command}` failed: {reason}")]
    Command {
        /// The command line.
        command: String,
        /// Status and last words.
        reason: String,
    },
    /// An image's description contradicts itself.
    #[error("image {image}: {reason}")]
    Spec {
        /// The image.
        image: String,
        /// What is wrong.
        reason: String,
    },
}

impl Error {
    /// For `map_err`: an error about the file `path`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |source| Self::Io {
            path: path.into(),
            source,
        }
    }
}
