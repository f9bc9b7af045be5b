//! Where things are in this workspace.

use std::path::{Path, PathBuf};

use anyhow::Context;
use guest_images::KernelSource;

/// Root of the workspace.
#[derive(Clone, Debug)]
pub struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// The workspace this program was built from, or the one around the current directory if that
    /// has moved.
    pub fn find() -> anyhow::Result<Self> {
        let built_in = Path::new(env!("CARGO_MANIFEST_DIR"));
        let here = std::env::current_dir().context("there is no current directory")?;
        let root = built_in
            .ancestors()
            .chain(here.ancestors())
            .find(|dir| dir.join("Cargo.lock").is_file() && dir.join("ci/xtask").is_dir())
            .context("not inside the Cofferdam workspace: change into it first")?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Another checkout, at `root`.
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// Root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path below the root.
    pub fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    /// Guest images.
    pub fn images(&self) -> PathBuf {
        self.path("target/images")
    }

    /// Images of a kernel: the default's lie beside the folders of the others.
    pub fn images_of(&self, kernel: &KernelSource) -> PathBuf {
        match kernel.is_default() {
            true => self.images(),
            false => self.images().join(kernel.name),
        }
    }

    /// The lab's state and results.
    pub fn lab(&self) -> PathBuf {
        self.path("target/lab")
    }
}
