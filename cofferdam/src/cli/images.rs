//! Where guests of this program's own come from.

use std::path::PathBuf;

use anyhow::Context;

/// The folder of a person's own images.
#[derive(Debug, clap::Args)]
pub struct UserImages {
    /// Folder with guest images [default: cofferdam/images in $XDG_DATA_HOME, or in ~/.local/share]
    #[arg(long, value_name = "DIR", env = "COFFERDAM_IMAGES")]
    images: Option<PathBuf>,
}

impl UserImages {
    /// The folder; it need not be there.
    pub fn folder(&self) -> anyhow::Result<PathBuf> {
        let named = |name: &str| std::env::var_os(name).map(PathBuf::from);
        // Others are to be ignored (XDG Base Directory Specification).
        let whole = |path: &PathBuf| path.is_absolute();
        if let Some(images) = &self.images {
            return Ok(images.clone());
        }
        let data = named("XDG_DATA_HOME").filter(whole).or_else(|| {
            let home = named("HOME").filter(whole)?;
            Some(home.join(".local/share"))
        });
        let data = data.context("there is no home folder: name one for images with --images")?;
        Ok(data.join("cofferdam/images"))
    }
}

/// Options of commands that boot guests.
#[derive(Debug, clap::Args)]
pub struct Images {
    /// Folder with the guest images that `cargo xtask images` builds
    #[arg(
        long,
        value_name = "DIR",
        env = "COFFERDAM_IMAGES",
        default_value = "target/images"
    )]
    pub images: PathBuf,
}
