//! What an image holds, as data.

use agent_protocol::init_config::InitConfig;
use serde::Serialize;

use crate::kernels::KernelSource;

/// Images that are built from one kernel.
#[derive(Clone, Debug, Serialize)]
pub struct ImageSet {
    /// The kernel.
    pub kernel: &'static KernelSource,
    /// Its release, where it is not to be the newest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// The images.
    pub images: Vec<ImageSpec>,
    /// Modules that are put beside the images for the host to read (types, sections), besides those
    /// that some image holds.
    pub host_modules: Vec<String>,
}

/// One initramfs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ImageSpec {
    /// File name under the output directory, such as `initrd.cpio` or `l1/initrd.cpio`.
    pub file: String,
    /// What `/init` does. The modules it names are in the image without being named again.
    pub init: InitConfig,
    /// More modules that the image holds; what they depend on is added.
    pub modules: Vec<String>,
    /// `busybox` with links for all its commands.
    pub busybox: bool,
    /// Programs with the libraries they need.
    pub programs: Vec<Program>,
    /// Packages of which the image holds all but documentation, with the libraries that their
    /// programs need.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub packages: Vec<String>,
    /// Any other files.
    pub files: Vec<ExtraFile>,
}

/// A program out of a package.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Program {
    /// Package name.
    pub package: String,
    /// Path in the package and in the image, absolute.
    pub path: String,
}

impl Program {
    /// `path` out of `package`.
    pub fn new(package: &str, path: &str) -> Self {
        Self {
            package: package.into(),
            path: path.into(),
        }
    }
}

/// A file whose content is given.
#[derive(Clone, Debug, Serialize)]
pub struct ExtraFile {
    /// Path in the image, absolute.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Content.
    pub content: Vec<u8>,
}

/// The names of a list that is written down in the code.
pub(crate) fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| w.to_string()).collect()
}
