//! `debug`: looks at a guest at the fault of an isolated call.

use std::path::PathBuf;

use anyhow::bail;
use isolation::fault_image::{FaultImage, FaultImageError, images_in};

use super::{Ending, print_bytes, print_json};
use crate::debug::serve::{Place, serve};
use crate::debug::words::{json, summary};

/// `debug`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Images are kept by `cofferdam isolate --keep-faults`. They hold the guest's memory: whoever reads one reads that.

Examples:
  cofferdam debug faults/e1000-e1000_clean-0001
  cofferdam debug faults/e1000-e1000_clean-0001 --listen /tmp/fault.sock
  gdb -ex 'target remote /tmp/fault.sock' -ex 'monitor bt'
  cofferdam debug faults/e1000-e1000_clean-0001 --listen 127.0.0.1:1234
  cofferdam debug faults/e1000-e1000_clean-0001 --json")]
pub struct DebugOptions {
    /// Directory of the image
    dir: PathBuf,
    /// Then serve it to gdb at this unix socket, or at 127.0.0.1:PORT, until Ctrl-C
    #[arg(long, value_name = "WHERE", conflicts_with = "json")]
    listen: Option<Place>,
    /// Read all of the guest's memory first, and compare it with its checksums
    #[arg(long)]
    check: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl DebugOptions {
    /// `debug`
    pub fn run(self) -> anyhow::Result<Ending> {
        let image = match FaultImage::open(&self.dir) {
            Err(FaultImageError::NoImage(dir)) => {
                let images = images_in(&dir);
                let Some(last) = images.last() else {
                    return Err(FaultImageError::NoImage(dir).into());
                };
                bail!(
                    "there are {} images of faults in {}: name one, such as {}",
                    images.len(),
                    dir.display(),
                    last.display()
                );
            }
            image => image?,
        };
        if self.check {
            image.check()?;
        }
        if self.json {
            print_json(&json(&image))?;
            return Ok(Ending::SUCCESS);
        }
        print_bytes(summary(&image).as_bytes())?;
        if let Some(place) = &self.listen {
            serve(&image, place, |command| {
                let text = format!(
                    "\n{command}\nmonitor help in gdb says what else there is to ask; Ctrl-C here ends it\n"
                );
                print_bytes(text.as_bytes())
            })?;
        }
        Ok(Ending::SUCCESS)
    }
}
