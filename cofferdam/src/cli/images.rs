//! Where guests of this program's own come from.

use std::path::PathBuf;

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
