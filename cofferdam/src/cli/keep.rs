//! Options of `isolate` that keep the guest at faults.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use isolation::fault_image::KeepFaults;

/// Whether faults are kept.
#[derive(Debug, clap::Args)]
pub struct KeepArgs {
    /// Write an image of the guest at each fault, before it is taken back, into a directory of its
    /// own in there: `cofferdam debug` looks at it. The guest stands still while one is written,
    /// for seconds where it uses a GiB
    #[arg(long, value_name = "DIR")]
    keep_faults: Option<PathBuf>,
    /// Write none while there are so many images in there
    #[arg(long, value_name = "N", requires = "keep_faults", default_value_t = KeepFaults::DEFAULT_AT_MOST, value_parser = clap::value_parser!(u32).range(1..=1000))]
    keep_at_most: u32,
}

impl KeepArgs {
    /// What is to be kept, and where.
    pub fn wanted(&self) -> anyhow::Result<Option<KeepFaults>> {
        let Some(dir) = &self.keep_faults else {
            return Ok(None);
        };
        // The VM's process is in another folder.
        let dir =
            std::path::absolute(dir).with_context(|| format!("cannot name {}", dir.display()))?;
        ensure!(
            dir.to_str().is_some(),
            "{} is no text (UTF-8): choose another directory",
            dir.display()
        );
        Ok(Some(KeepFaults {
            dir,
            at_most: self.keep_at_most,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_named_from_the_root_because_the_vm_is_elsewhere() {
        let keep = |dir: Option<&str>| KeepArgs {
            keep_faults: dir.map(PathBuf::from),
            keep_at_most: 3,
        };
        assert_eq!(keep(None).wanted().unwrap(), None);
        let wanted = keep(Some("faults")).wanted().unwrap().unwrap();
        assert!(wanted.dir.is_absolute() && wanted.dir.ends_with("faults"));
        assert_eq!(wanted.at_most, 3);
    }
}
