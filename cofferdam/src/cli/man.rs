//! `man`: manual pages, out of the same descriptions as the help texts.

use std::path::PathBuf;

use anyhow::Context;
use clap::CommandFactory;

use super::{Cli, Ending};

/// `man`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cofferdam man ~/.local/share/man/man1
  cofferdam man /tmp/pages && man /tmp/pages/cofferdam-isolate.1")]
pub struct ManOptions {
    /// Folder for the pages, which is made if it is not there
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl ManOptions {
    /// `man`
    pub fn run(&self) -> anyhow::Result<Ending> {
        let dir = &self.dir;
        std::fs::create_dir_all(dir)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), dir))
            .with_context(|| format!("cannot write the pages into {}", dir.display()))?;
        Ok(Ending::SUCCESS)
    }
}
