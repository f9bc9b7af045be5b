//! What a build is asked for, and what it says that it made, of what.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::stage::hash_file;
use crate::{Error, deb};

/// The sources that decide what an artefact looks like: when they change, it is built again.
pub(crate) const BUILDER: &[&str] = &[
    include_str!("assemble.rs"),
    include_str!("build.rs"),
    include_str!("initramfs.rs"),
    include_str!("kernel.rs"),
    include_str!("manifest.rs"),
    include_str!("modules.rs"),
    include_str!("stages.rs"),
    include_str!("userland.rs"),
];

/// How and where to build.
pub struct BuildOptions<'a> {
    /// Output directory, such as `target/images`.
    pub out: PathBuf,
    /// Where packages are kept, those of all kernels.
    pub packages: PathBuf,
    /// The agent program, see [`crate::agent::build_agent`].
    pub agent: PathBuf,
    /// Ask the archive for newer packages.
    pub refresh: bool,
    /// Told what is going on, one line each.
    pub progress: &'a dyn Fn(&str),
}

/// What was built, of what; `manifest.json` in the output directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Hash of everything that was asked for.
    pub inputs: String,
    /// Kernel release, such as `6.1.0-56-amd64`.
    pub kernel_release: String,
    /// Packages that were used.
    pub packages: Vec<PackageUse>,
    /// Files that were made.
    pub artefacts: Vec<Artefact>,
}

/// A package that was used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackageUse {
    /// Name.
    pub name: String,
    /// Version.
    pub version: String,
    /// SHA-256 of the package file.
    pub sha256: String,
}

/// A file that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artefact {
    /// Path under the output directory.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256.
    pub sha256: String,
    /// Time of the file in nanoseconds since 1970: shows that it was not touched since.
    pub modified_ns: u128,
}

pub(crate) fn to_json(value: &impl Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec_pretty(value).map_err(|error| Error::io(Path::new("manifest"))(error.into()))
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(Error::io(path))
}

pub(crate) fn package_use(file: &Path) -> Result<PackageUse, Error> {
    let control = deb::control(file)?;
    Ok(PackageUse {
        name: control.package,
        version: control.version,
        sha256: hash_file(file)?,
    })
}
