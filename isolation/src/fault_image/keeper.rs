//! Which faults are kept, and where.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::writer::{Content, Subject, write_image};
use super::{FaultImageError, MANIFEST_FILE};
use crate::domain::failing::Failing;
use crate::status::report::{Kept, ViolationReport};

/// Longest part of an image's name that is a module's or a function's.
const MAX_NAME: usize = 64;

/// Where images of faults are kept, and how many.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeepFaults {
    /// Directory for them; each has one of its own in there.
    pub dir: PathBuf,
    /// No more are written while there are so many in it.
    #[serde(default = "default_at_most")]
    pub at_most: u32,
}

fn default_at_most() -> u32 {
    KeepFaults::DEFAULT_AT_MOST
}

impl KeepFaults {
    /// Images in a directory at most unless said otherwise.
    pub const DEFAULT_AT_MOST: u32 = 8;

    /// Images in `dir`, as many as there are unless said otherwise.
    pub fn in_dir(dir: PathBuf) -> Self {
        Self {
            dir,
            at_most: Self::DEFAULT_AT_MOST,
        }
    }

    /// Makes the directory, if it is not there.
    ///
    /// # Errors
    /// It cannot be made, or cannot be read.
    pub fn prepare(&self) -> Result<(), FaultImageError> {
        // What is in there is the guest's memory.
        let made = DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(&self.dir);
        made.map_err(FaultImageError::write(&self.dir))?;
        self.found().map(drop)
    }

    /// How many images there are, and the highest number that one has.
    fn found(&self) -> Result<(u32, u32), FaultImageError> {
        let read = || FaultImageError::read(&self.dir);
        let (mut count, mut highest) = (0u32, 0);
        for entry in self.dir.read_dir().map_err(read())? {
            let entry = entry.map_err(read())?;
            let name = entry.file_name();
            let Some(number) = name.to_str().and_then(number_of) else {
                continue;
            };
            highest = highest.max(number);
            count = count.saturating_add(entry.path().join(MANIFEST_FILE).is_file().into());
        }
        Ok((count, highest))
    }
}

/// Keeps faults of one module.
#[derive(Debug)]
pub struct Keeper {
    keep: KeepFaults,
    subject: Subject,
}

impl Keeper {
    /// Of this module.
    pub fn new(keep: KeepFaults, subject: Subject) -> Self {
        Self { keep, subject }
    }

    /// Writes an image of a call of `entry` that has failed in this way. The guest stands still.
    pub fn keep(&self, entry: &str, report: &ViolationReport, failing: &Failing<'_>) -> Kept {
        let begun = Instant::now();
        let kept = match self.try_to_keep(entry, report, failing) {
            Ok(Some(path)) => Kept::In(path),
            Ok(None) => Kept::Enough(self.keep.at_most),
            Err(error) => Kept::Failed(error.to_string()),
        };
        self.subject.symbols.cool();
        if let Some(types) = &self.subject.types {
            types.cool();
        }
        match &kept {
            Kept::In(path) => tracing::info!(
                "an image of the guest at a fault of {entry} is in {}; the guest stood still for {} ms for it",
                path.display(),
                begun.elapsed().as_millis()
            ),
            Kept::Enough(_) => {}
            Kept::Failed(why) => tracing::error!("a fault of {entry} is not kept: {why}"),
        }
        kept
    }

    /// `None` if there are enough.
    fn try_to_keep(
        &self,
        entry: &str,
        report: &ViolationReport,
        failing: &Failing<'_>,
    ) -> Result<Option<PathBuf>, FaultImageError> {
        let (count, highest) = self.keep.found()?;
        if count >= self.keep.at_most {
            return Ok(None);
        }
        let number = highest.saturating_add(1);
        let module = part_of_name(&self.subject.module);
        let name = format!("{module}-{}-{number:04}", part_of_name(entry));
        let content = Content {
            entry,
            subject: &self.subject,
            report,
            failing,
        };
        write_image(&self.keep.dir, &name, &content).map(Some)
    }
}

/// The number at the end of an image's name.
fn number_of(name: &str) -> Option<u32> {
    let (before, digits) = name.rsplit_once('-')?;
    let is_number = digits.len() >= 4 && digits.bytes().all(|byte| byte.is_ascii_digit());
    digits
        .parse()
        .ok()
        .filter(|_| is_number && !before.starts_with('.'))
}

/// A name that the guest gave, so that it is no path and no hidden file.
fn part_of_name(name: &str) -> String {
    let plain = |c: char| match c.is_ascii_alphanumeric() || matches!(c, '_' | '.') {
        true => c,
        false => '_',
    };
    let name: String = name.chars().take(MAX_NAME).map(plain).collect();
    match name.starts_with('.') || name.is_empty() {
        true => format!("_{name}"),
        false => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_guest_are_no_paths() {
        assert_eq!(part_of_name("e1000_clean.isra.0"), "e1000_clean.isra.0");
        assert_eq!(part_of_name("../../etc"), "_.._.._etc");
        assert_eq!(part_of_name(""), "_");
        assert_eq!(part_of_name(&"x".repeat(1000)).len(), MAX_NAME);
        assert_eq!(part_of_name("a\u{1b}[31m"), "a__31m");
    }

    #[test]
    fn images_are_counted_by_their_manifests_and_numbered_by_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let keep = KeepFaults::in_dir(dir.path().join("new/faults"));
        keep.prepare().unwrap();
        assert_eq!(keep.found().unwrap(), (0, 0));
        for name in ["m-f-0001", "m-g-0007", "notes", ".m-f-0009.partial-3"] {
            std::fs::create_dir(keep.dir.join(name)).unwrap();
        }
        std::fs::write(keep.dir.join("m-f-0001").join(MANIFEST_FILE), "{}").unwrap();
        assert_eq!(keep.found().unwrap(), (1, 7));
        let file = KeepFaults::in_dir(dir.path().join("file"));
        std::fs::write(&file.dir, "").unwrap();
        assert!(file.prepare().unwrap_err().to_string().contains("file"));
    }
}
