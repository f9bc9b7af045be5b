//! The count of lab starts, commands and retries, in `retries.json`: a lab that hangs now and then
//! is not hidden by the retry.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// Retries kept with their story; older ones only count.
const KEPT: usize = 100;

/// What is in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Labs started.
    pub starts: u64,
    /// Commands that were begun, retries included.
    pub commands: u64,
    /// Retries ever.
    pub retries: u64,
    /// The newest ones.
    pub newest: Vec<Retry>,
}

/// A lab that was given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    /// Seconds since 1970.
    pub at: u64,
    /// The command; empty when the lab did not come up.
    pub command: Vec<String>,
    /// What happened.
    pub reason: String,
    /// Where console and processor state were saved.
    pub diagnosis: Option<PathBuf>,
}

/// The file, shared between processes.
#[derive(Clone, Debug)]
pub struct Ledger {
    path: PathBuf,
}

impl Ledger {
    /// The ledger of the labs below `lab`.
    pub fn new(lab: &Path) -> Self {
        Self {
            path: lab.join("retries.json"),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says; nothing counted yet when there is no file.
    pub fn read(&self) -> anyhow::Result<Counts> {
        match fs::read(&self.path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is damaged: remove it", self.path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Counts::default()),
            Err(error) => {
                Err(error).with_context(|| format!("cannot read {}", self.path.display()))
            }
        }
    }

    /// A lab was started.
    pub fn count_start(&self) -> anyhow::Result<()> {
        self.change(|counts| counts.starts += 1)
    }

    /// A command was begun.
    pub fn count_command(&self) -> anyhow::Result<()> {
        self.change(|counts| counts.commands += 1)
    }

    /// A lab was given up and what it did is tried again.
    pub fn count_retry(&self, retry: Retry) -> anyhow::Result<()> {
        self.change(|counts| {
            counts.retries += 1;
            counts.newest.push(retry);
            let old = counts.newest.len().saturating_sub(KEPT);
            counts.newest.drain(..old);
        })
    }

    fn change(&self, change: impl FnOnce(&mut Counts)) -> anyhow::Result<()> {
        let lock_path = self.path.with_extension("lock");
        let _lock = super::instance::lock(&lock_path, None)?;
        let mut counts = self.read()?;
        change(&mut counts);
        let new = self.path.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(&counts)?)
            .and_then(|()| fs::rename(&new, &self.path))
            .with_context(|| format!("cannot write {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retry(n: u64) -> Retry {
        Retry {
            at: n,
            command: vec!["true".into()],
            reason: "hung".into(),
            diagnosis: None,
        }
    }

    #[test]
    fn counts_survive_and_add_up() {
        let dir = tempfile::tempdir().unwrap();
        Ledger::new(dir.path()).count_start().unwrap();
        Ledger::new(dir.path()).count_command().unwrap();
        Ledger::new(dir.path()).count_retry(retry(5)).unwrap();
        Ledger::new(dir.path()).count_start().unwrap();
        let counts = Ledger::new(dir.path()).read().unwrap();
        assert_eq!((counts.starts, counts.commands, counts.retries), (2, 1, 1));
        assert_eq!(counts.newest, [retry(5)]);
    }

    #[test]
    fn old_stories_go_but_are_still_counted() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::new(dir.path());
        for n in 0..KEPT as u64 + 3 {
            ledger.count_retry(retry(n)).unwrap();
        }
        let counts = ledger.read().unwrap();
        assert_eq!(counts.retries, KEPT as u64 + 3);
        assert_eq!(counts.newest.len(), KEPT);
        assert_eq!(counts.newest[0].at, 3);
    }

    #[test]
    fn parallel_counting_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        Ledger::new(dir.path()).count_start().unwrap();
                    }
                });
            }
        });
        assert_eq!(Ledger::new(dir.path()).read().unwrap().starts, 40);
    }

    #[test]
    fn damaged_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("retries.json"), "{").unwrap();
        let error = Ledger::new(dir.path()).read().unwrap_err();
        assert!(error.to_string().contains("retries.json"));
    }
}
